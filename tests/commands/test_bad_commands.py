"""Bad input: one line that names key, value and what is allowed; exit code 2; nothing written."""

import os
import subprocess
import sys

import pytest

from cascaded_diffusion import evaluate, main, plan, sample
from cascaded_diffusion.commands import jax_setup
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.tiny import ROOT, tiny_base, tiny_sr

BASE = f"--config={ROOT}/configs/mnist_base16.py:smoke"
SR = f"--config={ROOT}/configs/mnist_sr32.py:smoke"
CASCADE = f"--config={ROOT}/configs/mnist_cascade32.py"
BAD_COMMANDS = [
    (
        main,
        [BASE, "--workdir=RUN", "--config.train.batch_size=1.5"],
        "config.train.batch_size = 1.5: expected an integer",
    ),
    (
        main,
        [BASE, "--workdir=RUN", "--config.stage.network.scale_skips=maybe"],
        "config.stage.network.scale_skips = 'maybe': expected True or False",
    ),
    (
        main,
        [BASE, "--workdir=RUN", "--config.stage.network.channel_mults=(1,x)"],
        "config.stage.network.channel_mults = '(1,x)': expected a tuple of a number",
    ),
    (main, [BASE, "--workdir=RUN", "--config.trian.seed=1"], "config.trian is not a config key"),
    (
        main,
        [BASE, "--workdir=RUN", "--config.train.seed.x=1"],
        "--config.train.seed.x=1: config key 'seed' is not a section",
    ),
    (main, [BASE, "--workdir=RUN", "--config.train.seed"], "--config.train.seed: expected"),
    (
        main,
        [SR, "--workdir=RUN", "--config.stage.low_res_resolution=None"],
        "config.stage.low_res_resolution = None: expected the size",
    ),
    (main, ["--config", "--workdir=RUN"], "--config=--workdir=RUN: no such .py file"),
    (main, [f"--config={ROOT}/README.md", "--workdir=RUN"], f"--config={ROOT}/README.md: no such"),
    (main, ["--workdir=RUN"], "--config is missing: "),
    (
        main,
        [BASE, "--workdir=ftp://bucket/run"],
        "--workdir=ftp://bucket/run: expected a path on this machine",
    ),
    (main, [BASE, "--workdir=run[1]"], "--workdir=run[1]: "),
    (main, [BASE, "--workdir="], "--workdir='': expected the path of a file or folder"),
    (
        main,
        [BASE, "--config.data.name=folder", "--config.data.path=s3://x/y"],
        "config.data.path=s3://x/y: expected a path on this machine",
    ),
    (main, [BASE, "--config.data.prepared_dir=a*"], "config.data.prepared_dir=a*: "),
    *(
        (main, [BASE, f"--profile_steps={steps}"], f"--profile_steps={steps}: expected FIRST:LAST")
        for steps in ("1", "0:3", "3:2", "20:31", "1:" + "9" * 5000, "\u0663:4")
    ),
    (main, [BASE, "--coordinator_timeout_secs=nan"], "--coordinator_timeout_secs=nan: expected"),
    (main, [BASE, "--coordinator_timeout_secs=inf"], "--coordinator_timeout_secs=inf: expected"),
    (main, [BASE, "--num_processes=9999999999"], "--num_processes=1e+10: expected a number of"),
    (plan, [BASE, "--efficiency=nan"], "--efficiency=nan: expected"),
    (plan, [BASE, "--efficiency=1e-300"], "--efficiency=1e-300: expected a share"),
    (plan, [BASE, "--topology=h100:100000"], "--topology=h100:100000: h100 comes in shapes"),
    (evaluate, ["--workdir=RUN", "--num_images=99999999999"], "--num_images=1e+11: expected a"),
    (
        main,
        [BASE, "--workdir=RUN", "--wrokdir=x"],
        "Unknown command line flag 'wrokdir'. Did you mean: workdir ?",
    ),
    (main, [BASE, "--workdir=RUN", "stray"], "'stray' is not a flag"),
    (
        main,
        ["--config=configs/none.py", "--workdir=RUN"],
        "--config=configs/none.py: no such .py file",
    ),
    (
        main,
        [BASE[:-6] + ":tiny", "--workdir=RUN"],
        "--config=...:tiny: expected no variant, or ':smoke'",
    ),
    (
        main,
        [BASE, "--workdir=RUN", "--config.train.learning_rat=1"],
        "config.train.learning_rat is not a config key; did you mean 'learning_rate'?",
    ),
    (
        main,
        [BASE, "--workdir=RUN", "--config.train.batch_size=many"],
        "config.train.batch_size = 'many': expected an integer",
    ),
    (
        main,
        [BASE, "--workdir=RUN", "--config.train.learning_rate=nan"],
        "config.train.learning_rate = nan: expected a finite number",
    ),
    (
        main,
        [BASE, "--workdir=RUN", "--config.train.learning_rate=-1"],
        "config.train.learning_rate = -1.0: expected a value above 0",
    ),
    (
        main,
        [BASE, "--workdir=RUN", "--config.stage.resolution=18"],
        "config.stage.resolution = 18: expected a multiple of 4",
    ),
    (
        main,
        [BASE, "--workdir=RUN", "--config.mesh.data=5"],
        "config.train.batch_size = 16: expected a multiple of 5",
    ),
    (main, [BASE, "--workdir=/proc/RUN"], "--workdir=/proc/RUN: cannot write to /proc"),
    (main, [CASCADE, "--workdir=RUN"], "config.cascade is not a config key"),
    (evaluate, [], "--workdir is missing: "),
    (evaluate, ["--workdir=RUN"], "--workdir=RUN: no run there"),
    (
        evaluate,
        ["--workdir=RUN", "--num_images=3"],
        "--num_images does not go with --workdir alone; it is for `evaluate bits_per_dim`: leave",
    ),
    (
        evaluate,
        ["--workdir=RUN", "--stage=sr32"],
        "--stage does not go with --workdir alone; it is for `evaluate sweep`: leave one of them",
    ),
    (
        evaluate,
        ["--workdir=RUN", "--final", "--samples=a.npz"],
        "--samples does not go with `evaluate final`; it is for `evaluate cas`: leave one of them",
    ),
    (evaluate, ["--workdir=RUN", "--cas"], "--workdir=RUN: no run there"),
    (evaluate, ["--workdir=RUN", "--final"], "--workdir=RUN: no run there"),
    (
        evaluate,
        ["--workdir=RUN", "--final", "--config.eval.seed=3"],
        "--workdir=RUN: no run there",
    ),
    (
        evaluate,
        ["--workdir=RUN", "--samples=a.npz", "--reference=b.npz"],
        "--reference, --resize: only without --workdir, which has its own; leave one out",
    ),
    (
        evaluate,
        ["--workdir=RUN", "--final", CASCADE],
        "--workdir=RUN: no run 'base16' there; train it with",
    ),
    (
        evaluate,
        ["--workdir=RUN", "--sweep", "--follow", CASCADE],
        "--follow does not go with `evaluate sweep`; it is for `evaluate checkpoints`: leave one",
    ),
    (evaluate, ["--workdir=RUN", "--sweep"], "--config is missing: "),
    (
        evaluate,
        ["--workdir=RUN", "--sweep", BASE],
        f"{BASE}: the config of a stage, expected a cascade's",
    ),
    (
        evaluate,
        ["--workdir=RUN", "--config.stage.sampler.num_steps=3"],
        "--config.stage.sampler.num_steps=3: only for `evaluate sweep` and `evaluate final` of a",
    ),
    (
        evaluate,
        ["--workdir=RUN", "--sweep", "--stage=sr99", CASCADE],
        "--stage=sr99: expected one of config.cascade.stages, base16, sr32",
    ),
    (
        sample,
        [CASCADE, "--workdir=RUN"],
        "--workdir=RUN: no run 'base16' there; train it with `python -m cascaded_diffusion.main"
        " --config=configs/mnist_base16.py --workdir=RUN/base16`",
    ),
    (sample, ["--workdir=RUN"], "--config is missing: "),
    (
        sample,
        [CASCADE, "--workdir=RUN", "--config.cascade.samplers.2.num_steps=3"],
        "--config.cascade.samplers.2.num_steps=3: expected a number below 2 for '2'",
    ),
    (
        sample,
        [CASCADE, "--workdir=RUN", "--config.cascade.samplers.0.num_steps=0"],
        "config.cascade.samplers[0].num_steps = 0: expected a value from 1",
    ),
    (plan, [], "--config is missing: "),
    (plan, [BASE, "--config.stage.resolution=18"], "config.stage.resolution = 18: expected"),
    (
        plan,
        [CASCADE, "--config.cascade.configs=('mnist_base16.py', 'none.py')"],
        f"--config={ROOT}/configs/none.py: no such .py file",
    ),
    (
        sample,
        [CASCADE, "--workdir=RUN", "--config.cascade.aug_levels=(2.0,)"],
        "config.cascade.aug_levels[0] = 2.0: ",
    ),
    (sample, [BASE, "--workdir=RUN"], f"{BASE}: the config of a stage, expected a cascade's"),
]


@pytest.mark.parametrize(("binary", "argv", "message"), BAD_COMMANDS, ids=lambda x: str(x)[-60:])
def test_bad_commands(binary, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax_setup, "set_up_jax", lambda **_: pytest.fail("a device was touched"))
    with pytest.raises(UserError) as error:
        binary.main(["prog", *argv])
    assert str(error.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_checkpoints_cannot_be_scored(tmp_path, monkeypatch):
    RunFolder(tmp_path).write_config(tiny_base())
    monkeypatch.setattr(jax_setup, "set_up_jax", lambda **_: pytest.fail("a device was touched"))
    with pytest.raises(UserError, match="no checkpoint there; train first, or add --follow"):
        evaluate.main(["evaluate", f"--workdir={tmp_path}"])
    with pytest.raises(
        UserError, match="--config.eval.seed=3: a run is measured by its own config"
    ):
        evaluate.main(["evaluate", f"--workdir={tmp_path}", "--final", "--config.eval.seed=3"])
    for extra in (["--final"], ["--bits_per_dim=test"]):
        with pytest.raises(UserError, match="no checkpoint was chosen yet; run .*evaluate"):
            evaluate.main(["evaluate", f"--workdir={tmp_path}", *extra])


def test_a_run_without_a_chosen_checkpoint_cannot_be_sampled(tmp_path, monkeypatch):
    for config in (tiny_base(), tiny_sr()):
        RunFolder(tmp_path / config.stage.name).write_config(config)
    monkeypatch.setattr(jax_setup, "set_up_jax", lambda **_: pytest.fail("a device was touched"))
    with pytest.raises(UserError, match="base16: no checkpoint was chosen yet; run .*evaluate"):
        sample.main(["prog", CASCADE, f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match="base16: no checkpoint was chosen yet"):
        evaluate.main(["prog", f"--workdir={tmp_path}/sr32", f"--low_res_run={tmp_path}/base16"])
    with pytest.raises(UserError, match="only for super-resolution stages"):
        evaluate.main(["prog", f"--workdir={tmp_path}/base16", f"--low_res_run={tmp_path}/sr32"])


@pytest.mark.parametrize(
    "argv",
    [
        ["main", "--config=configs/none.py", "--workdir=RUN"],
        ["main", f"--config={ROOT}/tests/tiny.py", "--workdir=RUN"],
        ["main", BASE, "--workdir=RUN", "--config.train.batch_size=0"],
        ["evaluate", "--workdir=RUN"],
        ["sample", CASCADE, "--workdir=RUN"],
    ],
)
def test_the_process_says_one_line_and_exits_with_2(argv, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", f"cascaded_diffusion.{argv[0]}", *argv[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


SWEEP = ["prog", "--sweep", CASCADE]
BAD_SWEEPS = [
    (["--aug_levels=0,x"], "--aug_levels=0,x: expected numbers between commas"),
    (["--num_steps=1.5"], "--num_steps=1.5: expected integers between commas"),
    (["--truncated=maybe"], "--truncated=maybe: expected true, false, or both"),
    (
        ["--aug_levels=0,1.5"],
        "--aug_levels: config.cascade.aug_levels[0] = 1.5: expected a value from 0.0",
    ),
    (
        ["--samplers=euler"],
        "--samplers: config.cascade.samplers[1].name = 'euler': expected one of",
    ),
    (
        ["--num_steps=0"],
        "--num_steps: config.cascade.samplers[1].num_steps = 0: expected a value from 1",
    ),
    (["--stage=base16", "--aug_levels=0"], "--aug_levels, --truncated: 'base16' is a base model"),
    (
        ["--aug_levels=1", "--truncated=true"],
        "--aug_levels, --truncated: config.cascade.aug_levels[0] = 1.0: expected a level below 1",
    ),
    ([], "{}/base16: no checkpoint was chosen yet"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_SWEEPS, ids=lambda x: str(x)[:60])
def test_bad_sweeps(argv, message, tmp_path, monkeypatch):
    for config in (tiny_base(), tiny_sr()):
        RunFolder(tmp_path / config.stage.name).write_config(config)
    monkeypatch.setattr(jax_setup, "set_up_jax", lambda **_: pytest.fail("a device was touched"))
    with pytest.raises(UserError) as error:
        evaluate.main([*SWEEP, f"--workdir={tmp_path}", *argv])
    assert str(error.value).startswith(message.format(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base16", "sr32"]


def test_help_names_the_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["prog", "--help"])
    assert stop.value.code == 0
    assert "--workdir" in capsys.readouterr().out
