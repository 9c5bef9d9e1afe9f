"""Any mesh, any way of computing it: the same model. And what goes over the wires."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.data.loader import build_stream, iterate
from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages
from cascaded_diffusion.evaluation.samples.sample_sources import shrunk
from cascaded_diffusion.networks import layers, unet
from cascaded_diffusion.networks.conditioning import ConditionalNetwork
from cascaded_diffusion.networks.kernels import sums, winograd
from cascaded_diffusion.networks.kernels.platforms import traced_for
from cascaded_diffusion.planning import collectives
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime import sharding
from cascaded_diffusion.training import step
from cascaded_diffusion.training.recorder import GridSampler
from tests.one_layer import in_place_of_the_unet
from tests.planning.program_collectives import in_program
from tests.tiny import random_source, round_trip, smallest_base, smallest_efficient, smallest_sr

SOURCE = random_source(64)
STEPS = 20


class OneBlock(ConditionalNetwork):
    """Each layer that a mesh divides, once: what is between them compiles for seconds."""

    @nn.compact
    def __call__(self, xt, logsnr, cond, rows=None):
        h, embedding = self.prepare(xt, logsnr, cond)
        h = layers.Conv3x3(self.channels, self.dtype, name="conv_in")(h.astype(self.dtype))
        h = self.constrain_sharding(h)
        h = self.res_block(h, embedding, rows, self.channels, "up0_block0")
        h = self.attention_block(h, "up0_block0_attention")
        return layers.image_out(h, self.out_channels, self.dtype)


def _mesh(data=1, fsdp=1, tensor=1):
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return mesh_lib.build_mesh(config, jax.devices()[: data * fsdp * tensor])


def _compiled(config, mesh):
    stage = build_stage(config.stage)
    abstract = step.abstract_state(stage, config.train, mesh)
    compiled = step.compile_train_step(stage, config.train, mesh, abstract, SOURCE.image_shape)
    return stage, abstract, compiled


def _curve(config, mesh):
    """Loss and gradient norm of the first steps, and the state after them."""
    stage, _, compiled = _compiled(config, mesh)
    state = step.init_state(stage, config.train, mesh)
    stream = build_stream(SOURCE, config.data, global_batch_size=config.train.batch_size)
    curve = []
    for batch in itertools.islice(iterate(stream, SOURCE, config.data, start_step=0), STEPS):
        state, metrics = compiled(state, mesh_lib.global_batch(batch, mesh))
        curve.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.asarray(curve), state


# An Efficient U-Net is trained where there are fewer examples than devices.
_KINDS = {"base": (smallest_base, OneBlock), "sr": (smallest_sr, unet.UNet)}
# With dropout, for its mask to be the same as well.
_OVERRIDES = dict(
    train__train_steps=STEPS,
    train__warmup_steps=2,
    train__batch_size=32,
    stage__network__dropout_rate=0.1,
    stage__network__num_heads=1,
    stage__network__channels=24,
)


def _curve_of(kind, mesh, **overrides):
    make, network = _KINDS[kind]
    with in_place_of_the_unet(network):
        return _curve(round_trip(make(**_OVERRIDES), **overrides), mesh)


@pytest.fixture(scope="module")
def alone():
    """The curves of one device, at once and nothing computed twice, as a function of the kind."""
    return functools.cache(lambda kind: _curve_of(kind, _mesh())[0])


EVERYTHING = {"train.remat": "everything"}
SOME = {"train.remat": "resolutions", "train.remat_resolutions": (8,)}
PARTS = {"train.accumulation_steps": 4}


@pytest.mark.parametrize(
    ("kind", "mesh", "overrides"),
    [
        ("base", dict(), PARTS | EVERYTHING),
        ("base", dict(data=8), {}),
        ("base", dict(data=8), PARTS),
        ("base", dict(data=2, fsdp=4), SOME),
        ("base", dict(fsdp=8), PARTS | EVERYTHING),
        ("base", dict(data=2, fsdp=2, tensor=2), {}),
        ("base", dict(data=2, fsdp=2, tensor=2), PARTS | EVERYTHING),
        ("sr", dict(data=2, fsdp=4), PARTS | EVERYTHING),
        ("sr", dict(data=2, fsdp=2, tensor=2), {}),
    ],
    ids=lambda value: (
        "-".join(f"{k.split('.')[-1]}{v}" for k, v in value.items())
        if isinstance(value, dict)
        else value
    ),
)
def test_every_mesh_trains_the_same_model(alone, kind, mesh, overrides):
    expected = alone(kind)
    assert len(set(expected[:, 0])) == STEPS
    mesh = _mesh(**mesh)
    overrides = {k.replace(".", "__"): v for k, v in overrides.items()}
    curve, state = _curve_of(kind, mesh, **overrides)
    np.testing.assert_allclose(curve, expected, rtol=1e-5)
    # Parameters and the optimizer's moments are stored split, and stay so.
    name = "up0_block0"
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for array in (
        state.params[name]["conv0"]["kernel"],
        state.opt_state[1][0].mu[name]["conv0"]["kernel"],
    ):
        shard = array.addressable_shards[0].data
        assert shard.size * split == array.size


@pytest.mark.parametrize(
    ("kind", "platform", "overrides"),
    [("sr", "gpu", {}), ("base", "tpu", {"stage__network__channels": winograd._MIN_CHANNELS})],
)
def test_every_platforms_kernels_train_the_same_model(alone, kind, platform, overrides):
    # In float32 all of them run on a CPU, which has kernels of its own for nearly everything.
    expected = _curve_of(kind, _mesh(), **overrides)[0] if overrides else alone(kind)
    with traced_for(platform):
        curve, _ = _curve_of(kind, _mesh(), **overrides)
    assert not np.array_equal(curve, expected)
    np.testing.assert_allclose(curve, expected, rtol=1e-5)


def test_a_bfloat16_step_sends_what_the_formula_says():
    # But for what the CPU's compiler widens: it has no bfloat16 collectives, so bytes are of
    # float32, and counts are compared.
    config = smallest_sr(stage__network__dtype="bfloat16", stage__network__channels=32)
    mesh = _mesh(data=2, fsdp=4)
    _, abstract, compiled = _compiled(config, mesh)
    sent = in_program(compiled.as_text())
    expected = collectives.of_training_step(
        abstract.params, mesh, parts=1, dtype=jnp.bfloat16, remat=False
    )
    assert sent["all-gather"].count == expected["all-gather"].count
    assert expected["all-gather"].bytes <= sent["all-gather"].bytes
    assert sent["all-gather"].bytes <= 2 * expected["all-gather"].bytes


def test_fewer_examples_than_devices_are_split_by_rows():
    # A batch of 4 on 8 devices, and the Efficient U-Net, whose layers at full size stride over
    # the rows.
    config = smallest_efficient(**{**_OVERRIDES, "train__batch_size": 4})
    expected, _ = _curve(config, _mesh())
    mesh = _mesh(data=2, fsdp=2, tensor=2)
    curve, _ = _curve(config, mesh)
    np.testing.assert_allclose(curve, expected, rtol=1e-5)
    constrain = sharding.make_sharding_constraint(mesh, batch_size=4)
    specs = [
        jax.jit(constrain).lower(jnp.zeros((4, size, size, 8))).compile().output_shardings.spec
        for size in (32, 16, 8)
    ]
    assert [spec[1] if len(spec) > 1 else None for spec in specs] == ["tensor", "tensor", None]
    assert sharding.make_sharding_constraint(_mesh(), batch_size=4) is None


def test_parameters_are_stored_by_rules_over_paths_and_shapes():
    mesh = _mesh(data=2, fsdp=2, tensor=2)
    shapes = {
        "down0_block0": {
            "conv0": {"kernel": (3, 3, 64, 64), "bias": (64,)},
            "conv1": {"kernel": (3, 3, 64, 64)},
        },
        "middle_block0": {
            "conv0": {"kernel": (3, 3, 256, 256), "bias": (256,)},
            "norm1": {"scale": (256,)},
            "conv1": {"kernel": (3, 3, 256, 256), "bias": (256,)},
        },
        "odd": {"kernel": (3, 3, 512, 3)},
    }
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    specs = jax.tree.map(lambda s: tuple(s.spec), sharding.state_shardings(tree, mesh))
    assert specs == {
        "down0_block0": {  # not among the widest
            "conv0": {"kernel": (None, None, None, "fsdp"), "bias": ()},
            "conv1": {"kernel": (None, None, None, "fsdp")},
        },
        "middle_block0": {
            "conv0": {"kernel": (None, None, "fsdp", "tensor"), "bias": ("tensor",)},
            "norm1": {"scale": ("tensor",)},
            "conv1": {"kernel": (None, None, "tensor", "fsdp"), "bias": ()},
        },
        "odd": {"kernel": (None, None, "fsdp")},
    }
    # The optimizer's moments lie below other names, and are split alike.
    nested = sharding.state_shardings({"opt_state": (tree, tree)}, mesh)
    assert jax.tree.leaves(nested["opt_state"][1]) == jax.tree.leaves(
        sharding.state_shardings(tree, mesh)
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_what_the_fsdp_step_sends_is_what_the_formula_says(parts, monkeypatch):
    # A CPU's own convolutions and 1x1 kernels have gradients of another shape, which its
    # compiler sums over the devices in another order; an accelerator's are meant.
    monkeypatch.setattr(winograd, "pays", lambda x, kernel: False)
    monkeypatch.setattr(sums, "_kernel_gradient", lambda x, dy: jnp.einsum("bhwc,bhwk->ck", x, dy))
    config = smallest_base(
        stage__network__channels=32, train__accumulation_steps=parts, train__train_steps=30
    )
    mesh = _mesh(data=2, fsdp=4)
    _, abstract, compiled = _compiled(config, mesh)
    # Stored split, and nothing of it replicated in the output.
    for want, got in zip(
        jax.tree.leaves(abstract), jax.tree.leaves(compiled.output_shardings[0]), strict=True
    ):
        assert got.is_equivalent_to(want.sharding, want.ndim)
    large = [x for x in jax.tree.leaves(abstract.params) if x.size >= sharding.MIN_SHARDED_SIZE]
    assert large
    assert all("fsdp" in x.sharding.spec for x in large)

    sent = in_program(compiled.as_text())
    expected = collectives.of_training_step(
        abstract.params, mesh, parts=parts, dtype=jnp.float32, remat=False
    )
    # The CPU's compiler sees that all parts gather the same, and does it once; ...
    assert sent["all-gather"].bytes == expected["all-gather"].bytes / parts
    assert sent["all-gather"].bytes == 4 * sum(x.size for x in large)
    # ... and it has no reduce-scatter: over `fsdp` a gradient is summed whole and then sliced.
    gradients = expected["reduce-scatter"].bytes + expected["all-reduce"].bytes
    small = [x for x in jax.tree.leaves(abstract.params) if "fsdp" not in x.sharding.spec]
    by_hand = parts * 4 * (sum(x.size for x in large) * (1 + 1 / 4) + sum(x.size for x in small))
    assert gradients == by_hand
    # Besides it sends some scalars, the loss and the parts of the gradient's norm.
    assert gradients < sent["all-reduce"].bytes < gradients + 1024


def test_a_grid_is_sampled_on_devices_that_do_not_divide_it():
    # 40 images on 6 devices, parameters split.
    config, mesh = smallest_sr(), _mesh(data=3, fsdp=2)
    stage = build_stage(config.stage)
    shapes = step.abstract_state(stage, config.train, mesh)
    init = jax.jit(stage.init, out_shardings=jax.tree.map(lambda x: x.sharding, shapes.params))
    raw = SOURCE.raw
    examples = {"image": raw.images[:40], "label": raw.labels[:40]}
    params = init(jax.random.key(0))
    picture = GridSampler(step.stage_for_sampling(stage, mesh), config, mesh, examples)(params)
    alone = GridSampler(stage, config, _mesh(), examples)(jax.device_get(params))
    assert np.abs(picture.astype(int) - alone).max() <= 2
    # Where low-res images are stored, they are what is enlarged.
    derived = shrunk(LabelledImages(examples["image"], examples["label"]), 16).images
    # Initial parameters enlarge all alike.
    params = jax.tree.map(lambda x: x + 0.02, jax.device_get(params))
    alone = GridSampler(stage, config, _mesh(), examples)(params)
    for low_res, same in ((derived, True), (255 - derived, False)):
        stored = GridSampler(stage, config, _mesh(), {**examples, "low_res": low_res})
        assert (stored(params) == alone).all() == same
