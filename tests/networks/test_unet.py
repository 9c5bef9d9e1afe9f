import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.networks import conditioning, layers
from cascaded_diffusion.networks.unet import NETWORKS, Network
from cascaded_diffusion.types import Conditioning
from tests.one_layer import OneLayer


def bilinear(x, size):
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "bilinear")


# Half as many blocks as `build` has of itself.
ONE_LEVEL = {"channel_mults": (1,), "num_res_blocks": (1,)}


def build(super_resolution=False, name="unet", **overrides):
    settings = dict(
        out_channels=3,
        num_classes=4,
        channels=8,
        channel_mults=(1, 2),
        num_res_blocks=(1, 1),
        attention_resolutions=(8,),
        num_heads=2,
        aug_level_input=super_resolution,
        upsample=bilinear if super_resolution else None,
    )
    module = {**NETWORKS, "one_layer": OneLayer}[name]
    return Network(module=module(**{**settings, **overrides}))


def inputs(super_resolution=False, batch=2):
    rng = np.random.default_rng(0)
    xt = jnp.asarray(rng.standard_normal((batch, 16, 16, 3), np.float32))
    cond = Conditioning(label=jnp.arange(batch))
    if super_resolution:
        low_res = jnp.asarray(rng.standard_normal((batch, 8, 8, 3), np.float32))
        cond = Conditioning(label=cond.label, low_res=low_res, aug_level=jnp.full((batch,), 0.2))
    return xt, jnp.linspace(-3.0, 3.0, batch), cond


def random_params(init, *args, seed=1):
    """Parameters of the shapes that `init` gives them, drawn by NumPy: nothing is compiled.

    Nothing is left at zero, so that every input reaches the output.
    """
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        noise = rng.standard_normal(shape.shape, np.float32)
        if len(shape.shape) > 1:
            return jnp.asarray(noise * np.float32((0.04 + 1 / math.prod(shape.shape[:-1])) ** 0.5))
        return jnp.asarray(noise * np.float32(0.2) + (path[-1].key == "scale"))

    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def compiled(name):
    """A super-resolution network as one program, parameters and inputs for it."""
    network, args = build(True, name=name), inputs(True)
    return jax.jit(network.apply), random_params(network.init, *args), args


@functools.cache
def compiled_with_dropout():
    """A network of one level that drops half of its numbers: likewise, with four examples."""
    network, args = build(dropout_rate=0.5, **ONE_LEVEL), inputs(batch=4)
    return jax.jit(network.apply), random_params(network.init, *args), args


def outputs_of_blocks(network, params, args):
    """The shapes of what the network's blocks return, by name."""
    _, state = jax.eval_shape(
        lambda p, *a: network.module.apply(
            {"params": p}, *a, capture_intermediates=True, mutable=["intermediates"]
        ),
        params,
        *args,
    )
    blocks = {k: v for k, v in state["intermediates"].items() if isinstance(v, dict)}
    return {name: block["__call__"][0].shape for name, block in blocks.items()}


@pytest.mark.parametrize("super_resolution", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"patch_size": 2, "out_channels": 6},
        {"resample": "pool"},
        {"resample": "biggan"},
        {"num_res_blocks": (2,), "channel_mults": (1,)},
        {"name": "efficient_unet", "out_channels": 6},
        {"name": "efficient_unet", "num_res_blocks": (1, 2)},
    ],
)
def test_output_is_an_image_and_starts_at_zero(super_resolution, overrides):
    network = build(super_resolution, **overrides)
    args = inputs(super_resolution)

    def arbitrary(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.module.name != "norm_out":
            return out
        return np.random.default_rng(0).standard_normal(out.shape, np.float32)

    @jax.jit
    def start(key):
        # The last convolution makes zeros of whatever it is shown. XLA compiles nothing before it.
        with nn.intercept_methods(arbitrary):
            return network.module.init_with_output(key, *args)[0]

    out = start(jax.random.key(0))
    assert out.shape == (*args[0].shape[:-1], overrides.get("out_channels", 3))
    np.testing.assert_array_equal(out, 0.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_input_reaches_the_output(name):
    apply, params, (xt, logsnr, cond) = compiled(name)
    reference = apply(params, xt, logsnr, cond)
    changed = {
        "xt": (xt + 0.1, logsnr, cond),
        "logsnr": (xt, logsnr + 1, cond),
        "label": (
            xt,
            logsnr,
            Conditioning(label=cond.label + 1, low_res=cond.low_res, aug_level=cond.aug_level),
        ),
        "low_res": (
            xt,
            logsnr,
            Conditioning(label=cond.label, low_res=cond.low_res + 0.1, aug_level=cond.aug_level),
        ),
        "aug_level": (
            xt,
            logsnr,
            Conditioning(label=cond.label, low_res=cond.low_res, aug_level=cond.aug_level + 0.3),
        ),
    }
    for changed_input, args in changed.items():
        assert np.abs(apply(params, *args) - reference).max() > 1e-3, changed_input


@pytest.mark.parametrize("name", NETWORKS)
def test_examples_do_not_mix(name):
    apply, params, (xt, logsnr, cond) = compiled(name)
    reference = apply(params, xt, logsnr, cond)
    out = apply(params, xt.at[0].add(1.0), logsnr, cond)
    np.testing.assert_allclose(out[1:], reference[1:], atol=1e-5)
    assert np.abs(out[0] - reference[0]).max() > 1e-3


def test_bfloat16_computes_near_float32_with_float32_parameters():
    apply, params, args = compiled_with_dropout()  # without a key, there is none
    low = build(dtype=jnp.bfloat16, **ONE_LEVEL)
    assert {
        x.dtype for x in jax.tree.leaves(jax.eval_shape(low.init, jax.random.key(0), *args))
    } == {jnp.dtype("float32")}
    full, half = (f(params, *args) for f in (apply, jax.jit(low.apply)))
    assert half.dtype == jnp.float32
    assert 0 < np.abs(full - half).max() < 0.1 * np.abs(full).max()


def test_dropout_only_with_a_key():
    apply, params, args = compiled_with_dropout()
    plain = apply(params, *args)
    np.testing.assert_array_equal(plain, apply(params, *args))
    a, b = (apply(params, *args, dropout_key=jax.random.key(k)) for k in (0, 1))
    assert np.abs(a - b).max() > 1e-3
    assert np.abs(a - plain).max() > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        Conditioning(),
        Conditioning(label=jnp.zeros(2, jnp.int32), low_res=jnp.zeros((2, 8, 8, 3))),
        Conditioning(label=jnp.zeros(2, jnp.int32), aug_level=jnp.zeros(2)),
        Conditioning(label=jnp.zeros(3, jnp.int32)),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(wrong):
    xt, logsnr, _ = inputs()
    with pytest.raises(ValueError):
        jax.eval_shape(build().init, jax.random.key(0), xt, logsnr, wrong)


def test_space_to_depth_is_inverted_and_keeps_neighbours_together():
    x = jnp.arange(2 * 4 * 4 * 3.0).reshape(2, 4, 4, 3)
    packed = layers.space_to_depth(x, 2)
    np.testing.assert_array_equal(packed[0, 0, 1].reshape(2, 2, 3), x[0, 0:2, 2:4])
    np.testing.assert_array_equal(layers.depth_to_space(packed, 2), x)


def test_noise_input_is_the_time_of_the_plain_cosine_schedule_or_alpha():
    t = np.linspace(0.01, 0.99, 50)
    logsnr = jnp.asarray(-2 * np.log(np.tan(np.pi / 2 * t)))
    np.testing.assert_allclose(conditioning.cosine_time(logsnr), t, atol=1e-6)
    alpha = np.cos(np.pi / 2 * t)
    np.testing.assert_allclose(conditioning.noise_level(logsnr), alpha, atol=1e-6)


def test_the_network_is_told_of_the_noise_by_the_input_it_names():
    # logsnr = 0 is the time 1/2 of the cosine schedule, and alpha = 1/2 is logsnr = -log 3.
    xt, _, cond = inputs()
    # One layer's norm takes away a shift of every channel for itself, but not within groups.
    options = {"name": "one_layer", "channels": 12}
    time, level = build(**options), build(**options, noise_input=conditioning.noise_level)
    params = random_params(time.init, xt, jnp.zeros(2), cond)
    np.testing.assert_allclose(
        jax.jit(time.apply)(params, xt, jnp.zeros(2), cond),
        jax.jit(level.apply)(params, xt, jnp.full(2, -math.log(3.0)), cond),
        rtol=1e-3,
        atol=1e-3,
    )


def test_every_level_has_its_own_number_of_blocks():
    params = jax.eval_shape(build(num_res_blocks=(1, 2)).init, jax.random.key(0), *inputs())
    assert {name for name in params if name[:2] in {"do", "up"} and name[-1].isdigit()} == {
        *("down0_block0", "down1_block0", "down1_block1"),
        *("up1_block0", "up1_block1", "up1_block2", "up0_block0", "up0_block1"),
    }
    with pytest.raises(ValueError):
        jax.eval_shape(build(num_res_blocks=(1,)).init, jax.random.key(0), *inputs())


def test_biggan_resampling_is_a_residual_block():
    network, args = build(resample="biggan"), inputs()
    params = jax.eval_shape(network.init, jax.random.key(0), *args)
    shapes = outputs_of_blocks(network, params, args)
    assert shapes["down1_resample"] == (2, 8, 8, 8)
    assert shapes["up1_resample"] == (2, 16, 16, 16)
    for name in ("down1_resample", "up1_resample"):
        assert set(params[name]) == {"norm0", "conv0", "scale_shift", "norm1", "conv1"}


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_resampling_block_resamples_both_branches_before_the_first_convolution(direction):
    plain = {"down": layers.downsample_mean, "up": layers.upsample_nearest}[direction]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 8), np.float32))
    embedding = jnp.ones((2, 16))
    block = layers.ResBlock(8, resample=direction)
    params = jax.jit(block.init)(jax.random.key(1), x, embedding)
    apply = functools.partial(block.apply, capture_intermediates=True, mutable="intermediates")
    out, state = jax.jit(apply)(params, x, embedding)
    # The last convolution starts at zero, so at first the skip branch is all there is.
    np.testing.assert_allclose(out, plain(x), rtol=1e-6)
    captured = {k: v["__call__"][0] for k, v in state["intermediates"].items() if k != "__call__"}
    resampled = plain(captured["norm0"])
    conv0 = params["params"]["conv0"]
    expected = layers.Conv3x3(8, jnp.float32).apply({"params": conv0}, resampled)
    np.testing.assert_allclose(captured["conv0"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "levels"),
    # The deepest level of an Efficient U-Net has no skip.
    [("unet", ONE_LEVEL), ("efficient_unet", {})],
)
def test_scaled_skips_are_divided_by_the_root_of_two(name, levels):
    joined, source = "up0_block0", "down0_block0"
    options = dict(name=name, attention_resolutions=(), **levels)
    params = random_params(build(**options).init, *inputs())

    def run(scale_skips, *args):
        seen = {}

        def spy(next_fun, args, kwargs, context):
            out = next_fun(*args, **kwargs)
            if context.module.name in {joined, source}:
                parts = jax.tree.leaves(args[0])
                seen[context.module.name] = (jnp.concatenate(parts, -1), out)
            return out

        with nn.intercept_methods(spy):
            return build(**options, scale_skips=scale_skips).apply(*args), seen

    # In one program, which computes only once what comes before the skip.
    both = jax.jit(lambda *args: [run(scale_skips, *args) for scale_skips in (False, True)])
    (plain, _), (scaled, _) = found = both(params, *inputs())
    for (_, seen), scale in zip(found, (1.0, 2**-0.5), strict=True):
        _, skip = seen[source]
        together, _ = seen[joined]
        np.testing.assert_allclose(together[..., -skip.shape[-1] :], scale * skip, rtol=1e-6)
    assert np.abs(plain - scaled).max() > 1e-3
