import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.cascade import resize
from cascaded_diffusion.cascade.cascade import Cascade, keys_for
from cascaded_diffusion.cascade.stage import build_stage
from cascaded_diffusion.networks.unet import Network
from cascaded_diffusion.types import Batch
from tests.networks.test_unet import randomized
from tests.tiny import tiny_base, tiny_sr


class Recorder:
    """A network that writes down what it is shown and answers zero."""

    def __init__(self):
        self.calls = []

    def apply(self, params, xt, logsnr, cond, *, dropout_key=None):
        self.calls.append((xt, logsnr, cond))
        return jnp.zeros_like(xt)


def _stage(config):
    stage = build_stage(config.stage)
    params = randomized(jax.jit(stage.init)(jax.random.key(0)))
    return stage, jax.tree.map(lambda x: 0.3 * x, params)


@pytest.fixture(scope="module")
def stages():
    return _stage(tiny_base()), _stage(tiny_sr())


def _batch(resolution=32):
    image = jax.random.uniform(jax.random.key(5), (8, resolution, resolution, 1), minval=-1)
    return Batch(image=image, label=jnp.arange(8))


def test_training_and_sampling_show_the_network_the_same_low_res_input():
    # The bug most reported of cascade trainers: resize, damage or clipping in another
    # order. With the same image, level and noise the conditioning must be the same
    # to the bit.
    stage = build_stage(tiny_sr(stage__diffusion__label_dropout_prob=0.0).stage)
    recorder = Recorder()
    stage = dataclasses.replace(stage, network=recorder)
    batch = _batch()
    stage.loss({}, batch, jax.random.key(3))
    trained = recorder.calls[-1][2]

    low_res = stage.low_res_from(batch.image)
    noise = (
        trained.low_res
        - jnp.sqrt(jax.nn.sigmoid(stage.schedule(trained.aug_level)))[:, None, None, None] * low_res
    )
    assert np.abs(noise).max() > 0.1

    # Sampling one image per level, as the level is one per call there.
    for i in range(3):
        recorder.calls.clear()
        keys = jax.random.split(jax.random.key(i), 8)
        stage_sampled = dataclasses.replace(
            stage, augment=_WithNoise(stage.augment, trained, low_res)
        )
        with jax.disable_jit():
            stage_sampled.sample(
                {}, keys, label=batch.label, low_res=low_res, aug_level=float(trained.aug_level[i])
            )
        sampled = recorder.calls[0][2]
        np.testing.assert_array_equal(sampled.low_res[i], trained.low_res[i])
        assert sampled.aug_level[i] == trained.aug_level[i]
        np.testing.assert_array_equal(sampled.label, trained.label)
        assert (sampled.low_res.dtype, trained.low_res.dtype) == (jnp.float32, jnp.float32)


class _WithNoise:
    """The stage's augmentation with its noise replaced by the one that training drew."""

    has_level = True

    def __init__(self, augment, trained, low_res):
        self._augment = augment
        keys = jax.random.split(jax.random.key(3), 6)
        self._noise = jax.random.normal(keys[3], low_res.shape)

    def condition(self, low_res, aug_level, noise, *, label, already_noisy=False):
        return self._augment.condition(
            low_res, aug_level, self._noise, label=label, already_noisy=already_noisy
        )


def test_low_res_input_is_the_base_models_target():
    # One operator makes the base model's targets and the low-res inputs.
    recorder = Recorder()
    base = dataclasses.replace(build_stage(tiny_base().stage), network=recorder)
    sr = build_stage(tiny_sr().stage)
    batch = _batch()
    base.loss({}, batch, jax.random.key(0))
    _, eps_key, *_ = jax.random.split(jax.random.key(0), 6)
    xt, logsnr, _ = recorder.calls[0]
    eps = jax.random.normal(eps_key, xt.shape)
    alpha2 = jax.nn.sigmoid(logsnr)[:, None, None, None]
    x0 = (xt - jnp.sqrt(1 - alpha2) * eps) / jnp.sqrt(alpha2)
    clear = np.asarray(logsnr) > 0  # elsewhere the division amplifies rounding
    assert clear.any()
    np.testing.assert_allclose(x0[clear], sr.low_res_from(batch.image)[clear], atol=1e-5)
    np.testing.assert_array_equal(sr.low_res_from(batch.image), resize.area_resize(batch.image, 16))


def test_labels_are_dropped_as_often_as_configured():
    recorder = Recorder()
    stage = build_stage(tiny_base(stage__diffusion__label_dropout_prob=0.25).stage)
    stage = dataclasses.replace(stage, network=recorder)
    batch = Batch(image=jnp.zeros((2000, 16, 16, 1)), label=jnp.full(2000, 3))
    stage.loss({}, batch, jax.random.key(0))
    labels = np.asarray(recorder.calls[0][2].label)
    assert set(labels.tolist()) == {3, 10}
    assert abs((labels == 10).mean() - 0.25) < 0.04


def test_loss_of_a_perfect_network_is_zero():
    # The recorder answers zero: with an x0 target and black images that is perfect.
    stage = build_stage(tiny_base(stage__diffusion__parameterization="x0").stage)
    stage = dataclasses.replace(stage, network=Recorder())
    batch = Batch(image=jnp.zeros((4, 32, 32, 1)), label=jnp.arange(4))
    loss, metrics = stage.loss({}, batch, jax.random.key(0))
    assert loss == 0.0
    assert metrics["loss"] == loss


def _cascade(stages, truncated):
    (base, base_params), (sr, sr_params) = stages
    samplers = [
        dataclasses.replace(s.config.sampler, num_steps=3, guidance_scale=1.0) for s in (base, sr)
    ]
    cascade = Cascade(stages=[base, sr], samplers=samplers, truncated=truncated)
    return cascade.make_sampler(), [base_params, sr_params]


@pytest.mark.parametrize("truncated", [False, True])
def test_images_do_not_depend_on_the_batch(stages, truncated):
    sample, params = _cascade(stages, truncated)
    key, labels = jax.random.key(7), jnp.arange(8) % 10
    whole = sample(params, keys_for(key, jnp.arange(8)), labels, [0.2])
    part = sample(params, keys_for(key, jnp.arange(4, 8)), labels[4:], [0.2])
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_allclose(a[4:], b, atol=2e-5)
    assert [x.shape[1] for x in whole] == [16, 32]
    assert np.abs(np.asarray(whole[1][0] - whole[1][1])).max() > 0.01


def test_images_do_not_depend_on_the_devices(stages):
    sample, params = _cascade(stages, truncated=False)
    key, labels = jax.random.key(7), jnp.arange(8) % 10
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    alone = sample(params, keys_for(key, jnp.arange(8)), labels, [0.2])
    indices, labels = jax.device_put((jnp.arange(8), labels), split)
    spread = sample(params, keys_for(key, indices), labels, [0.2])
    assert len(spread[1].sharding.device_set) == 8
    for a, b in zip(alone, spread, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_at_level_zero_truncated_and_non_truncated_are_the_same(stages):
    keys, labels = keys_for(jax.random.key(1), jnp.arange(4)), jnp.arange(4)
    images = []
    for truncated in (False, True):
        sample, params = _cascade(stages, truncated)
        images.append(sample(params, keys, labels, [0.0]))
    for a, b in zip(*images, strict=True):
        np.testing.assert_array_equal(a, b)


def test_truncated_hands_on_a_noisy_image_and_levels_need_no_recompilation(stages):
    sample, params = _cascade(stages, truncated=True)
    keys, labels = keys_for(jax.random.key(1), jnp.arange(4)), jnp.arange(4)
    clean = sample(params, keys, labels, [0.0])[0]
    distance = []
    with jax.log_compiles(False):
        for level in (0.1, 0.4, 0.8):
            images = sample(params, keys, labels, [level])
            distance.append(float(jnp.abs(images[0] - clean).mean()))
            assert np.abs(images[1]).max() <= 1.0  # the last stage always finishes
    assert distance == sorted(distance)
    assert distance[0] > 0


def test_given_images_replace_the_first_stages(stages):
    sample, params = _cascade(stages, truncated=False)
    keys, labels = keys_for(jax.random.key(1), jnp.arange(4)), jnp.arange(4)
    whole = sample(params, keys, labels, [0.2])
    resumed = sample([None, params[1]], keys, labels, [0.2], given=whole[:1])
    np.testing.assert_array_equal(whole[1], resumed[1])


def test_network_is_a_pair_of_pure_functions():
    stage = build_stage(tiny_base().stage)
    assert isinstance(stage.network, Network)
    a, b = (jax.jit(stage.init)(jax.random.key(0)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
