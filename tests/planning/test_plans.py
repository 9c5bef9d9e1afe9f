"""What a run costs on a slice, before it is paid for."""

import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import pytest

from cascaded_diffusion import plan
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.stage_cost import stage_cost
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.planning import fit, plans, step_cost
from cascaded_diffusion.planning.topologies import parse_topology
from cascaded_diffusion.runtime.accelerators import ACCELERATORS
from tests.tiny import ROOT, config_values, tiny_base


def _plan(capsys, name, topology, *flags, expected=0):
    file, _, variant = name.partition(":")
    config = f"{ROOT}/configs/{file}.py" + (f":{variant}" if variant else "")
    argv = ["prog", f"--config={config}", f"--topology={topology}", "--json"]
    assert plan.main([*argv, "--nocompile", *flags]) == expected
    return json.loads(capsys.readouterr().out)


def test_the_figures_follow_from_each_other(capsys):
    found = _plan(capsys, "sr256", "v5e:16x16")
    on = found["on_topology"]
    assert on["devices"] == 256
    assert on["mesh"] == {"data": 32, "fsdp": 8, "tensor": 1}
    # Parameters, EMA and two moments, nearly all split over 8.
    share = 16 * found["parameters"] / 8
    assert share < on["state_bytes_per_device"] < 1.01 * share
    assert on["model_flops_per_step"] == 3 * found["flops_per_image"] * 1024
    assert on["peak_flops"] == 256 * 197e12
    assert on["step_secs"] == pytest.approx(on["model_flops_per_step"] / on["peak_flops"] / 0.4)
    assert on["days"] == pytest.approx(on["step_secs"] * 500_000 / 86400)
    assert on["chip_hours"] == pytest.approx(on["days"] * 24 * 256)
    # Gathered once in bfloat16; what is not split is small.
    gathered = on["collectives"]["all-gather"]["bytes"]
    assert 0.99 < gathered / (2 * found["parameters"]) <= 1
    assert gathered == on["collectives"]["reduce-scatter"]["bytes"]
    assert on["fits"]
    twice = _plan(capsys, "sr256", "v5e:16x16", "--efficiency=0.2")["on_topology"]
    assert twice["step_secs"] == pytest.approx(2 * on["step_secs"])


def test_computing_again_or_in_parts_keeps_less(capsys):
    kept = {}
    for name, flags in {
        "all": [],
        "remat": ["--config.train.remat=everything"],
        "some": ["--config.train.remat=resolutions", "--config.train.remat_resolutions=(64,)"],
        "parts": ["--config.train.accumulation_steps=4"],
    }.items():
        on = _plan(capsys, "sr256:smoke", "h100:4", *flags)["on_topology"]
        kept[name] = on["activation_bytes_per_device"]
    assert kept["remat"] < kept["some"] < kept["all"]
    assert kept["parts"] < 0.5 * kept["all"]


def test_what_does_not_fit_comes_with_advice_that_helps(capsys):
    # A small model, and far too large a batch.
    large = "--config.train.batch_size=262144"
    found = _plan(capsys, "sr256:smoke", "h100:8", large, expected=1)["on_topology"]
    assert not found["fits"]
    flags = found["advice"].split(", ")
    assert all(flag.startswith("--config.") for flag in flags)
    assert _plan(capsys, "sr256:smoke", "h100:8", large, *flags)["on_topology"]["fits"]


def test_people_get_lines(capsys):
    argv = ["prog", f"--config={ROOT}/configs/mnist_cascade32.py:smoke", "--nocompile"]
    assert plan.main([*argv, "--topology=v4:2x2x4"]) == 0
    out = capsys.readouterr().out
    for stage in ("base16", "sr32"):
        assert f"{stage} on v4:2x2x4: 16 devices, data 16 x fsdp 1 x tensor 1, batch 16" in out
    assert out.count("=> fits (by estimate") == 2
    assert "at 40% (assumed) of 4.4 PFLOP/s" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v9:2x2"], "unknown accelerator 'v9'"),
        (["--topology=v5e:4x4x4"], "v5e comes in shapes of 2 number"),
        (["--topology=v5e:32x32"], "of at most 16 each"),
        (["--topology=v5e:0x4"], "'0x4' is not a shape"),
        (["--topology=v5e"], "'' is not a shape"),
        (["--topology=v5p:4x4"], "v5p comes in shapes of 3 number"),
        (["--topology=h100:2x4"], "h100 comes in shapes of 1 number"),
        (["--topology=h100:8", "--compile"], "--compile: expected a TPU's"),
        (["--topology=v5e:4x4", "--efficiency=1.5"], "--efficiency=1.5: expected a share"),
        (
            ["--topology=h100:6", "--config.mesh.fsdp=8"],
            "config.mesh.fsdp = 8: expected a divisor of the 6 devices",
        ),
        (
            ["--topology=v5e:16x16", "--config.train.batch_size=100"],
            "config.train.batch_size = 100: expected a multiple of",
        ),
    ],
)
def test_slices_that_are_none_are_refused(flags, message):
    argv = ["prog", f"--config={ROOT}/configs/sr256.py", *flags]
    with pytest.raises(UserError) as error:
        plan.main(argv if "--compile" in flags else [*argv, "--nocompile"])
    assert message in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the [tpu] extra")
def test_the_tpu_compiler_agrees_with_the_estimate():
    command = [sys.executable, "-m", "cascaded_diffusion.plan", "--topology=v5e:2x2", "--compile"]
    command += ["--config=configs/mnist_base16.py:smoke", "--config.mesh.fsdp=2", "--json"]
    # Smaller arrays are padded to many times their size.
    command += ["--config.stage.network.channels=128", "--config.train.batch_size=64"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert result.returncode == 0
    on = json.loads(result.stdout)["on_topology"]
    compiled, state = on["compiled"], on["state_bytes_per_device"]
    assert compiled["fits"]
    assert compiled["recomputed"] == 0
    assert compiled["argument_bytes"] > 0.9 * state
    assert compiled["used_bytes"] < 3 * (state + on["activation_bytes_per_device"])
    # Besides products and convolutions the compiler counts everything elementwise.
    assert 0.5 < 4 * compiled["flops"] / on["model_flops_per_step"] < 4
    accelerator = ACCELERATORS["v5e"]
    assert compiled["roofline_secs"] == {
        "compute": compiled["flops"] / accelerator.peak_flops,
        "memory": compiled["bytes_accessed"] / accelerator.memory_bandwidth,
        "links": on["collective_secs"],
    }


class Compiled:
    """A compiled step, as far as a plan asks it."""

    def __init__(self, instructions):
        self._text = "\n".join(f"  {name} = f32[8]{{0}} add(%a, %b)" for name in instructions)

    def memory_analysis(self):
        return types.SimpleNamespace(
            argument_size_in_bytes=2e9,
            temp_size_in_bytes=3e9,
            output_size_in_bytes=2e9,
            alias_size_in_bytes=2e9,
        )

    def cost_analysis(self):
        return {"flops": 1e12, "bytes accessed": 1e10}

    def as_text(self):
        return self._text


@pytest.mark.parametrize(
    ("instructions", "recomputed"),
    [(["%add.1", "%rematerialized", "ROOT %add.2"], 0), (["%add.1.remat", "ROOT %b.remat2.1"], 2)],
)
def test_what_the_tpu_compiler_computes_again_is_said(monkeypatch, instructions, recomputed):
    options = {}

    def compile_train_step(*args, compiler_options, **kwargs):
        options.update(compiler_options)
        return Compiled(instructions)

    monkeypatch.setattr(step_cost.step, "compile_train_step", compile_train_step)
    monkeypatch.setattr(step_cost, "_tpu_devices", lambda topology: jax.devices()[:4])
    config = tiny_base(mesh__fsdp=1)
    topology = parse_topology("v5e:2x2")
    on = step_cost.on_topology(
        config, topology, efficiency=0.4, flops_per_image=1e9, compile_step=True
    )
    assert on["fits"]
    assert on["compiled"]["recomputed"] == recomputed
    # Of 16 GiB, 0.25 or more belong to the runtime.
    assert 2**28 < options["xla_tpu_user_reserved_hbm_bytes"] < 2**29
    text = plans.described({"name": "base", "on_topology": on})
    assert ("it computes 2 values again" in text) == (recomputed > 0)
    assert "fits (by the TPU's compiler)" in text


def test_the_smallest_division_that_fits_is_taken():
    # Most of it is state.
    wide = {"stage__network__channels": 64, "train__batch_size": 8}
    config = tiny_base(mesh__fsdp=None, **wide)
    whole = fit.step_memory(config, 8).total
    fsdps, lines = [], []
    for memory in (100 * whole, 1.1 * whole, 0.9 * whole, 0.6 * whole):
        found, line = fit.choose_fsdp(config, 8, memory)
        fsdps.append(found.mesh.fsdp)
        lines.append(line)
    assert fsdps[:2] == [1, 1]
    assert fsdps == sorted(fsdps)
    assert fsdps[-1] > 1
    assert lines[0].startswith("config.mesh.fsdp = 1: the state and a step fit on each device by")
    assert f"config.mesh.fsdp = {fsdps[2]}: the smallest division whose estimated" in lines[2]
    assert config.mesh.fsdp is None

    none, line = fit.choose_fsdp(config, 8, 1e3)
    assert "no division fits by estimate" in line
    assert none.mesh.fsdp > 1
    # What is given stays, and where there is nothing to choose nothing is said.
    given = tiny_base(mesh__fsdp=2)
    assert fit.choose_fsdp(given, 8, 1e3) == (given, None)
    alone, line = fit.choose_fsdp(config, 1, 1e3)
    assert (alone.mesh.fsdp, line) == (1, None)
    by_data, _ = fit.choose_fsdp(tiny_base(mesh__fsdp=None, mesh__data=2, **wide), 8, 1e12)
    assert by_data.mesh.fsdp == 4


def test_a_batch_that_cannot_fit_names_the_keys_and_one_that_may_is_warned_of():
    config = tiny_base(train__batch_size=64)
    memory = fit.step_memory(config, 1)
    state, activations = memory.state, memory.activations
    assert fit.check_memory(config, 1, 1e12) is None
    assert fit.check_memory(config, 1, 1.1 * (state + 2 * activations)) is None
    warning = fit.check_memory(config, 1, state + activations)
    assert warning.startswith("it may not fit: config.train.batch_size = 64, ")
    assert "by estimate it fits with --config.train." in warning
    for size in (0.9 * state, 1e3):  # by tracing, and by arithmetic alone
        with pytest.raises(UserError) as error:
            fit.check_memory(config, 1, size)
        for key in ("batch_size", "accumulation_steps", "remat"):
            assert f"config.train.{key} = " in str(error.value)
        assert "config.mesh.fsdp = 1" in str(error.value)


@pytest.mark.parametrize("name", ["base32", "lsun_sr128", "modern_sr256"])
def test_arithmetic_counts_nearly_what_tracing_counts(name):
    config = run_config_from(config_values(name, "smoke"))
    found, cost = plans.stage_plan(config, config.stage.sampler), stage_cost(config.stage)
    assert cost.parameters == pytest.approx(found["parameters"], rel=0.2)
    assert cost.flops == pytest.approx(found["flops_per_image"], rel=0.2)
    kept = fit.kept_bytes(config.stage, ())
    assert 0.5 < 4 * cost.kept_values / kept < 2


def test_the_papers_models_have_the_size_that_arithmetic_says():
    billions = {"base32": 0.79, "sr64": 0.72, "sr128": 0.56, "sr256": 0.62}
    for name, expected in billions.items():
        cost = stage_cost(run_config_from(config_values(name, None)).stage)
        assert cost.parameters / 1e9 == pytest.approx(expected, rel=0.05), name
