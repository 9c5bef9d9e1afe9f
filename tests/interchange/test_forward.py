"""Networks with other code bases' weights compute what they compute there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.diffusion import samplers
from cascaded_diffusion.interchange import names
from cascaded_diffusion.interchange.importing import params_from
from cascaded_diffusion.networks.classifier import flatten_params, unflatten_params
from cascaded_diffusion.types import Conditioning
from tests.interchange import reference
from tests.tiny import config_values, with_overrides

BY_HEAD = dataclasses.replace(names.GUIDED_DIFFUSION, qkv_by_head=True)
SIN_FIRST = dataclasses.replace(names.DIFFUSERS, cos_first=False)
TINY = {
    "stage.num_classes": 5,
    "stage.network.channels": 32,
    "stage.network.channel_mults": (1, 2),
    "stage.network.num_res_blocks": (1, 1),
    "stage.network.attention_resolutions": (8,),
    "stage.network.dropout_rate": 0.0,
    "stage.schedule.num_timesteps": 1000,
}
FIXED = {
    "stage.diffusion.variance": "fixed",
    "stage.diffusion.loss": "simple",
    "stage.diffusion.vlb_weight": None,
    "stage.sampler.variance": "small",
}
UNCONDITIONAL = {
    "stage.num_classes": 0,
    "stage.network.null_label": None,
    "eval.features": "rotation",
}


def heads(number):
    return {"stage.network.num_heads": number, "stage.network.num_head_channels": None}


def adm(**settings):
    return reference.Guided(
        **{
            "size": 16,
            "channels": 32,
            "mults": (1, 2),
            "attention": (8,),
            "classes": 5,
            **settings,
        }
    )


def diffusers(**settings):
    return reference.Diffusers(
        **{"size": 16, "widths": (32, 64), "attention": (8,), "classes": 5, **settings}
    )


# A config, what is changed in it, the network there, how it is named.
CASES = {
    "ADM 64": (
        "adm_base64",
        {"stage.network.num_head_channels": 16},
        adm(head_channels=16, new_order=True),
        names.GUIDED_DIFFUSION,
    ),
    "ADM 128": ("adm_base128", {"stage.resolution": 16}, adm(heads=4), BY_HEAD),
    "ADM 256, without classes": (
        "adm_base256",
        {"stage.resolution": 16, "stage.network.num_head_channels": 16, **UNCONDITIONAL},
        adm(head_channels=16, classes=None),
        BY_HEAD,
    ),
    "ADM 512": (
        "adm_base512",
        {
            "stage.resolution": 16,
            "stage.network.channels": 64,
            "stage.network.channel_mults": (0.5, 1),
            "stage.network.num_head_channels": 16,
        },
        adm(channels=64, mults=(0.5, 1), head_channels=16),
        BY_HEAD,
    ),
    "ADM's upsampler": (
        "adm_sr256",
        {"stage.resolution": 16, "stage.low_res_resolution": 4},
        adm(heads=4),
        BY_HEAD,
    ),
    "Improved DDPM": (
        "iddpm_base64",
        {"stage.schedule.num_timesteps": 4000},
        adm(heads=4, updown=False),
        BY_HEAD,
    ),
    "Improved DDPM, scaled steps, added embedding, fixed variance": (
        "iddpm_base64",
        {
            "stage.schedule.num_timesteps": 4000,
            "stage.network.noise_input": "scaled_step_index",
            "stage.network.scale_shift": False,
            **heads(1),
            **FIXED,
        },
        adm(heads=1, updown=False, scale_shift=False, outputs=3),
        BY_HEAD,
    ),
    "diffusers": (
        "iddpm_base64",
        {"stage.network.scale_shift": False, **heads(None), **FIXED}
        | {"stage.network.num_head_channels": 8},
        diffusers(),
        names.DIFFUSERS,
    ),
    "diffusers, sines first, wide heads, without classes": (
        "iddpm_base64",
        {"stage.network.scale_shift": False, **heads(None), **FIXED, **UNCONDITIONAL}
        | {"stage.network.num_head_channels": 16},
        diffusers(head_channels=16, flip_sin_to_cos=False, classes=None),
        SIN_FIRST,
    ),
    "diffusers, DDPM's own details, one head": (
        "iddpm_base64",
        {"stage.network.scale_shift": False, **heads(1), **FIXED, **UNCONDITIONAL}
        | {"stage.network.ddpm_details": True},
        diffusers(
            **{"head_channels": 64, "classes": None, "flip_sin_to_cos": False},
            **{"freq_shift": 1, "norm_eps": 1e-6, "downsample_padding": 0},
        ),
        SIN_FIRST,
    ),
}


def case(name):
    """A stage, its parameters, the network there, its tensors, and inputs for both."""
    config, changes, network, family = CASES[name]
    changes = {**TINY, **changes}
    stage = run_config_from(with_overrides(config_values(config), changes)).stage
    rng, tensors = np.random.default_rng(1), reference.Tensors()
    x = rng.standard_normal((2, 3, 16, 16))
    labels = np.array([1, 4]) if stage.num_classes else None
    low_res = None
    if stage.low_res_resolution is not None:
        pixels = rng.integers(256, size=(2, 3, *[stage.low_res_resolution] * 2))
        low_res = pixels / 127.5 - 1
    network(tensors, x, [0, 0], labels, low_res)  # draws them
    params = unflatten_params(params_from(tensors, family, stage))
    return build_stage(stage), params, network, tensors, (x, labels, low_res)


def nhwc(x):
    return None if x is None else jnp.asarray(x.transpose(0, 2, 3, 1), jnp.float32)


@pytest.mark.parametrize("name", CASES)
def test_a_network_computes_what_it_does_there(name):
    stage, params, network, tensors, (x, labels, low_res) = case(name)
    num_timesteps = stage.config.schedule.num_timesteps
    apply = jax.jit(stage.network.apply)
    cond = Conditioning(
        label=None if labels is None else jnp.asarray(labels), low_res=nhwc(low_res)
    )
    for steps in ([0, 7], [num_timesteps // 2, num_timesteps - 1]):
        t = (np.array(steps) + 1) / num_timesteps
        ours = apply(params, nhwc(x), stage.schedule(jnp.asarray(t)), cond)
        scale = 1000 / num_timesteps if "scaled steps" in name else 1
        theirs = network(tensors, x, np.array(steps) * scale, labels, low_res)
        assert np.abs(theirs).mean() > 0.1
        np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_weights_come_back_as_they_were(name):
    *_, family = CASES[name]
    stage, params, _, tensors, _ = case(name)
    found = {}
    for translated in names.translations(family, stage.config, stage.shapes()[0]):
        ours = flatten_params(params)[translated.path]
        found.update(zip(translated.names, translated.to_theirs(ours), strict=True))
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == np.float32
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("ADM 64", {"name": "ancestral", "grid": "respaced", "variance": "learned"}),
        ("ADM's upsampler", {"name": "ddim", "grid": "ddim_respaced", "eta": 0.0}),
    ],
)
def test_a_chain_is_that_of_guided_diffusion(name, sampler):
    stage, params, network, tensors, (_, labels, low_res) = case(name)
    ddim = sampler["name"] == "ddim"
    settings = {"variance": None, "eta": None, **sampler, "num_steps": 25}
    settings = dataclasses.replace(stage.config.sampler, **settings)
    keys = jax.random.split(jax.random.key(3), 2)
    ours = jax.jit(stage.sample, static_argnames="sampler")(
        params, keys, label=jnp.asarray(labels), low_res=nhwc(low_res), sampler=settings
    )
    shape = (16, 16, 3)
    xt_keys, step_keys = (samplers.fold_in_each(keys, n) for n in range(2))
    drawn = [samplers.normal_per_image(xt_keys, shape)]
    drawn += [
        samplers.normal_per_image(samplers.fold_in_each(step_keys, i), shape) for i in range(25)
    ]
    first, *noises = (np.asarray(z, np.float64).transpose(0, 3, 1, 2) for z in drawn)
    used = np.arange(0, 1000, 40) if ddim else np.round(np.linspace(0, 999, 25)).astype(int)
    betas = reference.linear_betas(1000) if ddim else reference.cosine_betas(1000)

    def predict(x, step):
        output = network(tensors, x, [step, step], labels, low_res)
        return output[:, :3] if ddim else output

    theirs = reference.respaced_chain(
        predict, betas, used, first, noises, learned=not ddim, ddim=ddim
    )
    np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=1e-3)
