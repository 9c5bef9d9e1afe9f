"""Scoring a real (tiny) run with a evaluator whose verdicts are known."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest

from cascaded_diffusion import evaluate
from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.data.sources import examples
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import score
from cascaded_diffusion.evaluation.evaluator import build_evaluator
from cascaded_diffusion.evaluation.final import final_order, measure_final
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.sample_sources import RealSplit, StageSampling
from cascaded_diffusion.evaluation.samples.stored_images import open_images, save_samples
from cascaded_diffusion.evaluation.team import Team
from cascaded_diffusion.evaluation.trained import load_trained
from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.runtime import checkpoint, manifest
from cascaded_diffusion.runtime.manifest import pinned
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.binaries import environment
from tests.evaluation.stubs import Evaluator, Extractor
from tests.tiny import (
    ROOT,
    random_source,
    round_trip,
    smallest_base,
    smallest_sr,
    two_devices,
)
from tests.training.test_training import SOURCE, _train
from tests.xla import QUICK_COMPILATION

pytestmark = pytest.mark.usefixtures("one_layer")
HELD_OUT = RealSplit("noise", "test", len(SOURCE), partial(examples, SOURCE))
FD, ACCURACY, PSNR = "fd_stub_40", "accuracy_stub_40", "psnr_low_res_40"


def _config(make, **overrides):
    return make(
        train__train_steps=6,
        train__warmup_steps=1,
        checkpoint__save_every_steps=2,
        eval__patience_evals=2,
        stage__sampler__num_steps=2,
        **overrides,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = {}
    for make in (smallest_base, smallest_sr):
        config = _config(make)
        folder = RunFolder(tmp_path_factory.mktemp("runs") / config.stage.name)
        _train(config, folder.path)
        folders[config.stage.name] = folder
    return folders


def _sampling(config, stage, mesh, *, num_samples=None):
    return StageSampling(
        stage=stage,
        sampler=config.stage.sampler,
        aug_level=config.eval.aug_level,
        num_samples=num_samples or config.eval.num_samples,
        seed=config.eval.seed,
        mesh=mesh,
    )


def _scorer(folder, evaluator, *, below=None, config=None):
    config = config or folder.read_config()
    mesh = two_devices()
    sampling = _sampling(config, build_stage(config.stage), mesh)
    made = [sampling.alone(HELD_OUT)]
    if below is not None:
        samplers = [below.stage.config.sampler, config.stage.sampler]
        levels = [config.eval.aug_level]
        made.append(sampling.of_stages([below], samplers, levels, truncated=False, kind="samples"))
    return score.RunScorer(config, folder, evaluator, made, mesh)


@pytest.fixture
def clean(runs):
    for folder in runs.values():
        shutil.rmtree(folder.eval, ignore_errors=True)
        folder.early_stop_path.unlink(missing_ok=True)
    return runs


def test_every_checkpoint_once_the_best_chosen_and_training_stopped(clean):
    folder = clean["base16"]
    evaluator = Evaluator([3.0, 5.0, 4.0])
    assert _scorer(folder, evaluator).score_new_checkpoints() == 3
    records = read_lines(folder.results_path)
    assert [(r["step"], r["metric"], r["value"]) for r in records] == [
        (step, metric, value)
        for step, distance in ((2, 3.0), (4, 5.0), (6, 4.0))
        for metric, value in ((ACCURACY, 0.5), (FD, distance))
    ]
    assert all(r["num_samples"] == 40 and r["low_res"] == "none" for r in records)
    assert folder.chosen().step == 2
    assert folder.early_stop_path.exists()  # two scores without a better one
    images, labels = evaluator.seen[0]
    assert (images.shape, images.dtype) == ((40, 16, 16, 1), np.uint8)
    np.testing.assert_array_equal(labels, np.arange(40) % 10)
    assert (folder.eval / "step_2_none.png").exists()

    # Again: nothing is scored twice (the evaluator has no verdict left).
    assert _scorer(folder, Evaluator([])).score_new_checkpoints() == 0
    assert read_lines(folder.results_path) == records

    # The trainer honours it.
    folder.complete_path.unlink()
    longer = round_trip(folder.read_config(), train__train_steps=8)
    outcome = _train(longer, folder.path)
    assert (outcome.reason, outcome.step) == ("early_stop", 6)
    _restore_config(folder)


def _restore_config(folder):
    folder.write_config(round_trip(folder.read_config(), train__train_steps=6))


def test_super_resolution_is_scored_on_real_and_on_generated_input(clean):
    base, sr = clean["base16"], clean["sr32"]
    _scorer(base, Evaluator([3.0, 2.0, 1.0])).score_new_checkpoints()
    mesh = two_devices()
    previous = load_trained(base, mesh)
    assert previous.name == "base16@6, EMA 0.995"
    source = f"samples:{previous.identity}"
    evaluator = Evaluator([1.0, 9.0, 2.0, 8.0, 3.0, 7.0])
    _scorer(sr, evaluator, below=previous).score_new_checkpoints()
    everything = read_lines(sr.results_path)
    assert {r["metric"] for r in everything} == {FD, ACCURACY, PSNR}
    records = [r for r in everything if r["metric"] == FD]
    assert [(r["step"], r["low_res"], r["value"]) for r in records] == [
        (2, "real", 1.0),
        (2, source, 9.0),
        (4, "real", 2.0),
        (4, source, 8.0),
        (6, "real", 3.0),
        (6, source, 7.0),
    ]
    assert sr.chosen().step == 2  # by real input: stages are trained independently
    real_images, real_labels = evaluator.seen[0]
    assert real_images.shape == (40, 32, 32, 1)
    rows = np.arange(40) * 64 // 40
    np.testing.assert_array_equal(real_labels, SOURCE.raw.labels[rows])


def test_a_damaged_checkpoint_is_recorded_as_failed_once_and_passed_over(clean):
    folder = clean["base16"]
    data = max((folder.checkpoints / "4").rglob("d/*"), key=lambda p: p.stat().st_size)
    original = data.read_bytes()
    data.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        assert _scorer(folder, Evaluator([3.0, 2.0])).score_new_checkpoints() == 3
        failed = [r for r in read_lines(folder.results_path) if r["value"] is None]
        assert [r["step"] for r in failed] == [4]
        assert "has changed since it was written" in failed[0]["failed"]
        assert folder.chosen().step == 6
        assert _scorer(folder, Evaluator([])).score_new_checkpoints() == 0
        assert [r for r in read_lines(folder.results_path) if r["value"] is None] == failed
    finally:
        data.write_bytes(original)
    # Repaired, it has its score, and may be the best.
    assert _scorer(folder, Evaluator([1.0])).score_new_checkpoints() == 1
    assert folder.chosen().step == 4
    assert _scorer(folder, Evaluator([])).score_new_checkpoints() == 0


def test_an_error_of_the_system_condemns_no_checkpoint(clean, monkeypatch):
    folder = clean["base16"]

    def too_many(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.Checkpointer, "restore", too_many)
        with pytest.raises(UserError, match="Too many open files.*run the same command again"):
            _scorer(folder, Evaluator([])).score_new_checkpoints()
    assert not folder.results_path.exists()
    assert not folder.early_stop_path.exists()
    assert _scorer(folder, Evaluator([3.0, 2.0, 1.0])).score_new_checkpoints() == 3


def test_samples_do_not_depend_on_the_batch_size(clean):
    folder = clean["base16"]
    images = []
    for batch_size in (40, 16):
        config = round_trip(folder.read_config(), eval__batch_size=batch_size)
        evaluator = Evaluator([1.0] * 3)
        _scorer(folder, evaluator, config=config).score_new_checkpoints()
        images.append(evaluator.seen[0][0].astype(int))
        folder.results_path.unlink()
    # Another batch size may round a last bit, never draw other noise.
    assert np.abs(images[0] - images[1]).max() <= 1


def test_results_are_one_json_object_a_line(clean):
    folder = clean["base16"]
    _scorer(folder, Evaluator([3.0, 2.0, 1.0])).score_new_checkpoints()
    lines = folder.results_path.read_text().splitlines()
    assert len(lines) == 6
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert json.loads(folder.best_path.read_text())["step"] == 6


def test_every_ema_is_scored_and_the_best_is_chosen(tmp_path):
    config = _config(smallest_base, train__ema_decays=(0.05, 0.99), eval__ema_decays=(0.05, 0.99))
    folder = RunFolder(tmp_path)
    _train(config, folder.path)
    evaluator = Evaluator([3.0, 4.0, 5.0, 2.0, 6.0, 7.0])
    _scorer(folder, evaluator).score_new_checkpoints()
    chosen = folder.chosen()
    assert (chosen.step, chosen.ema_decay) == (4, 0.99)
    assert not np.array_equal(evaluator.seen[2][0], evaluator.seen[3][0])  # of two EMAs of one step
    assert len(list(folder.eval.glob("step_4_ema_*_none.png"))) == 2
    assert load_trained(folder, two_devices()).name == "base16@4, EMA 0.99"
    assert _scorer(folder, Evaluator([])).score_new_checkpoints() == 0


def test_the_identity_of_a_stage_changes_with_its_config_and_its_weights(clean, tmp_path):
    folder = RunFolder(tmp_path / "copy")
    shutil.copytree(clean["base16"].path, folder.path)
    folder.eval.mkdir(exist_ok=True)
    folder.best_path.write_text(json.dumps({"step": 6, "ema_decay": 0.995}))
    config = folder.read_config()
    mesh = two_devices()
    first = load_trained(folder, mesh).identity
    assert load_trained(folder, mesh).identity == first
    # How it is sampled is in the records besides.
    folder.write_config(round_trip(config, stage__sampler__num_steps=3))
    assert load_trained(folder, mesh).identity == first
    folder.write_config(round_trip(config, stage__diffusion__parameterization="eps"))
    assert load_trained(folder, mesh).identity != first
    folder.write_config(config)
    folder.best_path.write_text(json.dumps({"step": 4, "ema_decay": 0.995}))
    (folder.checkpoints / "6").rename(folder.checkpoints / "60")
    (folder.checkpoints / "4").rename(folder.checkpoints / "6")
    manifest.write_manifest(folder.checkpoints / "6", 6)
    folder.best_path.write_text(json.dumps({"step": 6, "ema_decay": 0.995}))
    assert load_trained(folder, mesh).identity != first


def test_labels_are_balanced():
    labels = generate.labels_of(np.arange(1000), 10)
    np.testing.assert_array_equal(np.bincount(labels), 100)
    np.testing.assert_array_equal(generate.labels_of(np.arange(3), 0), 0)


def test_samples_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="a sample of sr32 is not finite"):
        generate._checked_uint8(np.full((1, 2, 2, 1), np.nan, np.float32), "sr32")


def test_real_rows_are_spread_over_a_sorted_set():
    assert random_source(64).raw.labels[np.arange(40) * 64 // 40].tolist()[:3] == [0, 1, 3]


def test_killed_at_random_an_evaluation_records_what_an_unbroken_one_does(clean, tmp_path):
    folders = {name: RunFolder(tmp_path / name) for name in ("unbroken", "killed")}
    for folder in folders.values():
        shutil.copytree(clean["base16"].path, folder.path)
        folder.write_config(
            round_trip(folder.read_config(), eval__num_samples=1000, eval__batch_size=8)
        )
    unbroken, killed = (str(folder.path) for folder in folders.values())
    out = subprocess.run(
        [sys.executable, "-m", "tests.evaluation.killed_job", unbroken, "0", killed, "20"],
        cwd=ROOT,
        env=environment(QUICK_COMPILATION),
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    ).stdout
    survived = [int(line.split()[1]) for line in out.splitlines() if line.startswith("kills ")]
    assert survived[0] == 0
    assert survived[1] >= 10
    results = {}
    for name, folder in folders.items():
        results[name] = folder.results_path.read_text().splitlines()
        assert not list(folder.samples.iterdir())
    assert len(results["unbroken"]) == len(set(results["unbroken"]))
    # No partial and no double record, and every value the same to the bit.
    assert sorted(results["killed"]) == sorted(results["unbroken"])
    values = [json.loads(line) for line in results["killed"]]
    keys = [(r["step"], r["metric"]) for r in values]
    assert len(keys) == len(set(keys))
    assert {r["step"] for r in values} == {2, 4, 6}


def test_a_second_evaluation_of_a_run_is_refused(clean):
    folder = clean["base16"]
    message = f"another eval process (pid {os.getpid()})"
    with folder.writer_lock("eval"), pytest.raises(UserError, match=re.escape(message)):
        evaluate.main(["evaluate", f"--workdir={folder.path}"])
    assert read_lines(folder.results_path) == []


def _final(folder, mesh, *, num_samples=30, below=(), held_out=HELD_OUT):
    config = folder.read_config()
    trained = load_trained(folder, mesh)
    sampling = _sampling(config, trained.stage, mesh, num_samples=num_samples)
    source = sampling.alone(held_out)
    if below:
        samplers = [*(t.stage.config.sampler for t in below), config.stage.sampler]
        source = sampling.of_stages(below, samplers, [0.2], truncated=True, kind="cascade")
    evaluator = build_evaluator(config, folder, Extractor(), {"train": HELD_OUT, "val": HELD_OUT})
    levels = sampling.at_levels(HELD_OUT, num_images=8)
    order = final_order(folder, trained, evaluator.extractor, sampling, source, 16)
    team = Team(folder)
    return measure_final(folder, trained, evaluator, sampling, source, levels, order, team)


def test_final_numbers_are_one_table_one_json_and_the_samples(clean):
    base, folder = clean["base16"], clean["sr32"]
    for run in (base, folder):
        run.eval.mkdir(exist_ok=True)
        run.best_path.write_text(json.dumps({"step": 6, "ema_decay": 0.995}))
    mesh = two_devices()
    record = _final(folder, mesh)
    assert record == json.loads((folder.eval / "final_real.json").read_text())
    metrics = record["metrics"]
    assert metrics["fd_projection_30_train"] == metrics["fd_projection_30_val"] > 0
    assert {"kid_projection_30_val", "recall_projection_30_train", "is_projection_30"} <= set(
        metrics
    )
    assert record["references"]["train"]["num_images"] == 64
    assert record["references"]["val"]["features"] == "projection:1"
    levels = record["health"]["aug_response"]["aug_levels"]
    assert all((folder.eval / f"final_real_level_{x:g}.png").exists() for x in levels)
    table = (folder.eval / "final_real.md").read_text()
    assert all(f"| {name} | {value:.6g} |" in table for name, value in metrics.items())
    with np.load(folder.eval / "final_real.npz", allow_pickle=False) as stored:
        images, labels = stored["arr_0"], stored["arr_1"]
    assert (images.shape, images.dtype) == ((30, 32, 32, 1), np.uint8)
    np.testing.assert_array_equal(labels, HELD_OUT.spread_low_res(30, 16).labels)
    assert not list(folder.samples.iterdir())

    health = record["health"]
    real = HELD_OUT.whole(32).images
    np.testing.assert_allclose(
        health["channel_mean_drift"], images.mean((0, 1, 2)) - real.mean((0, 1, 2))
    )
    response = health["aug_response"]
    assert response["aug_levels"][0] == 0.0 == response["change"][0]
    assert response["aug_levels"][-1] == 1.0
    assert response["change"][-1] > 0
    assert health["psnr_low_res"]["min"] <= health["psnr_low_res"]["mean"]

    # What is known is not made again, unless it is of something else.
    made = (folder.eval / "final_real.npz").stat().st_mtime_ns
    assert _final(folder, mesh) == record
    assert (folder.eval / "final_real.npz").stat().st_mtime_ns == made
    (folder.eval / "final_real.md").unlink()
    assert _final(folder, mesh) == record
    assert (folder.eval / "final_real.md").read_text() == table
    assert _final(folder, mesh, num_samples=20)["num_samples"] == 20

    # Of few real images it is said how many they are.
    assert record["num_real_low_res"] == 30
    assert "Low-res input: real; " in table
    few = _final(folder, mesh, num_samples=10, held_out=dataclasses.replace(HELD_OUT, size=4))
    assert few["num_real_low_res"] == 4
    assert "Low-res input: real (4 images); " in (folder.eval / "final_real.md").read_text()

    # Of a truncated cascade there is no clean low-res input to compare with.
    cascade = _final(folder, mesh, below=[load_trained(base, mesh)])
    assert cascade["low_res"].startswith("cascade:base16@6")
    assert cascade["truncated"] is True
    assert "psnr_low_res" not in cascade["health"]
    assert (folder.eval / "final_cascade.npz").exists()


def test_a_reference_is_made_once(clean):
    folder = clean["base16"]
    config = folder.read_config()
    evaluator = build_evaluator(config, folder, Extractor(), {"train": HELD_OUT})
    assert evaluator.reference.startswith("noise:test:64:16px:crop none:resize area:")
    path = folder.eval / "reference_train.npz"
    before = path.stat().st_mtime_ns
    build_evaluator(config, folder, Extractor(), {"train": HELD_OUT})
    assert path.stat().st_mtime_ns == before


def test_stored_samples_are_enlarged_and_named(clean, tmp_path):
    folder = clean["sr32"]
    config = folder.read_config()
    stage = build_stage(config.stage)
    low_res = HELD_OUT.spread_low_res(40, 16)
    save_samples(tmp_path / "low.npz", low_res.images, low_res.labels)
    stored = open_images(str(tmp_path / "low.npz"), flag="low_res_samples")
    sampling = _sampling(config, stage, two_devices(), num_samples=40)
    of_file, of_real = sampling.of_file(stored), sampling.alone(HELD_OUT)
    assert of_file.record["low_res"] == f"file:low.npz:{stored.digest()}"
    few = sampling.alone(dataclasses.replace(HELD_OUT, size=4))
    assert (few.about, few.notes) == (
        "real (4 images, enlarged 10 times each)",
        {"num_real_low_res": 4},
    )
    assert (of_real.about, of_real.notes) == ("real", {"num_real_low_res": 40})
    # Scores are compared only if they are of the same images.
    which = [source.record["low_res_images"] for source in (few, of_real)]
    assert which[0] != which[1]
    assert [name.rpartition(":")[0] for name in which] == ["noise:test"] * 2
    assert {**few.record, "low_res_images": which[1]} == of_real.record
    params = jax.jit(stage.init)(jax.random.key(0))
    indices = np.arange(8)
    # The same images, whether they come from the data or from a file.
    for name, array in of_real.make(params, indices).items():
        np.testing.assert_array_equal(of_file.make(params, indices)[name], array)


def test_stored_low_res_images_are_what_is_enlarged(clean):
    """Whatever made them: an evaluation sees the inputs that training sees."""

    def read(rows):
        low_res = np.full((len(rows), 16, 16, 1), 7, np.uint8) + np.uint8(rows)[:, None, None, None]
        return {**examples(SOURCE, rows), "low_res": low_res}

    config = clean["sr32"].read_config()
    stored = dataclasses.replace(HELD_OUT, read=read)
    sampling = _sampling(config, build_stage(config.stage), two_devices(), num_samples=40)
    params = jax.jit(build_stage(config.stage).init)(jax.random.key(0))
    made = sampling.alone(stored).make(params, np.arange(8))
    np.testing.assert_array_equal(made["low_res"], stored.spread_low_res(40, 16).images[:8])
    assert (made["low_res"][0] == 7).all()
    levels = sampling.at_levels(stored, num_images=4)
    assert (levels.low_res[0] == 7).all()


def test_the_checkpoint_that_is_read_is_not_deleted(clean, tmp_path):
    config = round_trip(
        _config(smallest_base), checkpoint__save_every_steps=1, checkpoint__max_to_keep=1
    )
    folder = RunFolder(tmp_path)
    first = round_trip(config, train__train_steps=2)
    _train(first, folder.path)
    (step,) = manifest.finished_steps(folder)
    with pinned(folder, step):
        _train(config, folder.path)
        assert manifest.finished_steps(folder) == [step, 6]
    _train(round_trip(config, train__train_steps=7), folder.path)
    assert manifest.finished_steps(folder) == [7]


def test_curves_are_the_records(clean):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = clean["base16"]
    for distances in ([3.0, 2.0, 1.0], []):  # a second process adds nothing, and loses nothing
        scorer = _scorer(folder, Evaluator(distances))
        scorer.score_new_checkpoints()
        scorer.close()
        events = EventAccumulator(str(folder.eval)).Reload()
        points = events.Scalars(f"{FD}/low_res_none_ema_0.995")
        assert [(p.step, p.value) for p in points] == [(2, 3.0), (4, 2.0), (6, 1.0)]


def test_a_step_that_was_trained_again_is_scored_again(clean, tmp_path):
    folder = RunFolder(tmp_path)
    shutil.copytree(clean["base16"].path, folder.path, dirs_exist_ok=True)
    _scorer(folder, Evaluator([3.0, 2.0, 1.0])).score_new_checkpoints()
    assert folder.chosen().step == 6
    # As if step 6 had been lost, and saved anew with other weights.
    shutil.rmtree(folder.checkpoints / "6")
    shutil.copytree(folder.checkpoints / "4", folder.checkpoints / "6")
    manifest.write_manifest(folder.checkpoints / "6", 6)
    assert _scorer(folder, Evaluator([2.5])).score_new_checkpoints() == 1
    assert folder.chosen().step == 4
    assert _scorer(folder, Evaluator([])).score_new_checkpoints() == 0


def test_the_best_is_chosen_before_the_next_checkpoint_is_read(clean, monkeypatch):
    folder, chosen = clean["base16"], []

    def recording(run, step):
        chosen.append(None if run.best() is None else run.best()["step"])
        return pinned(run, step)

    monkeypatch.setattr(score, "pinned", recording)
    _scorer(folder, Evaluator([1.0, 2.0, 0.5])).score_new_checkpoints()
    assert chosen == [None, 2, 2]


def test_a_stored_batch_that_is_damaged_is_made_again(clean, monkeypatch):
    folder, damaged = clean["base16"], []
    original = generate.fill

    def fill(store, *args, **kwargs):
        original(store, *args, **kwargs)
        if not damaged:
            damaged.append(sorted(folder.samples.rglob("0*.npz"))[0])
            damaged[0].write_bytes(damaged[0].read_bytes()[:100])

    monkeypatch.setattr(generate, "fill", fill)
    assert _scorer(folder, Evaluator([3.0, 2.0, 1.0])).score_new_checkpoints() == 3
    assert all(r["value"] is not None for r in read_lines(folder.results_path))
