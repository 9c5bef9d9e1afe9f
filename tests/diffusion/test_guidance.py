import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.diffusion import gaussian, guidance, samplers
from cascaded_diffusion.diffusion.grids import time_grid
from cascaded_diffusion.diffusion.schedules import make_cosine_schedule

XT, LOGSNR = jnp.full((2, 2, 2, 1), 0.5), jnp.asarray([0.7, 0.7])


def constant(x0):
    """A denoiser that answers `x0`, whatever it is shown."""
    return lambda xt, logsnr: gaussian.prediction_from_output(
        jnp.full_like(xt, x0), xt, logsnr, parameterization="x0"
    )


def fixed(x0):
    """A denoiser that answers the image `x0` [B, H, W, C]."""
    return lambda xt, logsnr: gaussian.prediction_from_output(x0, xt, logsnr, parameterization="x0")


def must_not_run(xt, logsnr):
    raise AssertionError


def test_guidance_extrapolates_both_forms_and_costs_nothing_at_one():
    unguided = guidance.classifier_free(constant(0.2), must_not_run, 1.0)
    np.testing.assert_array_equal(unguided(XT, LOGSNR).x0, np.float32(0.2))
    guided = guidance.classifier_free(constant(0.2), constant(0.1), 3.0)(XT, LOGSNR)
    np.testing.assert_allclose(guided.x0, 0.4, atol=1e-6)
    # x0 and eps still describe the same xt.
    np.testing.assert_allclose(gaussian.diffuse(guided.x0, LOGSNR, guided.eps), XT, atol=1e-6)


def test_scale_zero_is_the_unconditional_network():
    guided = guidance.classifier_free(constant(0.2), constant(0.1), 0.0)(XT, LOGSNR)
    np.testing.assert_allclose(guided.x0, 0.1, atol=1e-6)


def test_the_learned_variance_is_the_conditional_networks():
    def with_fraction(x0):
        return lambda xt, logsnr: gaussian.prediction_from_output(
            jnp.concatenate([jnp.full_like(xt, x0)] * 2, axis=-1),
            xt,
            logsnr,
            parameterization="x0",
        )

    guided = guidance.classifier_free(with_fraction(0.2), with_fraction(0.1), 3.0)(XT, LOGSNR)
    np.testing.assert_allclose(guided.variance_fraction, 0.6)


def test_guidance_is_inside_its_interval_alone():
    guided = jax.jit(
        guidance.classifier_free(constant(0.2), constant(0.1), 3.0, logsnr_range=(-1.0, 1.0))
    )
    for logsnr, expected in ((-1.5, 0.2), (-1.0, 0.4), (0.0, 0.4), (1.0, 0.4), (1.5, 0.2)):
        got = guided(XT, jnp.full((2,), logsnr))
        np.testing.assert_allclose(got.x0, expected, atol=1e-6)
        eps = constant(expected)(XT, jnp.full((2,), logsnr)).eps
        np.testing.assert_allclose(got.eps, eps, atol=1e-6)


def test_the_unconditional_network_never_runs_outside_the_interval():
    schedule = make_cosine_schedule(offset=0.008)
    times = time_grid("uniform", 10, schedule=schedule, discrete_timesteps=None)
    visited = []

    def unconditional(xt, logsnr):
        jax.debug.callback(lambda level: visited.append(float(level)), logsnr[0])
        return constant(0.1)(xt, logsnr)

    guided = guidance.classifier_free(
        constant(0.2), unconditional, 3.0, logsnr_range=(schedule(0.65), schedule(0.35))
    )
    keys = jax.random.split(jax.random.key(0), 2)
    jax.jit(
        lambda xt: samplers.sample(
            guided,
            xt,
            keys,
            schedule=schedule,
            step=samplers.make_step("ddim", eta=0.0),
            times=times,
        )
    )(XT)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(visited), schedule(np.asarray([0.6, 0.5, 0.4])), atol=1e-4)


def test_no_threshold_is_the_denoiser_itself():
    assert guidance.with_threshold(must_not_run, "none") is must_not_run


def _wild_images():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 8, 8, 1)).astype(np.float32)
    images[0] *= 0.1  # already in range
    images[2] *= 5
    return images


def test_static_threshold_clips():
    x0 = _wild_images()
    np.testing.assert_array_equal(guidance.static_threshold(x0), np.minimum(np.maximum(x0, -1), 1))


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_is_imagens(percentile):
    x0 = _wild_images()
    expected = []
    for image in x0:
        s = max(1.0, np.percentile(np.abs(image.astype(np.float64)), 100 * percentile))
        expected.append(np.clip(image, -s, s) / s)
    got = guidance.dynamic_threshold(jnp.asarray(x0), percentile)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_array_equal(got[0], x0[0])  # an image in range stays as it is
    assert np.abs(got).max() <= 1.0


@pytest.mark.parametrize(("kind", "percentile"), [("static", None), ("dynamic", 0.9)])
def test_thresholded_eps_agrees_with_x0_and_xt(kind, percentile):
    x0, logsnr = _wild_images(), jnp.asarray([-3.0, 0.0, 3.0])
    xt = jax.random.normal(jax.random.key(0), x0.shape)
    got = guidance.with_threshold(fixed(x0), kind, percentile)(xt, logsnr)
    expected = (
        guidance.static_threshold(x0)
        if kind == "static"
        else guidance.dynamic_threshold(jnp.asarray(x0), percentile)
    )
    np.testing.assert_array_equal(got.x0, expected)
    np.testing.assert_allclose(gaussian.diffuse(got.x0, logsnr, got.eps), xt, atol=1e-5)


def test_thresholding_comes_after_guidance():
    guided = guidance.classifier_free(constant(0.8), constant(0.1), 3.0)
    got = guidance.with_threshold(guided, "static")(XT, LOGSNR)
    np.testing.assert_array_equal(got.x0, 1.0)
