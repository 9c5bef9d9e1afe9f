"""Collectives read off programs that are written by hand and by compilers."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cascaded_diffusion.planning.collectives import KINDS, Traffic
from tests.planning.program_collectives import in_program


def _found(hlo):
    """Those that there are: kind -> (count, bytes)."""
    traffic = in_program(hlo)
    assert set(traffic) == set(KINDS)
    return {kind: (t.count, t.bytes) for kind, t in traffic.items() if t != Traffic()}


def _program(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    entry = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    return f"HloModule jit_f, num_partitions=8\n{before}\n{entry}"


@pytest.mark.parametrize("groups", ["{{0},{1},{2}}", "[8,1]<=[8]"])
def test_what_a_device_would_send_itself_is_not_counted(groups):
    line = f"ROOT %r.1 = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to=%s"
    assert _found(_program(line)) == {}
    several = line.replace(groups, "[4,2]<=[8]")
    assert _found(_program(several)) == {"all-reduce": (1, 32)}


def test_a_program_without_any():
    assert _found(_program("ROOT %add.1 = f32[8]{0} add(%p, %p)")) == {}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        # What an all-gather makes.
        (
            "%a = f32[64]{0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}",
            {"all-gather": (1, 256)},
        ),
        (
            "%a = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p), replica_groups=[2,4]<=[8]",
            {"all-gather": (1, 2 * 4 * 8 * 128)},
        ),
        ("ROOT a = f32[64] all-gather(p), dimensions={0}", {"all-gather": (1, 256)}),
        # What an all-reduce takes is what it makes; several arrays are one collective.
        ("%r = f32[3,3,4]{2,1,0} all-reduce(%p), to_apply=%add", {"all-reduce": (1, 144)}),
        (
            "%r = (f32[8]{0}, bf16[4,2]{1,0}, /*index=2*/f32[]) all-reduce(%p, %q, %s)",
            {"all-reduce": (1, 32 + 16 + 4)},
        ),
        ("%r = pred[7]{0} all-reduce(%p), to_apply=%or", {"all-reduce": (1, 7)}),
        ("%r = f8e4m3fn[16]{0} all-reduce(%p)", {"all-reduce": (1, 16)}),
        ("%r = s4[16]{0} all-reduce(%p)", {"all-reduce": (1, 8)}),
        # What a reduce-scatter takes is what it makes times the devices of a group.
        (
            "%s = f32[8]{0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}",
            {"reduce-scatter": (1, 4 * 32)},
        ),
        (
            "%s = f32[8]{0} reduce-scatter(%p), replica_groups=[4,2]<=[8]",
            {"reduce-scatter": (1, 64)},
        ),
        (
            "%s = f32[8]{0} reduce-scatter(%p), replica_groups=mesh['a'=2,'b'=2,'c'=2],"
            " device_ids=([2,2,2]T(1,0,2)) {'a','c'}, use_global_device_ids=true",
            {"reduce-scatter": (1, 4 * 32)},
        ),
        ("%t = f32[4,2]{1,0} all-to-all(%p), replica_groups={{0,1}}", {"all-to-all": (1, 32)}),
        (
            "%c = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
            {"collective-permute": (1, 32)},
        ),
    ],
)
def test_one_collective(line, found):
    assert _found(_program("%p = f32[8]{0} parameter(0)", line)) == found


GROUPS = "replica_groups={{0,1,2,3}}"


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (
            f"(f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%p), {GROUPS}",
            {"all-gather": (1, 128)},
        ),
        (
            "((f32[8]{0}, bf16[4]{0}), (f32[32]{0}, bf16[16]{0}))"
            f" all-gather-start(%p, %q), {GROUPS}",
            {"all-gather": (1, 128 + 32)},
        ),
        (f"f32[8]{{0}} all-reduce-start(%p), {GROUPS}", {"all-reduce": (1, 32)}),
        (
            f"(f32[8]{{0}}, f32[2]{{0}}) all-reduce-start(%p, %q), {GROUPS}",
            {"all-reduce": (1, 40)},
        ),
        (
            f"((f32[32]{{0}}), f32[8]{{0}}) reduce-scatter-start(%p), {GROUPS}",
            {"reduce-scatter": (1, 128)},
        ),
        (
            "(f32[2,4]{1,0:T(8,128)S(1)}, f32[2,4]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)})"
            " collective-permute-start(%p), source_target_pairs={{0,1}}",
            {"collective-permute": (1, 32)},
        ),
        (
            f"((f32[8]{{0}}), f32[8]{{0}}, u32[]) all-to-all-start(%p), {GROUPS}",
            {"all-to-all": (1, 32)},
        ),
    ],
)
def test_what_starts_and_ends_is_one_collective(start, found):
    kind = next(iter(found))
    end = f"%e = f32[8]{{0}} {kind}-done(%s), metadata={{}}"
    assert _found(_program(f"%s = {start}", "%x = f32[8]{0} add(%p, %p)", end)) == found


def test_names_and_remarks_are_no_collectives():
    program = _program(
        '%x = f32[8]{0} add(%p, %p), metadata={op_name="jit(f)/all-reduce"}',
        "%g = f32[8]{0} get-tuple-element(%all-reduce.360), index=0",
        '%all-gather.3 = f32[8]{0} copy(%p), frontend_attributes={name="all-gather-start"}',
    )
    assert _found(program) == {}


def _body(name, *lines):
    inside = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (s: (s32[], f32[8])) -> (s32[], f32[8]) {{\n{inside}\n}}\n\n"


def _while(body, trips, name="w"):
    known = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips else ""
    return f"%{name} = (s32[], f32[8]{{0}}) while(%tuple.1), condition=%cond, body=%{body}{known}"


REDUCE = "%r = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add"


def test_loops_count_as_often_as_they_run():
    before = _body("body", REDUCE, "%g = f32[16]{0} all-gather(%p), dimensions={0}")
    program = _program(REDUCE, _while("body", 5), before=before)
    assert _found(program) == {"all-reduce": (6, 6 * 32), "all-gather": (5, 5 * 64)}


def test_loops_in_loops_multiply():
    before = _body("inner", REDUCE) + _body("outer", _while("inner", 3), REDUCE)
    program = _program(_while("outer", 7), _while("inner", 2, name="w2"), before=before)
    assert _found(program) == {"all-reduce": (7 * 4 + 2, (7 * 4 + 2) * 32)}


def test_a_loop_that_does_not_say_how_often_is_refused():
    before = _body("body", REDUCE)
    with pytest.raises(
        ValueError, match="a loop with collectives that does not say how often: .*%w"
    ):
        _found(_program(_while("body", None), before=before))
    # Unless nothing is sent in it.
    assert _found(_program(_while("body", None), before=_body("body", "%x = f32[] add(%p)"))) == {}


def _counted(limit="constant(9)", first="constant(2)", direction="LT"):
    """A loop as the TPU's compiler writes it: its counter tells, through a copy."""
    before = _body("body", REDUCE) + _body(
        "cond",
        f"%limit = s32[]{{:T(128)}} {limit}, metadata={{}}",
        "%s = (f32[8]{0}, s32[]{:T(128)}) parameter(0)",
        "%counter = s32[]{:T(128)} get-tuple-element(%s), index=1",
        f"ROOT %lt = pred[]{{:T(512)}} compare(%counter, %limit), direction={direction}",
    )
    return _program(
        f"%first.1 = s32[]{{:T(128)}} {first}",
        "%copied = s32[]{:T(128)} copy(%first.1), backend_config={}",
        "%tuple.1 = (f32[8]{0}, s32[]{:T(128)}) tuple(%p, /*index=1*/%copied)",
        _while("body", None),
        before=before,
    )


def test_a_loops_counter_tells_how_often_it_runs():
    assert _found(_counted()) == {"all-reduce": (7, 7 * 32)}
    assert _found(_counted(first="constant(0)")) == {"all-reduce": (9, 9 * 32)}
    for unclear in (
        _counted(limit="parameter(1)"),
        _counted(first="parameter(1)"),
        _counted(direction="GT"),
    ):
        with pytest.raises(ValueError, match="how often"):
            _found(unclear)


def test_calls_are_followed_and_fusions_are_not():
    before = _body("called", REDUCE) + _body("fused", REDUCE)
    program = _program(
        "%c = f32[8]{0} call(%p), to_apply=%called",
        "%f = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused",
        "%d = f32[] reduce(%p, %zero), dimensions={0}, to_apply=%fused",
        before=before,
    )
    assert _found(program) == {"all-reduce": (1, 32)}


def test_the_tpus_reduce_scatter_is_a_fusion_of_an_all_reduce_and_slices():
    before = _body(
        "all-reduce-scatter.5.clone",
        "%r = (f32[32]{0}, f32[64]{0}) all-reduce(%p, %q), replica_groups={{0,1}}, to_apply=%add",
        "%g = f32[32]{0} get-tuple-element(%r), index=0",
        "%d = f32[16]{0} dynamic-slice(%g, %i), dynamic_slice_sizes={16}",
    )
    fusion = (
        "(f32[16]{0}, f32[32]{0}) fusion(%p, %q), kind=kCustom, calls=%all-reduce-scatter.5.clone"
    )
    before += _body("body", f"%f = {fusion}, backend_config={{}}")
    assert _found(_program(_while("body", 3), before=before)) == {
        "reduce-scatter": (3, 3 * (128 + 256))
    }


def test_a_reduce_scatter_of_no_groups_is_refused():
    with pytest.raises(ValueError, match="among how many"):
        _found(_program("%s = f32[8]{0} reduce-scatter(%p), replica_groups={}, to_apply=%add"))


def _compiled(f, mesh, size=64):
    spec = PartitionSpec("x")
    x = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=NamedSharding(mesh, spec))
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    return jax.jit(mapped(f, in_specs=spec, out_specs=spec)).lower(x).compile().as_text()


def test_programs_that_jax_compiles():
    mesh = jax.make_mesh((8,), ("x",))

    def all_of_them(i, x):  # on each device 8 of 64 numbers
        whole = jax.lax.all_gather(x, "x", tiled=True)
        mine = jax.lax.psum_scatter(jnp.sin(whole) * i, "x", tiled=True)
        swapped = jax.lax.all_to_all(jnp.cos(x), "x", 0, 0, tiled=True)
        passed = jax.lax.ppermute(jnp.exp(x), "x", [(i, (i + 1) % 8) for i in range(8)])
        return mine + swapped + passed + jax.lax.psum(x * x, "x")

    once = {
        "all-gather": (1, 256),
        "reduce-scatter": (1, 256),
        "all-reduce": (1, 32),
        "all-to-all": (1, 32),
        "collective-permute": (1, 32),
    }
    assert _found(_compiled(lambda x: all_of_them(2.0, x), mesh)) == once
    looped = _compiled(lambda x: jax.lax.fori_loop(0, 5, all_of_them, x), mesh)
    assert _found(looped) == {kind: (5 * n, 5 * size) for kind, (n, size) in once.items()}

    def nested(x):
        def reduce(_, x):
            return jax.lax.psum(jnp.cos(x), "x") * 0.1

        return jax.lax.fori_loop(1, 4, lambda _, x: jax.lax.fori_loop(0, 2, reduce, x), x)

    assert _found(_compiled(nested, mesh)) == {"all-reduce": (6, 6 * 32)}

    def endless(x):
        return jax.lax.while_loop(lambda x: x[0] < 9.0, lambda x: jax.lax.psum(x + 1.0, "x"), x)

    with pytest.raises(ValueError, match="how often"):
        _found(_compiled(endless, mesh))
