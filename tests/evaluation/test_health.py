import numpy as np
import pytest

from cascaded_diffusion.evaluation import health
from cascaded_diffusion.evaluation.metrics.pixel_statistics import PixelStatistics
from cascaded_diffusion.evaluation.samples.sample_sources import LevelSource

RNG = np.random.default_rng(0)
LOW_RES = RNG.integers(0, 246, (5, 4, 4, 3), np.uint8)
ENLARGED = LOW_RES.repeat(2, axis=1).repeat(2, axis=2)


def test_an_enlargement_that_keeps_its_input_is_met_exactly():
    errors = health.low_res_errors(ENLARGED, LOW_RES)
    np.testing.assert_allclose(errors, 0, atol=1e-6)
    assert health.psnr(0.0) == pytest.approx(10 * np.log10(255**2 * 12))


def test_psnr_is_of_the_shrunk_image():
    shifted = ENLARGED + np.arange(5, dtype=np.uint8)[:, None, None, None]
    errors = health.low_res_errors(shifted, LOW_RES)
    np.testing.assert_allclose(errors, np.arange(5) ** 2, atol=1e-3)
    assert health.psnr(errors.mean()) == pytest.approx(10 * np.log10(255**2 / 6), abs=1e-3)
    assert health.psnr(errors.max()) == pytest.approx(10 * np.log10(255**2 / 16), abs=1e-3)
    # Detail that averages out costs nothing.
    detail = ENLARGED.copy()
    detail[:, ::2, ::2] += 4
    detail[:, 1::2, 1::2] -= np.minimum(4, detail[:, 1::2, 1::2])
    kept = LOW_RES.min((1, 2, 3)) >= 4
    np.testing.assert_allclose(health.low_res_errors(detail, LOW_RES)[kept], 0, atol=1e-6)


def test_drift_is_in_grey_levels_per_channel():
    samples = ENLARGED.astype(float)
    samples[..., 1] += 3
    moved = PixelStatistics.of(samples.astype(np.uint8))
    drift = health.drift(moved, PixelStatistics.of(ENLARGED))
    np.testing.assert_allclose(drift["channel_mean_drift"], [0, 3, 0], atol=1e-9)
    np.testing.assert_allclose(drift["channel_std_drift"], 0, atol=1e-9)
    wide = health.drift(PixelStatistics.of(ENLARGED // 2 * 2), PixelStatistics.of(ENLARGED // 2))
    np.testing.assert_allclose(wide["channel_std_drift"], (ENLARGED // 2).std((0, 1, 2)), rtol=1e-9)


def test_the_response_to_the_level_is_measured_against_the_first():
    source = LevelSource(LOW_RES, lambda params, level: ENLARGED + np.uint8(10 * level))
    response, images = health.response(source, None, [0.0, 0.3, 0.9])
    np.testing.assert_array_equal(images[2], ENLARGED + np.uint8(9))
    assert response["aug_levels"] == [0.0, 0.3, 0.9]
    np.testing.assert_allclose(response["change"], [0, 3, 9])
    np.testing.assert_allclose(
        response["psnr_low_res"],
        [health.psnr(0.0), *(20 * np.log10(255 / np.array([3, 9])))],
        rtol=1e-6,
    )
