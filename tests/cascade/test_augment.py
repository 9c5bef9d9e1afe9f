import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from cascaded_diffusion.cascade import augment as lib
from cascaded_diffusion.cascade.pixels import quantized
from cascaded_diffusion.diffusion import gaussian
from cascaded_diffusion.diffusion.schedules import make_cosine_schedule

SCHEDULE = make_cosine_schedule(offset=0.008)
GAUSSIAN = lib.GaussianAugment(schedule=SCHEDULE, num_timesteps=None, max_level=1.0)
BLUR = lib.BlurAugment(kernel_size=3, sigmas=(0.4, 0.6), prob=0.5)


def _low_res(batch=4, size=16):
    return quantized(jax.random.uniform(jax.random.key(0), (batch, size, size, 1), minval=-1))


def _damage(level, noise):
    return lib.Damage(aug_level=level, logsnr=SCHEDULE(level), noise=noise)


def test_noise_is_the_forward_process_at_low_resolution():
    low_res = _low_res()
    noise = jax.random.normal(jax.random.key(1), low_res.shape)
    level = jnp.asarray([0.1, 0.3, 0.6, 1.0])
    cond = lib.condition(low_res, _damage(level, noise), label=jnp.arange(4))
    np.testing.assert_array_equal(cond.low_res, gaussian.diffuse(low_res, SCHEDULE(level), noise))
    assert cond.low_res.shape == low_res.shape  # damaged before it is enlarged
    np.testing.assert_array_equal(cond.aug_level, level)
    np.testing.assert_array_equal(cond.label, np.arange(4))


def test_the_input_has_the_pixel_values_of_a_stored_image():
    raw = jax.random.uniform(jax.random.key(0), (4, 16, 16, 1), minval=-1.2, maxval=1.2)
    stored = np.clip(np.rint((np.asarray(raw) + 1) * 127.5), 0, 255) / 127.5 - 1
    for damage in (lib.Damage(), _damage(jnp.zeros(4), jnp.ones_like(raw))):
        cond = lib.condition(raw, damage, label=None)
        np.testing.assert_allclose(cond.low_res, stored, atol=1e-6)


def test_a_truncated_image_is_neither_noised_nor_rounded():
    raw = 3 * jax.random.normal(jax.random.key(0), (4, 16, 16, 1))
    damage = _damage(jnp.full(4, 0.4), None)
    cond = lib.condition(raw, damage, label=None, already_noisy=True)
    np.testing.assert_array_equal(cond.low_res, raw)
    np.testing.assert_array_equal(cond.aug_level, jnp.full(4, 0.4))


def test_at_level_zero_truncated_or_not_makes_no_difference():
    raw = jax.random.normal(jax.random.key(0), (4, 16, 16, 1))
    a, b = (
        lib.condition(raw, _damage(jnp.zeros(4), raw), label=None, already_noisy=noisy).low_res
        for noisy in (False, True)
    )
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_timesteps", [None, 10])
@pytest.mark.parametrize("max_level", [1.0, 0.5])
def test_training_levels_are_uniform_and_differ_between_examples(num_timesteps, max_level):
    augment = lib.GaussianAugment(
        schedule=SCHEDULE, num_timesteps=num_timesteps, max_level=max_level
    )
    damage = augment.for_training(jax.random.key(0), (4000, 2, 2, 1))
    levels = np.asarray(damage.aug_level)
    assert levels.min() > 0  # the paper's U{1..T}: no level 0
    assert levels.max() <= max_level
    mean = max_level / 2 if num_timesteps is None else (max_level + 0.1) / 2
    assert abs(levels.mean() - mean) < 0.02
    if num_timesteps is None:
        assert len(np.unique(levels)) > 3900
    else:
        np.testing.assert_allclose(np.unique(levels), np.arange(1, 10 * max_level + 1) / 10)
    np.testing.assert_array_equal(damage.logsnr, SCHEDULE(damage.aug_level))
    assert abs(float(jnp.corrcoef(damage.aug_level, damage.noise[:, 0, 0, 0])[0, 1])) < 0.05


def test_discrete_levels_are_rounded_to_steps_that_were_trained():
    augment = lib.GaussianAugment(schedule=SCHEDULE, num_timesteps=8, max_level=1.0)
    keys = jax.random.split(jax.random.key(0), 3)
    damage = augment.for_sampling(keys, (3, 4, 4, 1), 0.2)
    np.testing.assert_array_equal(damage.aug_level, 0.25)


def test_blur_is_a_gaussian_of_a_known_width():
    image = np.asarray(_low_res(batch=3, size=12))
    sigma = np.asarray([0.4, 0.6, 1.1])
    weights = lib.gaussian_weights(jnp.asarray(sigma), 3)
    blurred = lib.blur(image, weights)
    for i in range(3):
        kernel = np.exp(-0.5 * (np.arange(-1, 2) / sigma[i]) ** 2)
        kernel /= kernel.sum()
        expected = ndimage.correlate(
            image[i, :, :, 0].astype(np.float64), np.outer(kernel, kernel), mode="nearest"
        )
        np.testing.assert_allclose(blurred[i, :, :, 0], expected, atol=1e-6)
    five = lib.blur(image, lib.gaussian_weights(jnp.asarray(sigma), 5))
    assert np.abs(five - blurred).max() > 1e-3


def test_half_of_the_training_examples_are_blurred_and_the_others_not_at_all():
    low_res = _low_res(batch=2000, size=4)
    damage = BLUR.for_training(jax.random.key(0), low_res.shape)
    cond = lib.condition(low_res, damage, label=None)
    touched = np.abs(np.asarray(cond.low_res - low_res)).max((1, 2, 3)) > 0
    assert abs(touched.mean() - 0.5) < 0.04
    side = np.asarray(damage.blur_weights)[touched, 0]
    low, high = (w / (1 + 2 * w) for w in np.exp(-0.5 / np.square([0.4, 0.6])))
    assert low < side.min() < low + 0.01
    assert high - 0.01 < side.max() < high
    assert cond.aug_level is None


@pytest.mark.parametrize("augment", [lib.NoAugment(), BLUR])
def test_nothing_is_damaged_when_sampling_without_levels(augment):
    low_res, keys = _low_res(), jax.random.split(jax.random.key(0), 4)
    damage = augment.for_sampling(keys, low_res.shape, None)
    cond = lib.condition(low_res, damage, label=None)
    np.testing.assert_array_equal(cond.low_res, low_res)
    assert cond.aug_level is None
    with pytest.raises(ValueError, match="without Gaussian conditioning augmentation"):
        lib.condition(low_res, damage, label=None, already_noisy=True)


def test_noise_of_sampling_belongs_to_the_image():
    keys = jax.random.split(jax.random.key(0), 4)
    whole = GAUSSIAN.for_sampling(keys, (4, 8, 8, 1), 0.3)
    part = GAUSSIAN.for_sampling(keys[1:3], (2, 8, 8, 1), 0.3)
    np.testing.assert_array_equal(whole.noise[1:3], part.noise)


def test_a_reflected_border_is_that_of_scipy():
    image = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 6, 1)), jnp.float32)
    weights = lib.gaussian_weights(jnp.asarray([0.8]), 5)
    for border, mode in (("edge", "nearest"), ("reflect", "mirror")):
        expected = np.asarray(image[0, :, :, 0], np.float64)
        for axis in (0, 1):
            expected = ndimage.correlate1d(expected, np.asarray(weights[0]), axis, mode=mode)
        blurred = lib.blur(image, weights, border)[0, :, :, 0]
        np.testing.assert_allclose(blurred, expected, atol=1e-6)
