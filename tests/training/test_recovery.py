"""What a trainer does about a run folder that is not as it left it."""

import json
import os
import shutil

import pytest

from cascaded_diffusion.data.loader import build_stream, iterate
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime import checkpoint, manifest
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.training import loop
from tests.tiny import random_source, round_trip, smallest_base, two_devices

pytestmark = pytest.mark.usefixtures("one_layer")
SOURCE = random_source(64)
EXAMPLES = {"image": SOURCE.raw.images[:40], "label": SOURCE.raw.labels[:40]}
CONFIG = smallest_base(
    train__train_steps=6,
    train__warmup_steps=1,
    checkpoint__save_every_steps=2,
    checkpoint__max_to_keep=2,
)


def _train(path, config=CONFIG, data_from=None, **more):
    stream = build_stream(SOURCE, config.data, global_batch_size=config.train.batch_size)

    def read(start):
        return iterate(stream, SOURCE, config.data, start_step=start)

    return loop.train(
        config,
        RunFolder(path),
        data_from or read,
        image_shape=SOURCE.image_shape,
        grid_examples=EXAMPLES,
        mesh=two_devices(),
        **more,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    assert _train(path).step == 6
    return path


@pytest.fixture
def run(finished, tmp_path):
    return RunFolder(shutil.copytree(finished, tmp_path / "run"))


def _steps(folder):
    return [record["step"] for record in folder.metrics()]


def _longer(**more):
    return round_trip(CONFIG, train__train_steps=8, **more)


def _remove(*names):
    def remove(folder):
        for name in names:
            path = folder.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def _unfinish_all(folder):
    for step in manifest.finished_steps(folder):
        (folder.checkpoints / str(step) / "manifest.json").unlink()


LOST = {
    "checkpoints": _remove("checkpoints"),
    "checkpoints and TRAIN_COMPLETE": _remove("checkpoints", "TRAIN_COMPLETE"),
    "all but the log": _remove("checkpoints", "TRAIN_COMPLETE", "saved.json"),
    "all but the scores": lambda folder: (
        _remove("checkpoints", "TRAIN_COMPLETE", "saved.json", "metrics.jsonl")(folder),
        folder.eval.mkdir(exist_ok=True),
        folder.results_path.write_text('{"step": 6}\n'),
    ),
    "manifests": lambda folder: (_remove("TRAIN_COMPLETE")(folder), _unfinish_all(folder)),
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("longer", [False, True])
def test_a_run_whose_checkpoints_are_lost_does_not_begin_again_by_itself(run, lost, longer):
    LOST[lost](run)
    before = _steps(run)
    with pytest.raises(UserError, match="--start_over"):
        _train(run.path, _longer() if longer else CONFIG)
    assert _steps(run) == before
    # A run that is refused keeps its config.
    assert run.read_config() == CONFIG


def test_it_does_when_told_to_and_keeps_what_was_left(run):
    _remove("checkpoints")(run)
    run.eval.mkdir(exist_ok=True)
    run.results_path.write_text('{"step": 6}\n')
    assert _train(run.path, start_over=True).step == 6
    assert _steps(run) == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (run.path / "lost_run_1").iterdir()) == [
        "TRAIN_COMPLETE", "eval", "metrics.jsonl", "saved.json",
    ]  # fmt: skip
    assert _train(run.path, start_over=True).step == 6  # nothing is lost now: nothing begins again
    assert not (run.path / "lost_run_2").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
    class Killed(Exception):
        pass

    def dies(start):
        stream = build_stream(SOURCE, CONFIG.data, global_batch_size=CONFIG.train.batch_size)
        for i, batch in enumerate(iterate(stream, SOURCE, CONFIG.data, start_step=start)):
            if i == 4:
                raise Killed
            yield batch

    config = round_trip(CONFIG, checkpoint__save_every_steps=100)
    with pytest.raises(Killed):
        _train(tmp_path, config, dies)
    assert RunFolder(tmp_path).metrics()
    assert _train(tmp_path, config).step == 6
    assert _steps(RunFolder(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_a_copy_of_a_checkpoint_under_a_later_step_does_not_stop_the_run(run):
    shutil.copytree(run.checkpoints / "6", run.checkpoints / "999")
    assert _train(run.path, _longer()).step == 8
    assert manifest.finished_steps(run) == [6, 8]


def test_without_its_config_a_run_does_not_go_on(run):
    run.config_path.unlink()
    with pytest.raises(UserError, match="config.json: missing, though a run was begun here"):
        _train(run.path, round_trip(_longer(), train__learning_rate=1.0))


def test_lines_that_are_no_records_are_passed_over_and_said(run, capsys):
    lines = [b"\xff\xfe", b"[1, 2]", b'{"step": "six"}', b"[" * 100_000, b"null", b'{"step": tr']
    run.metrics_path.write_bytes(run.metrics_path.read_bytes() + b"\n".join(lines))
    assert _train(run.path, _longer()).step == 8
    assert _steps(run) == list(range(1, 9))
    assert "metrics.jsonl: 6 line(s) that are no records" in capsys.readouterr().out


def test_a_folder_in_place_of_a_file_is_named(run):
    run.metrics_path.unlink()
    run.metrics_path.mkdir()
    with pytest.raises(UserError, match="metrics.jsonl: expected a file"):
        _train(run.path, _longer())


@pytest.mark.parametrize("text", ["{", "[]", '{"reason": "bored", "step": 6}', '{"step": "x"}'])
def test_a_damaged_train_complete_is_named(run, text):
    run.complete_path.write_text(text)
    with pytest.raises(UserError, match="TRAIN_COMPLETE: .*; remove it"):
        _train(run.path)


def _flip_newest(folder):
    data = max((folder.checkpoints / "6").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("lose", [_remove("checkpoints/6"), _flip_newest], ids=["gone", "damaged"])
@pytest.mark.parametrize("reason", ["complete", "early_stop"])
def test_a_run_whose_last_checkpoint_is_lost_has_not_ended(run, lose, reason):
    lose(run)
    if reason == "early_stop":
        run.early_stop_path.write_text("enough\n")
    outcome = _train(run.path)
    # It goes on from the one before, or ends there, as it was asked to.
    assert (outcome.reason, outcome.step) == (reason, {"complete": 6, "early_stop": 4}[reason])
    assert manifest.finished_steps(run)[-1] == outcome.step
    assert manifest.damage(run.checkpoints / str(outcome.step)) is None
    assert json.loads(run.complete_path.read_text()) == {"reason": reason, "step": outcome.step}
    assert _train(run.path) == outcome


def test_a_run_with_only_a_damaged_last_checkpoint_starts_over_when_told_to(run):
    _remove("checkpoints/4")(run)
    _flip_newest(run)
    with pytest.raises(UserError, match="none of the checkpoints .*--start_over"):
        _train(run.path)
    assert _train(run.path, start_over=True).step == 6
    assert (run.path / "lost_run_1" / "TRAIN_COMPLETE").exists()


def test_train_complete_is_gone_before_a_longer_run_compiles(run, monkeypatch):
    def compiles(*args, **kwargs):
        raise UserError("the program is too large")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="too large"):
        patch.setattr(loop, "_start_compiling", compiles)
        _train(run.path, _longer())
    assert not run.complete_path.exists()  # for an evaluation that follows
    assert _train(run.path).step == 6
    assert run.complete_path.exists()


def test_the_workdir_moved_away_while_training_is_not_made_again(tmp_path):
    def moves(start):
        stream = build_stream(SOURCE, CONFIG.data, global_batch_size=CONFIG.train.batch_size)
        for i, batch in enumerate(iterate(stream, SOURCE, CONFIG.data, start_step=start)):
            if i == 3:
                os.rename(tmp_path / "run", tmp_path / "elsewhere")
            yield batch

    with pytest.raises(UserError, match="moved or removed"):
        _train(tmp_path / "run", data_from=moves)
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"]


def test_early_stop_is_honoured_before_anything_is_compiled(run, monkeypatch):
    _remove("TRAIN_COMPLETE")(run)
    run.early_stop_path.write_text("enough\n")

    def compiles(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(loop.step_lib, "compile_train_step", compiles)
    monkeypatch.setattr(loop.step_lib, "abstract_state", compiles)
    outcome = _train(run.path, _longer())
    assert (outcome.reason, outcome.step) == ("early_stop", 6)
    # By this, `evaluate --follow` ends, though no trainer ran when it asked to stop.
    record = json.loads(run.complete_path.read_text())
    assert record == {"reason": "early_stop", "step": 6}
    assert _train(run.path, _longer()) == outcome
    assert run.how_to_resume() == f"remove {run.early_stop_path}"
    run.ask_to_stop(3)
    assert "patience_evals" in run.how_to_resume()


def test_a_run_without_an_intact_checkpoint_is_refused_before_anything_is_compiled(
    run, monkeypatch
):
    _remove("TRAIN_COMPLETE")(run)
    for manifest_path in run.checkpoints.glob("*/manifest.json"):
        manifest_path.write_text("")

    def compiles(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(loop.step_lib, "compile_train_step", compiles)
    with pytest.raises(UserError, match="none of the checkpoints"):
        _train(run.path, _longer())


def test_a_stretched_schedule_is_said(run, capsys):
    config = round_trip(CONFIG, train__lr_decay="cosine")
    run.write_config(config)
    assert _train(run.path, round_trip(_longer(), train__lr_decay="cosine")).step == 8
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "cosine decay" in x]
    assert "is now over 8 steps: at step 6 the rate goes from 0.0001 to 0.00" in line


def test_closing_says_nothing_over_the_error_itself(tmp_path, monkeypatch):
    def full(path, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_manifest", full)
    monkeypatch.setattr(
        checkpoint.ocp.CheckpointManager, "close", lambda self: (_ for _ in ()).throw(ValueError)
    )
    with pytest.raises(UserError, match="saving a checkpoint failed .*No space left"):
        _train(tmp_path)
