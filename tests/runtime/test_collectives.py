"""Collectives read off a compiled program's text."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from cascaded_diffusion.config import MeshConfig
from cascaded_diffusion.runtime import collectives
from cascaded_diffusion.runtime.mesh import build_mesh


def _text(*lines, body=()):
    """HLO of an entry computation, and of a loop's body."""
    parts = ["HloModule m"]
    if body:
        parts += ["%body (p: f32[4]) -> f32[4] {", *(f"  {line}" for line in body), "}"]
    return "\n".join([*parts, "ENTRY %main (p: f32[4]) -> f32[4] {", *lines, "}"])


_LOOP = (
    '  %w = f32[4]{0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":'
    '"5"}}'
)


@pytest.mark.parametrize(
    ("text", "kind", "count", "size"),
    [
        (_text("  %a = f32[8,4]{1,0} all-gather(%p), dimensions={0}"), "all-gather", 1, 128),
        (_text("  %a = bf16[8,4]{1,0} all-gather(%p), dimensions={0}"), "all-gather", 1, 64),
        (
            _text(
                "  %a = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%p), dimensions={0}",
                "  %b = f32[8,4]{1,0} all-gather-done(%a)",
            ),
            "all-gather",
            1,
            128,
        ),
        (_text("  %a = (f32[3], f32[5]{0}) all-reduce(%p, %q), to_apply=%s"), "all-reduce", 1, 32),
        (
            _text("  %a = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%s"),
            "reduce-scatter",
            1,
            32,
        ),
        (
            _text("  %a = f32[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%s"),
            "reduce-scatter",
            1,
            32,
        ),
        (_text(_LOOP, body=["%a = f32[4]{0} all-reduce(%p), to_apply=%s"]), "all-reduce", 5, 80),
        (_text("  %f = f32[4]{0} fusion(%p), kind=kLoop, calls=%body"), "all-reduce", 0, 0),
    ],
)
def test_what_is_counted(text, kind, count, size):
    found = collectives.in_program(text)
    assert (found[kind].count, found[kind].bytes) == (count, size)
    assert sum(t.count for t in found.values()) == count


def test_a_loop_must_say_how_often_it_runs():
    text = _text(
        "  %w = f32[4]{0} while(%p), condition=%c, body=%body",
        body=["%a = f32[4]{0} all-reduce(%p), to_apply=%s"],
    )
    with pytest.raises(ValueError, match="does not say how often"):
        collectives.in_program(text)


def test_a_real_program_with_a_loop():
    mesh = build_mesh(MeshConfig(data=2, fsdp=4, tensor=1))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
    def program(x):
        def step(_, x):
            return x + jax.lax.psum(x * x, "fsdp")

        return jax.lax.fori_loop(0, 3, step, x)

    found = collectives.in_program(program.lower(jnp.ones((8, 16))).compile().as_text())
    # Each device has 2 x 16 numbers of it.
    assert found["all-reduce"] == collectives.Traffic(3, 3 * 2 * 16 * 4)


def test_the_formula_by_hand():
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def leaf(shape, *spec):
        sharding = jax.sharding.NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = {
        "split": leaf((10, 20), None, "fsdp"),
        "both": leaf((10, 20), "fsdp", "tensor"),
        "bias": leaf((6,)),
    }
    found = collectives.of_training_step(params, mesh, parts=3, dtype=jnp.bfloat16, remat=True)
    split, both = 10 * 20 * 2, 10 * 20 * 2 // 2
    assert found["all-gather"].bytes == 2 * 3 * (split + both)
    assert found["reduce-scatter"].bytes == 3 * (split + both)
    assert found["all-reduce"].bytes == 3 * ((split + both) // 2 + 6 * 4)
    alone = build_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(alone, P())
    alone_params = {"w": jax.ShapeDtypeStruct((10, 20), jnp.float32, sharding=sharding)}
    quiet = collectives.of_training_step(
        alone_params, alone, parts=1, dtype=jnp.float32, remat=False
    )
    assert all(t.count == 0 for t in quiet.values())
