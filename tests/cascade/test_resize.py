import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.cascade import pixels


@pytest.mark.parametrize("factor", [2, 4, 5])
def test_area_resize_at_integer_factors_is_the_block_mean(factor):
    image = np.random.default_rng(0).normal(size=(2, 4 * factor, 4 * factor, 3)).astype(np.float32)
    expected = image.reshape(2, 4, factor, 4, factor, 3).mean((2, 4))
    np.testing.assert_allclose(pixels.area_downsample(image, 4), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "out"), [(7, 3), (10, 7), (32, 24)])
def test_area_resize_is_the_integral_over_each_output_pixel(size, out):
    # Each input pixel repeated `out` times makes every output pixel a whole number
    # of repeats: the exact area average, computed the slow way.
    image = np.random.default_rng(1).normal(size=(1, size, size, 1)).astype(np.float32)
    fine = image.repeat(out, 1).repeat(out, 2)
    expected = fine.reshape(1, out, size, out, size, 1).mean((2, 4))
    np.testing.assert_allclose(pixels.area_downsample(image, out), expected, atol=1e-5)


def test_area_resize_keeps_the_mean_and_the_identity():
    image = jnp.asarray(np.random.default_rng(2).normal(size=(1, 12, 12, 1)), jnp.float32)
    np.testing.assert_allclose(pixels.area_downsample(image, 5).mean(), image.mean(), atol=1e-6)
    assert pixels.area_downsample(image, 12) is image
    with pytest.raises(ValueError, match="cannot shrink 12x12 to 13"):
        pixels.area_downsample(image, 13)


@pytest.mark.parametrize("method", pixels.UPSAMPLERS)
def test_upsampling_keeps_constants_and_undoes_under_area(method):
    flat = jnp.full((1, 4, 4, 2), 0.7)
    np.testing.assert_allclose(pixels.UPSAMPLERS[method](flat, (16, 16)), 0.7, atol=1e-6)


def test_uint8_round_trip_and_edges():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(
        pixels.uint8_from_float(pixels.float_from_uint8(jnp.asarray(values))), values
    )
    edges = jnp.asarray([-2.0, -1.0, 0.0, 1.0, 2.0])
    np.testing.assert_array_equal(pixels.uint8_from_float(edges), [0, 0, 128, 255, 255])
