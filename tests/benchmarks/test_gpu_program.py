"""What is counted in a program that was compiled for a GPU."""

import pathlib

import pytest

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
    folder = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
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
