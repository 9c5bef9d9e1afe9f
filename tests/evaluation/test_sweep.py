"""The search after training, on a real (tiny) cascade with a evaluator whose verdicts are known."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.config.run_checks import cascade_config_from, run_config_from
from cascaded_diffusion.config.schema import sampler_named
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.settings import make_settings, with_setting
from cascaded_diffusion.evaluation.sweep import Sweep, best_setting
from cascaded_diffusion.evaluation.team import Team
from cascaded_diffusion.evaluation.trained import load_trained
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.evaluation.stubs import Evaluator
from tests.tiny import config_values, smallest_base, smallest_sr, two_devices
from tests.training.test_training import _train

pytestmark = pytest.mark.usefixtures("one_layer")
NUM_SAMPLES, BATCH_SIZE = 20, 8
METRIC = "fd_stub_20"


@pytest.fixture(scope="module")
def mesh():
    return two_devices()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, mesh):
    stages = []
    for make in (smallest_base, smallest_sr):
        config = make(train__train_steps=2, train__warmup_steps=1, checkpoint__save_every_steps=2)
        folder = RunFolder(tmp_path_factory.mktemp("runs") / config.stage.name)
        _train(config, folder.path)
        folder.eval.mkdir()
        folder.best_path.write_text(json.dumps({"step": 2, "ema_decay": 0.995}))
        stages.append(load_trained(folder, mesh))
    return stages


def _section(truncated=False):
    section = cascade_config_from(config_values("mnist_cascade32")).cascade
    short = tuple(dataclasses.replace(s, num_steps=2, guidance_scale=1.0) for s in section.samplers)
    return dataclasses.replace(
        section,
        samplers=short,
        truncated=truncated,
        num_samples=NUM_SAMPLES,
        batch_size=BATCH_SIZE,
    )


def _sweep(folder, section, trained, evaluator, mesh):
    return Sweep(section, trained, evaluator, folder, mesh, Team(RunFolder(folder)))


def _settings(section, trained, **choices):
    return make_settings(section, 1, trained[1].stage.config, **choices)


def test_every_setting_gives_what_sampling_the_cascade_with_it_gives(trained, tmp_path, mesh):
    section = _section()
    settings = _settings(section, trained, aug_levels=[0.1, 0.6], truncated=[False, True])
    evaluator = Evaluator([4.0, 3.0, 2.0, 5.0])
    rows = _sweep(tmp_path, section, trained, evaluator, mesh).run(settings)
    assert [row[METRIC] for row in rows] == [4.0, 3.0, 2.0, 5.0]
    for setting, (images, labels) in zip(settings, evaluator.seen, strict=True):
        chosen = with_setting(section, 1, setting)
        cascade = Cascade(
            stages=[t.stage for t in trained],
            samplers=chosen.samplers,
            truncated=chosen.truncated,
        )
        alone = generate.generate(
            generate.make_cascade_sampler(cascade, chosen.aug_levels, seed=section.seed, mesh=mesh),
            [t.params for t in trained],
            num_samples=NUM_SAMPLES,
            batch_size=BATCH_SIZE,
            label="alone",
        )
        np.testing.assert_array_equal(images, alone[-1])
        np.testing.assert_array_equal(labels, np.arange(NUM_SAMPLES) % 10)
        if not setting.truncated:
            # The stored base samples are the very ones that the cascade hands on.
            np.testing.assert_array_equal(read_arrays(tmp_path / "base16.npz")["arr_0"], alone[0])

    # A picture for each: what is enlarged, where that is the same for all, and what it becomes.
    shown = [Image.open(tmp_path / row["picture"]) for row in rows]
    low, high = (picture.size[1] for picture in shown[1::-1])
    assert [picture.size[1] for picture in shown] == [high, low, high, low]
    assert (high > 1.9 * low, len({row["picture"] for row in rows})) == (True, 4)

    table = (tmp_path / "sr32.md").read_text()
    assert "| 0.6 | False | dpmpp_2m | 2 | 1.0 | 2 | 2.000 | 0.500 |" in table
    assert table.index("2.000") < table.index("3.000") < table.index("5.000")
    assert Image.open(tmp_path / "sr32.png").size[0] > 500

    best = best_setting(settings, rows, METRIC)
    assert (best.aug_level, best.truncated) == (0.6, False)
    assert with_setting(section, 1, best).aug_levels == (0.6,)


def test_what_is_scored_is_not_scored_again_and_base_samples_are_made_once(trained, tmp_path, mesh):
    section = _section()
    first = _settings(section, trained, aug_levels=[0.1])
    _sweep(tmp_path, section, trained, Evaluator([4.0]), mesh).run(first)
    stamp = (tmp_path / "base16.npz").stat().st_mtime_ns
    more = _settings(section, trained, aug_levels=[0.1, 0.2])
    rows = _sweep(tmp_path, section, trained, Evaluator([3.0]), mesh).run(more)
    assert [row[METRIC] for row in rows] == [4.0, 3.0]
    assert (tmp_path / "base16.npz").stat().st_mtime_ns == stamp

    # Other base samples, other scores.
    other = dataclasses.replace(section, seed=7)
    rows = _sweep(tmp_path, other, trained, Evaluator([9.0]), mesh).run(first)
    assert rows[0][METRIC] == 9.0
    about = read_arrays(tmp_path / "base16.npz")["provenance"]
    assert json.loads(str(about))["seed"] == 7


def test_a_base_model_is_swept_over_steps_and_samplers(trained, tmp_path, mesh):
    section = _section()
    base = trained[:1]
    settings = make_settings(
        section, 0, base[0].stage.config, samplers=["ddim", "heun"], num_steps=[2, 3]
    )
    assert [(s.sampler.name, s.sampler.num_steps) for s in settings] == [
        ("ddim", 2),
        ("ddim", 3),
        ("heun", 2),
        ("heun", 3),
    ]
    rows = _sweep(tmp_path, section, base, Evaluator([4.0, 3.0, 2.0, 1.0]), mesh).run(settings)
    best = best_setting(settings, rows, METRIC)
    chosen = with_setting(section, 0, best)
    assert (chosen.samplers[0].name, chosen.samplers[0].num_steps) == ("heun", 3)
    assert chosen.samplers[1] == section.samplers[1]
    assert chosen.aug_levels == section.aug_levels


def test_a_setting_that_fails_is_recorded_and_passed_over(trained, tmp_path, mesh, monkeypatch):
    section = _section()
    settings = _settings(section, trained, aug_levels=[0.1, 0.2])
    whole = generate.fill

    def failing(store, make, *, label, **kwargs):
        if "1/2" in label:
            raise ValueError("a sample is not finite")
        whole(store, make, label=label, **kwargs)

    monkeypatch.setattr(generate, "fill", failing)
    rows = _sweep(tmp_path, section, trained, Evaluator([3.0]), mesh).run(settings)
    assert [row[METRIC] for row in rows] == [None, 3.0]
    assert best_setting(settings, rows, METRIC).aug_level == 0.2
    assert "failed (a sample is not finite)" in (tmp_path / "sr32.md").read_text()
    with pytest.raises(UserError, match="no setting could be scored"):
        best_setting(settings[:1], rows[:1], METRIC)


def test_a_stage_without_a_level_keeps_the_cascades_truncation():
    section = dataclasses.replace(
        cascade_config_from(config_values("cascade256")).cascade, truncated=True
    )
    stage = run_config_from(config_values("sr256")).stage
    settings = make_settings(section, 2, stage, num_steps=[10, 50])
    assert [s.truncated for s in settings] == [True, True]
    assert with_setting(section, 2, settings[0]).truncated


def test_another_sampler_has_settings_that_it_can_use():
    stage = smallest_base().stage
    solver = stage.sampler
    assert sampler_named(solver.name, solver, stage) is solver
    ddim = sampler_named("ddim", solver, stage)
    assert (ddim.variance, ddim.eta) == (None, 0.0)
    ancestral = sampler_named("ancestral", ddim, stage)
    assert (ancestral.variance, ancestral.eta) == ("small", None)
    learned = dataclasses.replace(
        stage, diffusion=dataclasses.replace(stage.diffusion, variance="learned")
    )
    assert sampler_named("ancestral", ddim, learned).variance == "learned"
    heun = sampler_named("heun", ancestral, stage)
    assert (heun.variance, heun.eta) == (None, None)
