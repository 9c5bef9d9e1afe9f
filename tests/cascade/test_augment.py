import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.cascade.augment import GaussianAugment, NoAugment, low_res_noise
from cascaded_diffusion.diffusion import gaussian
from cascaded_diffusion.diffusion.schedules import make_cosine_schedule

SCHEDULE = make_cosine_schedule()
AUGMENT = GaussianAugment(schedule=SCHEDULE, num_timesteps=None)


def _low_res(batch=4):
    return jax.random.uniform(jax.random.key(0), (batch, 16, 16, 1), minval=-1)


def test_noise_is_the_forward_process_at_low_resolution():
    low_res = _low_res()
    noise = jax.random.normal(jax.random.key(1), low_res.shape)
    level = jnp.asarray([0.1, 0.3, 0.6, 1.0])
    cond = AUGMENT.condition(low_res, level, noise, label=jnp.arange(4))
    np.testing.assert_array_equal(cond.low_res, gaussian.diffuse(low_res, SCHEDULE(level), noise))
    assert cond.low_res.shape == low_res.shape  # damaged before it is enlarged
    np.testing.assert_array_equal(cond.aug_level, level)
    np.testing.assert_array_equal(cond.label, np.arange(4))


def test_level_zero_leaves_the_image_as_it_is():
    low_res = _low_res()
    noise = jnp.ones_like(low_res)
    cond = AUGMENT.condition(low_res, jnp.zeros(4), noise, label=None)
    np.testing.assert_array_equal(cond.low_res, low_res)


def test_a_truncated_image_is_not_noised_twice():
    low_res = _low_res()
    cond = AUGMENT.condition(low_res, jnp.full(4, 0.4), None, label=None, already_noisy=True)
    np.testing.assert_array_equal(cond.low_res, low_res)
    np.testing.assert_array_equal(cond.aug_level, jnp.full(4, 0.4))


@pytest.mark.parametrize("num_timesteps", [None, 10])
def test_training_levels_are_uniform_and_differ_between_examples(num_timesteps):
    augment = GaussianAugment(schedule=SCHEDULE, num_timesteps=num_timesteps)
    levels = np.asarray(augment.training_level(jax.random.key(0), 4000))
    assert levels.min() > 0  # the paper's U{1..T}: no level 0
    assert levels.max() <= 1
    assert abs(levels.mean() - (0.5 if num_timesteps is None else 0.55)) < 0.02
    assert len(np.unique(levels)) == (10 if num_timesteps else 4000)


def test_no_augmentation_has_no_level():
    low_res = _low_res()
    augment = NoAugment()
    cond = augment.condition(
        low_res, augment.training_level(jax.random.key(0), 4), None, label=None
    )
    np.testing.assert_array_equal(cond.low_res, low_res)
    assert cond.aug_level is None
    with pytest.raises(ValueError, match="without conditioning augmentation"):
        augment.condition(low_res, jnp.zeros(4), None, label=None)


def test_noise_of_sampling_belongs_to_the_image():
    keys = jax.random.split(jax.random.key(0), 4)
    low_res = _low_res()
    noise = low_res_noise(keys, low_res)
    np.testing.assert_array_equal(noise[1:3], low_res_noise(keys[1:3], low_res[1:3]))
