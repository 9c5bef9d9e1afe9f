"""A step's collectives by the formula."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.planning import collectives
from cascaded_diffusion.runtime import mesh as mesh_lib


def _parameters(mesh):
    shapes = {
        "conv": ((3, 3, 8, 64), PartitionSpec(None, None, None, "fsdp")),
        "wide": ((3, 3, 64, 64), PartitionSpec(None, None, "fsdp", "tensor")),
        "bias": ((64,), PartitionSpec()),
    }
    leaves = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in shapes.items()
    }
    return {"conv": leaves.pop("conv"), "down_0_block_0": leaves}


def _by_formula(data, fsdp, tensor, **kwargs):
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    mesh = mesh_lib.build_mesh(config, jax.devices()[: data * fsdp * tensor])
    kwargs = {"parts": 1, "dtype": jnp.bfloat16, "remat": False} | kwargs
    found = collectives.of_training_step(_parameters(mesh), mesh, **kwargs)
    return {kind: (t.count, t.bytes) for kind, t in found.items() if t.count}


CONV, WIDE, BIAS = 3 * 3 * 8 * 64, 3 * 3 * 64 * 64, 64


def test_the_formula_by_hand():
    # Kernels in 2 bytes, the rest in 4; a device has half of what is split over `tensor`.
    split = 2 * CONV + 2 * WIDE // 2
    assert _by_formula(2, 2, 2) == {
        "all-gather": (2, split),
        "reduce-scatter": (2, split),
        "all-reduce": (3, split // 2 + 4 * BIAS),
    }
    # Over `fsdp` alone only what is not split is summed by all-reduce.
    split = 2 * CONV + 2 * WIDE
    assert _by_formula(1, 8, 1) == {
        "all-gather": (2, split),
        "reduce-scatter": (2, split),
        "all-reduce": (1, 4 * BIAS),
    }
    assert _by_formula(1, 8, 1, dtype=jnp.float32)["all-gather"] == (2, 2 * split)


def test_what_is_computed_twice_is_gathered_twice_and_parts_repeat_all():
    once = _by_formula(4, 2, 1)
    remat = _by_formula(4, 2, 1, remat=True)
    # Of the two kernels one is in a block, and only blocks are computed twice.
    count, size = once["all-gather"]
    assert remat.pop("all-gather") == (count + 1, size + 2 * WIDE)
    assert remat == {kind: once[kind] for kind in ("reduce-scatter", "all-reduce")}
    thrice = _by_formula(4, 2, 1, parts=3)
    assert thrice == {kind: (3 * n, 3 * size) for kind, (n, size) in once.items()}
