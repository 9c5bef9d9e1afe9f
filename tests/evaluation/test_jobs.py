"""The modes of evaluation as functions, where their parts go wrong or a trainer interferes."""

import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import jobs
from cascaded_diffusion.evaluation.samples.sample_sources import RealSplit
from cascaded_diffusion.evaluation.settings import make_settings
from cascaded_diffusion.files.json_files import write_json
from cascaded_diffusion.runtime.run_folder import IMPORTED, CascadeFolder, RunFolder
from tests.evaluation.stubs import WithoutNetwork, cascade_of
from tests.tiny import smallest_base
from tests.training.test_training import SOURCE, _train

pytestmark = pytest.mark.usefixtures("one_layer")


@pytest.fixture(scope="module")
def evaluation():
    def read(rows):
        return {"image": SOURCE.raw.images[rows], "label": SOURCE.raw.labels[rows]}

    split = RealSplit(data="random", split="all", size=64, read=read)
    return WithoutNetwork({"train": split, "val": split}, allow_few_samples=True)


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "base16")
    _train(smallest_base(train__train_steps=2, train__warmup_steps=1), folder.path)
    return folder


def test_an_evaluation_follows_a_run_that_had_ended_and_is_trained_for_longer(
    run, evaluation, monkeypatch
):
    looked = []

    def score(self):
        looked.append(run.complete_path.exists())
        if len(looked) == 1:
            run.complete_path.unlink()  # as a trainer does, before it compiles
        if len(looked) == 3:
            write_json(run.complete_path, {"reason": "complete", "step": 4})
        return 0

    write_json(run.best_path, {"step": 2, "ema_decay": 0.9, "metric": "fd", "value": 3.0})
    monkeypatch.setattr(jobs.RunScorer, "score_new_checkpoints", score)
    monkeypatch.setattr(jobs, "_POLL_SECS", 0)
    assert jobs.score_checkpoints(run, evaluation, follow=True)["step"] == 2
    # After the end there is one more look, at what was saved before it.
    assert looked == [True, False, False, True]


def test_what_an_import_has_chosen_is_no_score(run, evaluation, monkeypatch):
    chosen = {"step": 2, "ema_decay": 0.9, "metric": IMPORTED, "value": None}
    write_json(run.best_path, chosen)
    monkeypatch.setattr(jobs.RunScorer, "score_new_checkpoints", lambda self: 0)
    with pytest.raises(UserError, match="no checkpoint could be scored"):
        jobs.score_checkpoints(run, evaluation)


def test_a_sweep_above_a_stage_that_fails_is_one_line(run, evaluation, monkeypatch):
    config = run.read_config()
    write_json(run.best_path, {"step": 2, "ema_decay": config.eval.ema_decays[0]})
    cascade = cascade_of(config, num_samples=32, batch_size=16, seed=5)
    seeds = []

    def fails(self, settings):
        seeds.append(self.section.seed)
        raise ValueError("a sample of base8 is not finite")

    monkeypatch.setattr(jobs.Sweep, "run", fails)
    settings = make_settings(cascade.cascade, 0, config.stage, num_steps=[1, 2])
    runs = CascadeFolder(run.path.parent)
    with pytest.raises(UserError, match="`evaluate sweep`: a sample of base8 is not finite"):
        jobs.sweep_settings(runs, cascade, evaluation, settings, index=0)
    assert seeds == [config.eval.seed]  # samples that choose are not those of the cascade
