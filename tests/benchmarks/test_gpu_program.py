"""What is counted in a program that was compiled for a GPU."""

import collections
import re

import jax
import pytest

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.networks.kernels import attention
from cascaded_diffusion.networks.kernels.platforms import traced_for
from cascaded_diffusion.runtime.mesh import build_mesh
from cascaded_diffusion.training import step
from tests.tiny import smallest_sr

PROGRAM = """HloModule jit_step

%fused (p: bf16[4,16,16,64]) -> f32[4,16,16,64] {
  %p = bf16[4,16,16,64]{3,2,1,0} parameter(0)
  ROOT %c = f32[4,16,16,64]{3,2,1,0} convert(%p)
}

ENTRY %main (x: bf16[4,16,16,64], k: bf16[3,3,64,64]) -> (f32[4,64]) {
  %x = bf16[4,16,16,64]{3,2,1,0} parameter(0)
  %k = bf16[3,3,64,64]{3,2,1,0} parameter(1)
  %wrapped_transpose = bf16[64,3,3,64]{3,2,1,0} fusion(%k), kind=kInput, calls=%t
  %conv.1 = (bf16[4,16,16,64]{3,2,1,0}, u8[0]{0}) custom-call(%x, %wrapped_transpose), \
custom_call_target="__cudnn$convForward"
  %gte = bf16[4,16,16,64]{3,2,1,0} get-tuple-element(%conv.1), index=0
  %loop_convert_fusion = f32[4,16,16,64]{3,2,1,0} fusion(%gte), kind=kLoop, calls=%fused
  %input_reduce_fusion = f32[4,64]{1,0} fusion(%loop_convert_fusion), kind=kInput, calls=%r
  ROOT %out = (f32[4,64]{1,0}) tuple(%input_reduce_fusion)
}
"""


@pytest.fixture
def gpu_program(monkeypatch):
    for name in ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"):
        monkeypatch.setenv(name, "")  # importing it sets them
    import gpu_program

    return gpu_program


def test_bytes_are_counted_by_kind(gpu_program):
    feature_map, kernel, sums = 4 * 16 * 16 * 64, 9 * 64 * 64, 4 * 64
    assert gpu_program.counted(PROGRAM) == {
        "convolutions": (1, 2 * (2 * feature_map + kernel)),
        "transposes": (1, 2 * 2 * kernel),
        "reductions": (1, 4 * (feature_map + sums)),
        "elementwise": (1, (2 + 4) * feature_map),
    }


def test_wide_feature_maps_are_counted(gpu_program):
    assert gpu_program.wide_maps(PROGRAM) == 4 * 4 * 16 * 16 * 64


def test_sums_inside_of_other_kernels_are_counted(gpu_program):
    body = """%f (p: f32[4,1024,64]) -> f32[4,128] {
  %p = f32[4,1024,64]{2,1,0} parameter(0)
  %zero = f32[] constant(0)
  %sum = f32[4,64]{1,0} reduce(%p, %zero), dimensions={1}, to_apply=%add
  ROOT %both = f32[4,128]{1,0} concatenate(%sum, %sum), dimensions={1}
}

"""
    text = body + "ENTRY %main (x: f32[4,1024,64]) -> f32[4,128] {\n  ROOT %{} = f32[4,128]{1,0}"
    text += " fusion(%x), kind=kInput, calls=%f\n}\n"
    for name, count in (("input_concatenate_fusion.1", 1), ("input_reduce_fusion", 0)):
        assert gpu_program.serial_sums(text.replace("%{}", f"%{name}")) == count


def test_a_step_for_cuda_moves_no_more_feature_maps_than_it_did(monkeypatch):
    """Operations on feature maps of a step lowered for CUDA, which needs no GPU."""
    monkeypatch.setattr(attention, "_cudnn_takes", lambda *_: False)  # asks for cuDNN
    batch = 11  # no other axis is as long
    config = smallest_sr(
        train__batch_size=batch,
        stage__network__dtype="bfloat16",
        stage__network__patch_size=1,
        stage__network__channels=16,
        stage__network__dropout_rate=0.1,
    )
    mesh = build_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    size = config.stage.resolution
    stage = build_stage(config.stage)
    records = {
        "image": jax.ShapeDtypeStruct((batch, size, size, 1), "uint8"),
        "label": jax.ShapeDtypeStruct((batch,), "int32"),
    }
    with traced_for("gpu"):
        train_step = jax.jit(step.make_train_step(stage, config.train, mesh))
        traced = train_step.trace(step.abstract_state(stage, config.train, mesh), records)
    lines = traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
    of_maps = [line for line in lines if re.search(rf"tensor<{batch}x(\d+)x\1x\d\d+x\w+>", line)]
    counts = collections.Counter(re.findall(r"stablehlo\.(\w+)", "\n".join(of_maps)))
    held = {
        "transpose": 0,
        "concatenate": 2,  # what comes up beside what skips across, after its norm
        "convolution": 35,
        "reduce": 43,
        "optimization_barrier": 12,
    }
    assert {name: counts[name] for name in held} == held
