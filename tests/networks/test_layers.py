"""The layers that a CPU computes in its own way, against the plain one."""

import types
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cascaded_diffusion.networks.flops import count_flops
from cascaded_diffusion.networks.kernels import attention as attention_lib
from cascaded_diffusion.networks.kernels.attention import attention, splash
from cascaded_diffusion.networks.kernels.platforms import traced_for
from cascaded_diffusion.networks.kernels.sums import (
    add_to_pixels,
    multiply_pixels,
    sum_pixel_pairs,
    sum_pixels,
)
from cascaded_diffusion.networks.layers import AttentionBlock, Conv1x1, ResBlock, concat_skip
from cascaded_diffusion.runtime import sharding


def _qkv(shape, scale=1.0, dtype=jnp.float32):
    draw = np.random.default_rng(0).standard_normal
    return [jnp.asarray(scale * draw(shape), jnp.float32).astype(dtype) for _ in range(4)]


@cache
def _with_gradients(f):
    """(q, k, v, dy) -> what `f` makes of the first three, and their gradients: one program."""

    @jax.jit
    def run(q, k, v, dy):
        y, back = jax.vjp(f, q, k, v)
        return y, *back(dy)

    return run


def _plain(q, k, v):
    scores = np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshc->bthc", weights, v)


# At a scale of 30 scores are thousands, rounded to 1e-4, and exp overflows without its shift.
@pytest.mark.parametrize(("scale", "atol"), [(1.0, 1e-5), (30.0, 3e-3)])
def test_attention_is_the_softmax_of_the_scores(scale, atol):
    q, k, v, _ = _qkv((2, 12, 3, 8), scale)
    exact = _plain(*(np.asarray(x, np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(jax.jit(attention)(q, k, v), exact, atol=atol)


# 12 pixels are one short slice of a reduction, 96 are three.
@pytest.mark.parametrize("pixels", [12, 96])
@pytest.mark.parametrize(("scale", "atol"), [(1.0, 2e-6), (30.0, 2e-2)])
def test_the_gradient_of_attention_is_that_of_jax(pixels, scale, atol):
    q, k, v, dy = _qkv((2, pixels, 3, 8))
    q, k = scale * q, scale * k
    functions = attention, jax.nn.dot_product_attention
    (_, *ours), (_, *theirs) = (_with_gradients(f)(q, k, v, dy) for f in functions)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def _rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


# The square root of 16 is exact in bfloat16, that of 32 is not.
@pytest.mark.parametrize("channels", [16, 32])
def test_the_gradient_of_attention_in_bfloat16_sums_in_float32(channels):
    q, k, v, dy = _qkv((1, 256, 1, channels), dtype=jnp.bfloat16)
    ours = jax.vjp(attention, q, k, v)[1](dy)
    _, *exact = _with_gradients(attention)(*(x.astype(jnp.float32) for x in (q, k, v, dy)))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        # Weights, scores' gradients and results are rounded to 8 bits, sums of them are not.
        assert _rms(a.astype(jnp.float32) - b) < 0.004 * _rms(b)


def test_attention_in_bfloat16_sums_in_float32():
    q, k, v, _ = _qkv((1, 256, 1, 16), dtype=jnp.bfloat16)
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = _plain(*(np.asarray(x, np.float64) for x in (q, k, v)))
    # Weights and result are rounded to 8 bits, sums of 256 of them are not.
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2e-3)


def _gpus(monkeypatch, version, *capabilities):
    client = types.SimpleNamespace(platform_version=version)
    gpus = [
        types.SimpleNamespace(platform="gpu", client=client, compute_capability=capability)
        for capability in capabilities
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: gpus)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention_lib._cudnn_takes.cache_clear()


@pytest.mark.parametrize(
    ("version", "capabilities", "taken"),
    [
        ("cuda 13000", ("9.0",), (128, 144, 256)),
        ("cuda 13000", ("10.0", "8.0"), (128,)),
        ("rocm 70000", ("gfx942",), ()),
    ],
)
def test_heads_that_a_gpus_attention_does_not_take_are_named_once(
    version, capabilities, taken, monkeypatch, caplog
):
    _gpus(monkeypatch, version, *capabilities)
    for _ in range(2):
        for channels in (128, 144, 256):
            expected = channels in taken
            assert attention_lib._cudnn_takes(channels, jnp.dtype("bfloat16")) == expected
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 - len(taken)
    assert all("channels in bfloat16 is computed by XLA: cuDNN's takes" in line for line in lines)
    assert not attention_lib._cudnn_takes(64, jnp.dtype("float32"))
    assert not attention_lib._cudnn_takes(60, jnp.dtype("bfloat16"))
    attention_lib._cudnn_takes.cache_clear()


@pytest.mark.parametrize(("platform", "by_heads"), [("cpu", True), ("tpu", False)])
def test_only_a_cpu_attends_head_by_head(platform, by_heads):
    q, k, v, _ = _qkv((2, 16, 2, 8))
    with traced_for(platform):
        # A function of its own: JAX keeps what it has traced of another.
        traced = jax.jit(lambda *qkv: attention(*qkv)).trace(q, k, v)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == 2
    # Its scores are a batch of 2 examples x 2 heads.
    assert ("tensor<4x16x16xf32>" in text) == by_heads


def test_flops_of_attention_do_not_depend_on_its_form():
    q, k, v, _ = _qkv((2, 16, 2, 8))
    # Two products of 16 x 16 scores with 8 channels, of four heads in all.
    assert count_flops(attention, q, k, v) == 2 * (2 * 2) * 2 * 16 * 16 * 8


def test_a_1x1_convolution_is_a_dense_layer():
    x, *_ = _qkv((2, 6, 4, 8))
    ours, theirs = Conv1x1(5, jnp.float32), nn.Dense(5)
    params = theirs.init(jax.random.key(1), x)["params"] | {"bias": jnp.arange(5.0)}
    found, exact = (
        jax.jit(
            jax.value_and_grad(lambda p, x, m=m: (m.apply({"params": p}, x) ** 2).sum(), (0, 1))
        )(params, x)
        for m in (ours, theirs)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, exact)


# Kernels with more rows than columns and the other way round: the smaller factor goes first.
@pytest.mark.parametrize("channels", [5, 11])
# Results in bfloat16 are rounded to 8 bits; a sum over 64 examples in it would lose twice as much.
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2.5e-3)])
def test_the_gradient_of_a_product_of_pixels(channels, dtype, limit):
    x, _, dy, _ = _qkv((64, 6, 16, 8), dtype=dtype)
    kernel, dy = x[0, 0, :channels].T, dy[..., :1] * jnp.arange(1, channels + 1, dtype=dtype)
    y, back = jax.vjp(multiply_pixels, x, kernel)
    assert y.dtype == dtype
    wide = [np.asarray(value, np.float64) for value in (x, kernel, dy)]
    exact = (wide[2] @ wide[1].T, np.einsum("bhwc,bhwk->ck", wide[0], wide[2]))
    for found, gradient in zip(back(dy), exact, strict=True):
        assert found.dtype == dtype
        assert _rms(np.asarray(found, np.float64) - gradient) < limit * _rms(gradient)


def test_an_attention_block_has_the_parameters_it_always_had():
    init, x = AttentionBlock(num_heads=2).init, jnp.zeros((1, 4, 4, 8))
    variables = jax.eval_shape(init, jax.random.key(0), x)
    shapes = jax.tree.map(lambda leaf: leaf.shape, variables["params"])
    assert shapes == {
        "norm": {"scale": (8,), "bias": (8,)},
        "qkv": {"kernel": (8, 24), "bias": (24,)},
        "out": {"kernel": (8, 8), "bias": (8,)},
    }


def test_a_1x1_convolution_of_rows_over_devices_stays_there():
    # A feature map split by example and by row: nothing of it is sent.
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))
    x = jnp.ones((4, 16, 16, 8))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", "tensor"), ()))
    layer = Conv1x1(4, jnp.float32)
    params = layer.init(jax.random.key(0), x)
    apply = jax.jit(layer.apply, in_shardings=(whole, rows), out_shardings=rows)
    assert "all-gather" not in apply.lower(params, x).compile().as_text()

    def gradient(kernel, x, dy):
        return jax.vjp(multiply_pixels, x, kernel)[1](dy)

    back = jax.jit(gradient, in_shardings=(whole, rows, rows), out_shardings=(rows, whole))
    text = back.lower(params["params"]["kernel"], x, jnp.ones((4, 16, 16, 4))).compile().as_text()
    assert "all-gather" not in text
    # The kernel's gradient is a sum over all of them.
    assert "all-reduce" in text


@pytest.mark.parametrize("shape", [(2, 6, 4, 8), (1, 64, 64, 3), (2, 7, 5, 4), (1, 1, 2048, 2)])
def test_sums_over_pixels(shape):
    x = jnp.asarray(100 + np.random.default_rng(0).standard_normal(shape), jnp.float32)
    exact = np.asarray(x, np.float64).sum((1, 2))
    np.testing.assert_allclose(sum_pixels(x), exact, rtol=2e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_two_sums_over_pixels(platform):
    x, y = _qkv((2, 6, 4, 8))[:2]
    with traced_for(platform):
        found = jax.jit(sum_pixel_pairs)(x, y)
    for total, of in zip(found, (x, y), strict=True):
        np.testing.assert_allclose(total, np.asarray(of, np.float64).sum((1, 2)), atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_shift_of_all_pixels_has_their_sum_as_gradient(platform):
    x, dy, *_ = _qkv((2, 6, 4, 8), dtype=jnp.bfloat16)
    shift = _qkv((2, 8))[2]
    with traced_for(platform):
        y, back = jax.vjp(add_to_pixels, x, shift)
    assert y.dtype == jnp.bfloat16
    dx, dshift = back(dy)
    np.testing.assert_array_equal(dx, dy)
    assert dshift.dtype == jnp.float32
    np.testing.assert_allclose(dshift, np.asarray(dy, np.float64).sum((1, 2)), rtol=1e-5, atol=1e-6)
    with traced_for(platform):  # the same for all examples
        y, back = jax.vjp(add_to_pixels, x, shift[0])
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x + shift[0].astype(jnp.bfloat16))
    dx, dcommon = back(dy)
    np.testing.assert_array_equal(dx, dy)
    assert dcommon.dtype == jnp.float32
    expected = np.asarray(dy, np.float64).sum((0, 1, 2))
    np.testing.assert_allclose(dcommon, expected, rtol=1e-5, atol=1e-6)


def _tpu_text(n, dtype, per_device):
    q = jnp.ones((2, n, 2, 64), dtype)
    with traced_for("tpu"):
        traced = jax.jit(lambda q: attention(q, q, q, per_device)).trace(q)
        return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("n", "dtype", "per_device", "by_blocks"),
    [
        (1024, jnp.bfloat16, lambda f: f, True),
        (256, jnp.bfloat16, lambda f: f, False),  # the paper's models
        (1100, jnp.bfloat16, lambda f: f, False),
        (1024, jnp.float32, lambda f: f, False),
        (1024, jnp.bfloat16, None, False),
    ],
)
def test_on_a_tpu_many_pixels_attend_block_by_block(n, dtype, per_device, by_blocks):
    assert ("tpu_custom_call" in _tpu_text(n, dtype, per_device)) == by_blocks


def test_a_training_step_on_a_tpu_has_all_of_its_kernels():
    block = AttentionBlock(2, jnp.bfloat16, lambda f: f)
    x = jnp.ones((1, 32, 32, 128), jnp.bfloat16)
    with traced_for("tpu"):
        params = jax.eval_shape(block.init, jax.random.key(0), x)
        traced = jax.jit(jax.grad(lambda p: block.apply(p, x).sum())).trace(params)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call(") == 3  # forward, dq, dk and dv


def test_splash_attention_is_attention(monkeypatch):
    monkeypatch.setattr(attention_lib, "_SPLASH_BLOCK", 128)  # two of them
    arrays = _qkv((2, 256, 2, 64))
    ours = _with_gradients(partial(splash, interpret=True))(*arrays)
    theirs = _with_gradients(jax.nn.dot_product_attention)(*arrays)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_splash_attention_of_each_devices_own_examples():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    arrays = _qkv((4, 128, 2, 64))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    divided = sharding.make_per_device(mesh)(partial(splash, interpret=True))
    ours = _with_gradients(divided)(*jax.device_put(tuple(arrays), rows))
    theirs = _with_gradients(jax.nn.dot_product_attention)(*arrays)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("features", [24, 40])  # with a projection of the skip branch, and without
def test_a_block_as_a_gpu_computes_it(features, scale_shift):
    # Feature maps that skip across stay apart, and the norm's gradient is computed twice.
    draw = np.random.default_rng(0).standard_normal
    h, skip = (jnp.float32(draw((2, 8, 8, channels))) for channels in (24, 16))
    embedding, dy = jnp.float32(draw((2, 12))), jnp.float32(draw((2, 8, 8, features)))
    block = ResBlock(features, dropout_rate=0.3, scale_shift=scale_shift)
    joined = jnp.concatenate([h, skip], -1)
    shapes = jax.eval_shape(block.init, jax.random.key(0), joined, embedding)
    variables = jax.tree.map(lambda x: jnp.float32(0.3 * draw(x.shape)), shapes)

    def computed(platform):
        with traced_for(platform):

            def apply(variables, h, skip, embedding):
                parts = concat_skip(h, skip, scale=True)
                assert len(parts) == (2 if platform == "gpu" else 1)
                rngs = {"dropout": jax.random.key(1)}
                return block.apply(variables, parts, embedding, jnp.arange(2), rngs=rngs)

            def both(dy, *args):
                out, back = jax.vjp(apply, *args)
                return out, back(dy)

            return jax.jit(both)(dy, variables, h, skip, embedding)

    found, expected = (jax.tree.leaves(computed(platform)) for platform in ("gpu", "cpu"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
