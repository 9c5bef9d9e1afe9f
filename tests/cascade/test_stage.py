import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.cascade.cascade import Cascade, keys_for
from cascaded_diffusion.cascade.pixels import area_downsample, float_from_uint8, uint8_from_float
from cascaded_diffusion.diffusion import gaussian
from cascaded_diffusion.diffusion.samplers import fold_in_each
from cascaded_diffusion.networks.unet import Network
from cascaded_diffusion.types import Batch
from tests.networks.test_unet import random_params
from tests.tiny import smallest_base, smallest_efficient, smallest_sr
from tests.xla import QUICK, compiled_with

# What is tested here surrounds a network; tests/networks are about real ones.
pytestmark = pytest.mark.usefixtures("one_layer")


class Recorder:
    """A network that writes down what it is shown and answers zero."""

    def __init__(self):
        self.calls = []

    def apply(self, params, xt, logsnr, cond, *, dropout_key=None, rows=None):
        self.calls.append((xt, logsnr, cond))
        return jnp.zeros_like(xt)


def _stage(config):
    stage = build_stage(config.stage)
    return stage, jax.tree.map(lambda x: 0.3 * x, random_params(stage.init))


# Its norm is then over groups of three channels. Of 8 channels each would be a group, and the norm
# would take away all that one layer knows of labels and levels.
_GROUPS = {"stage__network__channels": 12}


@pytest.fixture(scope="module")
def cascades(one_layer):
    """By whether it is truncated: a cascade's sampling function and parameters."""
    stages = _stage(smallest_base(**_GROUPS)), _stage(smallest_sr(**_GROUPS))
    return {truncated: _cascade(stages, truncated) for truncated in (False, True)}


def _batch(resolution=32):
    image = jax.random.uniform(jax.random.key(5), (8, resolution, resolution, 1), minval=-1)
    return Batch(image=image, label=jnp.arange(8))


_AUGMENTS = {
    "none": {"stage__augment__name": "none", "stage__augment__max_level": None},
    "gaussian": {},
    "blur": {
        "stage__augment__name": "blur",
        "stage__augment__max_level": None,
        "stage__augment__blur_kernel_size": 3,
        "stage__augment__blur_sigmas": (0.4, 0.6),
        "stage__augment__blur_prob": 0.5,
    },
}


def _sr_with(augment):
    overrides = dict(_AUGMENTS[augment])
    if augment != "gaussian":
        overrides |= {"stage__low_res_schedule": None, "eval__aug_level": 0.0}
    return build_stage(smallest_sr(stage__diffusion__label_dropout_prob=0.0, **overrides).stage)


class _Replayed:
    """The stage's augmentation, whose damage when sampling is what training drew."""

    def __init__(self, augment):
        self._augment = augment

    def for_training(self, key, shape):
        self.damage = self._augment.for_training(key, shape)
        return self.damage

    def for_sampling(self, keys, shape, aug_level):
        return self.damage


@pytest.mark.parametrize("augment", _AUGMENTS)
def test_training_and_sampling_show_the_network_the_same_low_res_input(augment):
    # The bug most reported of cascade trainers: resize, damage, clipping or rounding in
    # another order. With the same image and damage the conditioning must be the same to
    # the bit, whether the image comes from the data, from the stage below as it hands it
    # on, or from a file.
    stage = _sr_with(augment)
    recorder = Recorder()
    stage = dataclasses.replace(stage, network=recorder, augment=_Replayed(stage.augment))
    sampler = dataclasses.replace(stage.config.sampler, num_steps=2)
    batch = _batch()
    stage.loss({}, batch, jax.random.key(3))
    trained = recorder.calls[-1][2]

    handed_on = area_downsample(batch.image, 16)
    stored = float_from_uint8(uint8_from_float(handed_on))
    for low_res in (handed_on, stored, stage.low_res_from(batch.image)):
        recorder.calls.clear()
        keys = jax.random.split(jax.random.key(0), 8)
        with jax.disable_jit():
            stage.sample(
                {}, keys, label=batch.label, low_res=low_res, aug_level=0.3, sampler=sampler
            )
        assert recorder.calls
        for call in recorder.calls:
            sampled = call[2]
            np.testing.assert_array_equal(sampled.low_res, trained.low_res)
            assert sampled.low_res.dtype == trained.low_res.dtype == jnp.float32
            np.testing.assert_array_equal(sampled.label, trained.label)
            if augment == "gaussian":
                np.testing.assert_array_equal(sampled.aug_level, trained.aug_level)
            else:
                assert sampled.aug_level is trained.aug_level is None


def test_blur_is_for_training_alone():
    stage = _sr_with("blur")
    recorder = Recorder()
    stage = dataclasses.replace(stage, network=recorder)
    batch = _batch()
    clean = stage.low_res_from(batch.image)
    stage.loss({}, batch, jax.random.key(0))
    blurred = np.abs(recorder.calls[-1][2].low_res - clean).max((1, 2, 3)) > 0
    assert 0 < blurred.sum() < 8
    with jax.disable_jit():
        stage.sample({}, jax.random.split(jax.random.key(0), 8), label=batch.label, low_res=clean)
    np.testing.assert_array_equal(recorder.calls[-1][2].low_res, clean)


def test_low_res_input_is_the_base_models_target():
    # One operator makes the base model's targets and the low-res inputs.
    base, sr = build_stage(smallest_base().stage), build_stage(smallest_sr().stage)
    batch = _batch()
    np.testing.assert_array_equal(base.target_from(batch.image), sr.low_res_from(batch.image))
    recorder = Recorder()
    base = dataclasses.replace(base, network=recorder)
    base.loss({}, batch, jax.random.key(0))
    _, eps_key, *_ = jax.random.split(jax.random.key(0), 5)
    xt, logsnr, _ = recorder.calls[0]
    eps = jax.random.normal(eps_key, xt.shape)
    expected = gaussian.diffuse(sr.low_res_from(batch.image), logsnr, eps)
    np.testing.assert_array_equal(xt, expected)


def test_labels_are_dropped_as_often_as_configured():
    recorder = Recorder()
    stage = build_stage(smallest_base(stage__diffusion__label_dropout_prob=0.25).stage)
    stage = dataclasses.replace(stage, network=recorder)
    batch = Batch(image=jnp.zeros((2000, 16, 16, 1)), label=jnp.full(2000, 3))

    @jax.jit
    def shown(batch, key):
        stage.loss({}, batch, key)
        return recorder.calls[0][2].label

    labels = np.asarray(shown(batch, jax.random.key(0)))
    assert set(labels.tolist()) == {3, 10}
    assert abs((labels == 10).mean() - 0.25) < 0.04


def test_loss_is_the_error_of_the_configured_target():
    # The recorder answers zero; the nearest pixel value to grey is 1/255 above it.
    stage = build_stage(smallest_base(stage__diffusion__parameterization="x0").stage)
    stage = dataclasses.replace(stage, network=Recorder())
    batch = Batch(image=jnp.zeros((4, 32, 32, 1)), label=jnp.arange(4))
    loss, metrics = jax.jit(stage.loss)({}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, 1 / 255**2, rtol=1e-4)
    assert metrics["loss"] == loss


_DISCRETE = {
    "stage__schedule__num_timesteps": 20,
    "stage__schedule__noise_levels": "discrete",
    "stage__diffusion__variance": "learned",
    "stage__diffusion__parameterization": "eps",
}


class LearnedVariance:
    """A network of two parameters: what it says of the mean, and of the variance."""

    def apply(self, params, xt, logsnr, cond, *, dropout_key=None, rows=None):
        shape = jnp.ones_like(xt)
        return jnp.concatenate([params["mean"] * shape, params["variance"] * shape], -1)


@pytest.mark.parametrize("kind", ["hybrid", "vlb"])
def test_hybrid_loss_is_the_simple_one_and_a_thousandth_of_the_bound(kind):
    config = smallest_base(
        **_DISCRETE,
        stage__diffusion__loss=kind,
        stage__diffusion__vlb_weight=0.001 if kind == "hybrid" else None,
    )
    stage = dataclasses.replace(build_stage(config.stage), network=LearnedVariance())
    params = {"mean": jnp.float32(0.3), "variance": jnp.float32(-0.4)}
    grads, metrics = jax.grad(stage.loss, has_aux=True)(params, _batch(), jax.random.key(0))
    simple, vlb = metrics["loss_simple"], metrics["loss_vlb"]
    expected = simple + 0.001 * vlb if kind == "hybrid" else vlb
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    assert float(vlb) > 0
    assert grads["variance"] != 0
    # The mean is trained by the simple loss alone: d/dm mean((m - eps)^2) = 2 (m - mean(eps)).
    _, eps_key, *_ = jax.random.split(jax.random.key(0), 5)
    eps = jax.random.normal(eps_key, (8, 16, 16, 1))
    of_simple = 2 * (0.3 - eps.mean())
    if kind == "hybrid":
        np.testing.assert_allclose(grads["mean"], of_simple, rtol=1e-4)
    else:
        assert abs(grads["mean"] - of_simple) > 0.1


def test_the_real_network_learns_a_variance_and_samples_with_it():
    config = smallest_efficient(
        **_DISCRETE,
        stage__network__attention_resolutions=(),
        stage__diffusion__loss="hybrid",
        stage__diffusion__vlb_weight=0.001,
        stage__sampler__name="ancestral",
        stage__sampler__variance="learned",
        stage__sampler__eta=None,
        stage__sampler__num_steps=4,
    )
    stage, params = _stage(config)
    loss, _ = jax.jit(stage.loss)(params, _batch(), jax.random.key(0))
    assert np.isfinite(loss)
    keys, labels = keys_for(jax.random.key(1), jnp.arange(4)), jnp.arange(4)
    images = jax.jit(lambda p: stage.sample(p, keys, label=labels))(params)
    assert images.shape == (4, 16, 16, 1)
    assert np.isfinite(images).all()
    bits = jax.jit(
        lambda p: stage.bits_per_dim(
            p, keys, _batch().image[:4], label=labels, sampler=config.stage.sampler
        )
    )(params)
    assert bits.shape == (4,)
    assert np.isfinite(bits).all()


def test_the_bound_is_that_given_the_low_res_image():
    config = smallest_sr(
        stage__sampler__name="ancestral",
        stage__sampler__variance="large",
        stage__sampler__eta=None,
        stage__sampler__num_steps=2,
    )
    stage = build_stage(config.stage)
    # Initial parameters enlarge all alike.
    params = jax.tree.map(lambda x: x + 0.02, jax.jit(stage.init)(jax.random.key(0)))
    image = np.random.default_rng(0).uniform(-1, 1, (4, 32, 32, 1)).astype(np.float32)
    keys, labels = keys_for(jax.random.key(1), jnp.arange(4)), jnp.arange(4)

    @jax.jit
    def bits(low_res):
        return stage.bits_per_dim(
            params, keys, image, label=labels, low_res=low_res, aug_level=0.1,
            sampler=config.stage.sampler,
        )  # fmt: skip

    derived = stage.low_res_from(jnp.asarray(image))
    np.testing.assert_allclose(bits(derived), bits(None), rtol=1e-5)
    assert not np.allclose(bits(-derived), bits(None), rtol=1e-5)


def _cascade(stages, truncated, num_steps=3):
    (base, base_params), (sr, sr_params) = stages
    samplers = [
        dataclasses.replace(s.config.sampler, num_steps=num_steps, guidance_scale=1.0)
        for s in (base, sr)
    ]
    cascade = Cascade(stages=[base, sr], samplers=samplers, truncated=truncated)
    return cascade.sample, [base_params, sr_params]


@pytest.mark.parametrize("truncated", [False, True])
def test_images_do_not_depend_on_the_batch(cascades, truncated):
    sample, params = cascades[truncated]
    key, labels = jax.random.key(7), jnp.arange(8) % 10
    whole = sample(params, keys_for(key, jnp.arange(8)), labels, [0.2])
    part = sample(params, keys_for(key, jnp.arange(4, 8)), labels[4:], [0.2])
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_allclose(a[4:], b, atol=2e-5)
    assert [x.shape[1] for x in whole] == [16, 32]
    assert np.abs(np.asarray(whole[1][0] - whole[1][1])).max() > 0.01


def test_images_do_not_depend_on_the_devices():
    # One of the networks is real: devices divide what its layers compute.
    stages = _stage(smallest_efficient()), _stage(smallest_sr(**_GROUPS))
    sample, params = _cascade(stages, truncated=False)
    key, labels = jax.random.key(7), jnp.arange(8) % 10
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    alone = sample(params, keys_for(key, jnp.arange(8)), labels, [0.2])
    indices, labels = jax.device_put((jnp.arange(8), labels), split)
    spread = sample(params, keys_for(key, indices), labels, [0.2])
    assert len(spread[1].sharding.device_set) == 8
    # Products round by the size of the batch. A pixel between two grey levels may so be handed
    # on as the other, which the next stage shows.
    for a, b, atol in zip(alone, spread, (2e-5, 1e-3), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@compiled_with(QUICK)  # without optimization the two programs round differently
def test_at_level_zero_truncated_and_non_truncated_are_the_same(one_layer):
    stages = _stage(smallest_base(**_GROUPS)), _stage(smallest_sr(**_GROUPS))
    keys, labels = keys_for(jax.random.key(1), jnp.arange(4)), jnp.arange(4)
    images = []
    for truncated in (False, True):
        sample, params = _cascade(stages, truncated, num_steps=2)
        images.append(sample(params, keys, labels, [0.0]))
    for a, b in zip(*images, strict=True):
        np.testing.assert_array_equal(a, b)


def test_truncated_hands_on_a_noisy_image_and_levels_need_no_recompilation(cascades):
    sample, params = cascades[True]
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


def test_given_images_replace_the_first_stages(cascades):
    sample, params = cascades[False]
    keys, labels = keys_for(jax.random.key(1), jnp.arange(4)), jnp.arange(4)
    whole = sample(params, keys, labels, [0.2])
    resumed = sample([None, params[1]], keys, labels, [0.2], given=whole[:1])
    np.testing.assert_array_equal(whole[1], resumed[1])


def test_network_is_a_pair_of_pure_functions():
    stage = build_stage(smallest_base().stage)
    assert isinstance(stage.network, Network)
    a, b = (jax.jit(stage.init)(jax.random.key(0)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _cascade3(truncated):
    """8 -> 16 -> 32 px, the middle stage with and the last without a level."""
    base = smallest_base(stage__resolution=8, data__resolution=32, **_GROUPS).stage
    middle = smallest_sr(
        stage__resolution=16,
        stage__low_res_resolution=8,
        stage__network__patch_size=2,
        **_GROUPS,
    ).stage
    last = _sr_with("blur").config
    stages = [build_stage(config) for config in (base, middle, last)]
    samplers = [
        dataclasses.replace(s.config.sampler, num_steps=3, guidance_scale=1.0) for s in stages
    ]
    return Cascade(stages=stages, samplers=samplers, truncated=truncated)


def test_three_stages_with_a_level_each():
    cascades = {truncated: _cascade3(truncated) for truncated in (False, True)}
    params = [
        jax.tree.map(lambda x: 0.3 * x, random_params(s.init, seed=i))
        for i, s in enumerate(cascades[False].stages)
    ]
    images = {}
    for truncated, levels in (
        (False, (0.2, 0.0)),
        (True, (0.2, 0.0)),
        (False, (0.5, 0.0)),
        (False, (0.0, 0.0)),
        (True, (0.0, 0.0)),
    ):
        keys, labels = keys_for(jax.random.key(1), jnp.arange(4)), jnp.arange(4)
        images[truncated, levels] = cascades[truncated].sample(params, keys, labels, levels)
    for made in images.values():
        assert [x.shape[1] for x in made] == [8, 16, 32]
    plain, cut, strong, clean, cut_at_zero = images.values()
    np.testing.assert_array_equal(plain[0], strong[0])
    assert np.abs(plain[0] - cut[0]).max() > 1e-3  # truncated: still noisy
    assert np.abs(cut[1]).max() <= 1.0  # the last stage has no level: nothing to truncate for
    assert np.abs(plain[1] - strong[1]).max() > 1e-3
    for whole, stopped in zip(clean, cut_at_zero, strict=True):
        np.testing.assert_array_equal(stopped, whole)  # at level 0 both are one


class Optimal:
    """The network that knows its data to be N(0.2, 0.3^2) in every pixel; predicts x0."""

    def apply(self, params, xt, logsnr, cond, *, dropout_key=None, rows=None):
        alpha, sigma = gaussian.alpha_sigma_from_logsnr(gaussian.broadcast_right(logsnr, xt))
        gain = alpha * 0.3**2 / (alpha**2 * 0.3**2 + sigma**2)
        return 0.2 + gain * (xt - alpha * 0.2)


def test_truncated_input_has_the_distribution_of_noised_true_images():
    base, sr = build_stage(smallest_base().stage), build_stage(smallest_sr().stage)
    recorder = Recorder()
    stages = [
        dataclasses.replace(base, network=Optimal()),
        dataclasses.replace(sr, network=recorder),
    ]
    sampler = dataclasses.replace(
        base.config.sampler,
        name="ancestral",
        variance="small",
        eta=None,
        num_steps=200,
        guidance_scale=1.0,
        threshold="none",
    )
    last = dataclasses.replace(sr.config.sampler, num_steps=1)
    keys, labels = keys_for(jax.random.key(1), jnp.arange(40)), jnp.arange(40) % 10
    true = 0.2 + 0.3 * jax.random.normal(jax.random.key(9), (40, 16, 16, 1))
    moments = {}
    for truncated in (False, True):
        cascade = Cascade(stages=stages, samplers=[sampler, last], truncated=truncated)
        given = () if truncated else [true]
        if truncated:
            run = jax.jit(partial(stages[0].sample, {}, sampler=sampler))
            given = [run(fold_in_each(keys, 0), label=labels, stop_t=0.3)]
        with jax.disable_jit():
            cascade.sample([{}, {}], keys, labels, [0.3], given)
        seen = np.asarray(recorder.calls[-1][2].low_res)
        moments[truncated] = (seen.mean(), seen.std())
    alpha2 = float(jax.nn.sigmoid(base.schedule(0.3)))
    expected = (0.2 * alpha2**0.5, (0.3**2 * alpha2 + 1 - alpha2) ** 0.5)
    error = 4 * expected[1] / np.sqrt(true.size)
    for mean, std in moments.values():
        assert abs(mean - expected[0]) < error
        assert abs(std - expected[1]) < error
