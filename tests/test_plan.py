"""What the models of the paper cost, counted without allocating them."""

import json

import jax
import jax.numpy as jnp
import pytest

from cascaded_diffusion import plan
from cascaded_diffusion.networks.flops import count_flops
from tests.tiny import ROOT


def _plan(capsys, name, *flags):
    assert plan.main(["prog", f"--config={ROOT}/configs/{name}.py", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


# Billions of parameters, G multiply-adds of one evaluation, evaluations of one sample: counts
# from the published hyperparameters, the lower of each range with strided convolutions, the
# upper with BigGAN's resampling blocks.
PAPER = {
    "base32": ((0.79, 0.83), (71, 76), 4000),
    "sr64": ((0.718, 0.752), (233, 252), 4000),
    "sr128": ((0.54, 0.58), (240, 274), 100),
    "sr256": ((0.59, 0.63), (772, 880), 100),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_their_size(name, capsys):
    billions, multiply_adds, calls = PAPER[name]
    found = _plan(capsys, name)
    assert billions[0] <= found["parameters"] / 1e9 <= billions[1]
    assert multiply_adds[0] - 0.5 <= found["flops_per_image"] / 2e9 <= multiply_adds[1] + 0.5
    assert found["calls_per_sample"] == calls
    assert found["flops_per_sample"] == found["flops_per_image"] * calls
    # Parameters, EMA, and Adam's two moments in float32.
    assert found["state_bytes"] == 16 * found["parameters"]


def test_a_cascade_is_the_sum_of_its_stages(capsys):
    found = _plan(capsys, "mnist_cascade32")
    assert [s["name"] for s in found["stages"]] == ["base16", "sr32"]
    keys = ("parameters", "flops_per_image", "calls_per_sample", "flops_per_sample")
    for key in (*keys, "training_flops"):
        assert found[key] == sum(stage[key] for stage in found["stages"])
    # Guidance evaluates the network twice; Heun's method but for the last step too.
    assert [s["calls_per_sample"] for s in found["stages"]] == [20, 8]
    base = {"name": "heun", "num_steps": 10, "grid": "uniform", "guidance_scale": 1.0}
    base |= {"guidance_interval": (0.0, 1.0), "threshold": "static"}
    heun = _plan(capsys, "mnist_cascade32", f"--config.cascade.samplers=({base}, {base})")
    assert [s["calls_per_sample"] for s in heun["stages"]] == [19, 19]
    half = {**base, "name": "dpmpp_2m", "guidance_scale": 2.0, "guidance_interval": (0.0, 0.5)}
    some = _plan(capsys, "mnist_cascade32", f"--config.cascade.samplers=({half}, {base})")
    assert some["stages"][0]["calls_per_sample"] == 15


def test_a_truncated_chain_is_counted_as_far_as_it_runs(capsys):
    found = _plan(capsys, "cascade64")
    # Stopped at step 501 of 4000.
    assert [s["calls_per_sample"] for s in found["stages"]] == [3499, 4000]
    whole = _plan(capsys, "cascade64", "--config.cascade.truncated=False")
    assert [s["calls_per_sample"] for s in whole["stages"]] == [4000, 4000]


def test_the_table_is_for_people(capsys):
    plan.main(["prog", f"--config={ROOT}/configs/mnist_cascade32.py"])
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["stage", "base16", "sr32", "mnist_cascade32"]
    assert "evaluations per sample" in out


def test_flops_are_two_per_multiply_add():
    x, w = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert count_flops(conv, x, w) == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    a, b = jnp.zeros((4, 6, 7)), jnp.zeros((4, 7, 9))
    assert count_flops(jax.jit(jnp.matmul), a, b) == 2 * 4 * 6 * 9 * 7
    assert count_flops(lambda x: jax.nn.gelu(x), x) == 0
