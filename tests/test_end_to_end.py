"""The demo's own commands on networks too small to be any good: every binary, as a user runs it.

Most have one layer; those of photos are U-Nets.
"""

import functools
import json
import re
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from PIL import Image

from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.data.arrays import load_mnist
from cascaded_diffusion.evaluation.features.classifier_extractor import load_or_train
from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages, Task
from cascaded_diffusion.evaluation.samples.sample_sources import shrunk
from cascaded_diffusion.runtime.mesh import build_mesh
from tests.binaries import TINY_NETWORK, Binaries, command, environment
from tests.data.photos import photo, write_tree
from tests.tiny import ROOT

METRICS = {
    f"{name}_classifier_40"
    for name in ("fd", "kid", "kid_std", "precision", "recall", "is", "is_std", "accuracy")
}


BINARIES = Binaries()
# Of 40 samples, the last batch is not full.
SMALLER_BATCHES = "--config.cascade.batch_size=12"


@pytest.fixture(scope="module", autouse=True)
def _end_of_the_process():
    yield
    BINARIES.close()


def _run(binary, *flags, code=0, one_layer=True):
    result = BINARIES.run(binary, *flags, one_layer=one_layer)
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-4000:]
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return result.stdout


def _fails(binary, *flags):
    result = BINARIES.run(binary, *flags)
    assert result.returncode == 2
    return result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both stages trained and scored."""
    root = tmp_path_factory.mktemp("RUN")
    out = {}
    for stage in ("base16", "sr32"):
        config = f"--config=configs/mnist_{stage}.py:smoke"
        out[stage] = _run("main", config, f"--workdir={root}/{stage}")
    out["eval_base"] = _run("evaluate", f"--workdir={root}/base16")
    out["eval_sr"] = _run("evaluate", f"--workdir={root}/sr32", f"--low_res_run={root}/base16")
    return root, out


def _share_classifier(root, run):
    """Spares a run the training of a classifier of 16 px, which is that of base16."""
    (run / "eval").mkdir(parents=True)
    shutil.copy(root / "base16" / "eval" / "classifier.npz", run / "eval")


def test_training_leaves_a_whole_run_folder(runs):
    root, out = runs
    for stage, sizes in (("base16", 16), ("sr32", 32)):
        folder = root / stage
        assert json.loads((folder / "config.json").read_text())["stage"]["resolution"] == sizes
        lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines] == list(range(1, 31))
        assert lines[-1]["loss"] < lines[0]["loss"]
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["15", "30"]
        assert list(folder.glob("events.out.tfevents.*"))
        assert "Total: " in out[stage]  # the parameter overview
        assert f"{stage}: finished, 30 steps" in out[stage]


def test_a_finished_run_says_so(runs):
    root, _ = runs
    out = _run("main", "--config=configs/mnist_base16.py:smoke", f"--workdir={root}/base16")
    assert "base16: finished, 30 steps" in out


def test_evaluation_scores_every_checkpoint_and_picks_one(runs):
    root, out = runs
    for stage, sources in (("base16", {"none"}), ("sr32", {"real", "samples:base16@30"})):
        lines = (root / stage / "eval" / "results.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert {r["low_res"] for r in records} == sources or stage == "sr32"
        assert {r["step"] for r in records} == {15, 30}
        names = {*METRICS, "psnr_low_res_40"} if stage == "sr32" else METRICS
        assert {r["metric"] for r in records} == names
        assert len(records) == 2 * len(names) * len(sources)
        best = json.loads((root / stage / "eval" / "best.json").read_text())
        assert best["metric"] == "fd_classifier_40"
        assert list((root / stage / "eval").glob("events.out.tfevents.*"))
        assert list((root / stage / "eval").glob("step_30_*.png"))
    assert "recognises 97." in out["eval_sr"] or "recognises 98." in out["eval_sr"]


@pytest.mark.parametrize(("stage", "resolution"), [("base16", 16), ("sr32", 32)])
def test_the_classifier_of_a_run_recognises_real_digits(runs, stage, resolution):
    root, _ = runs
    train, held_out = (
        shrunk(LabelledImages(*load_mnist(split)), resolution) for split in ("train", "test")
    )
    said, mesh = [], build_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    task = Task(network="small", num_classes=10, seed=0, mesh=mesh)
    path = root / stage / "eval" / "classifier.npz"
    found = load_or_train(path, task, train, held_out, say=said.append)
    assert found.accuracy >= 0.97
    features = found(held_out.images)
    assert (features.pooled.shape, features.logits.shape) == ((1000, 64), (1000, 10))
    assert (features.logits.argmax(-1) == held_out.labels).mean() == found.accuracy
    assert (found.name, found.identity) == ("classifier", f"classifier:{found.digest}")
    assert said == []  # the images and the seed are the run's


def test_the_cascade_is_sampled_truncated_or_not_and_measured(runs):
    root, _ = runs
    images, cascade = {}, "--config=configs/mnist_cascade32.py:smoke"
    for name, flags in {
        "whole": [],
        "batches": [SMALLER_BATCHES],
        "truncated": ["--config.cascade.truncated=True", "--config.cascade.aug_levels=(0.3,)"],
    }.items():
        _run(
            "sample",
            cascade,
            f"--workdir={root}",
            f"--output={root}/{name}",
            *flags,
        )
        with np.load(root / name / "samples.npz", allow_pickle=False) as stored:
            images[name] = stored["arr_0"].astype(int)
            np.testing.assert_array_equal(stored["arr_1"], np.arange(40) % 10)
            assert stored["arr_0"].dtype == np.uint8
        assert images[name].shape == (40, 32, 32, 1)
        picture = Image.open(root / name / "samples.png")
        assert picture.size[0] > 600
        # The classes' names, and five rows of images, twice as large, each below its caption.
        assert picture.size[1] == 18 + 5 * (18 + 2 * 34)
        # Ten classes, each with a caption above its four samples, three times as large.
        assert Image.open(root / name / "classes.png").size[1] == 10 * (18 + 3 * 34)
        assert (root / name / "base16.npz").exists()
    # Rounding may move a pixel that is handed on by one grey level.
    assert np.abs(images["whole"] - images["batches"]).max() <= 2
    assert np.abs(images["whole"] - images["truncated"]).max() > 1

    out = _run("evaluate", f"--workdir={root}/sr32", f"--samples={root}/whole/samples.npz")
    record = json.loads(out.splitlines()[-1])
    assert record["num_samples"] == 40
    assert record["fd_classifier_40"] > 0
    assert 0 <= record["accuracy_classifier_40"] <= 1
    assert set(record) >= METRICS

    # The final numbers of the cascade are of the same images.
    measure = ["evaluate", "--final", f"--workdir={root}", cascade]
    assert "for the samples to be class-balanced" in _fails(*measure, "--num_samples=25")
    chosen_by = "config.cascade.seed = 0 is also config.eval.seed of base16, sr32, by whose samples"
    assert chosen_by in _run(*measure, "--num_samples=40", "--config.cascade.seed=0")
    assert "config.cascade.seed" not in _run(*measure, "--num_samples=40")
    final = json.loads((root / "sr32" / "eval" / "final_cascade.json").read_text())
    for name in METRICS - {"accuracy_classifier_40", "is_classifier_40", "is_std_classifier_40"}:
        assert final["metrics"][f"{name}_train"] == pytest.approx(record[name], rel=1e-6), name
        assert f"{name}_val" in final["metrics"]
    with np.load(root / "sr32" / "eval" / "final_cascade.npz", allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["arr_0"], images["whole"])

    flags = [f"--workdir={root}/sr32", f"--samples={root}/whole/samples.npz", "--epochs=1"]
    out = _run("evaluate", "--cas", *flags)
    cas = json.loads(out.splitlines()[-1])
    assert (cas["network"], cas["test_images"]) == ("resnet", 1000)
    assert cas["generated"]["num_images"] == 40
    _run("report", f"--workdir={root}")
    page = (root / "report.html").read_text()
    for text in ("fd_classifier_40_val", "recall_classifier_40", "trained on generated images"):
        assert text in page


def test_three_stages_are_chained_and_searched_from_config_alone(runs):
    root, _ = runs
    _share_classifier(root, root / "sr16")
    for stage in ("base8", "sr16"):
        _run("main", f"--config=configs/mnist_{stage}.py:smoke", f"--workdir={root}/{stage}")
        _run("evaluate", f"--workdir={root}/{stage}")
    cascade = "--config=configs/mnist_cascade8to32.py:smoke"
    _run("sample", cascade, f"--workdir={root}", f"--output={root}/three")
    for name, size in (("base8", 8), ("sr16", 16), ("samples", 32)):
        with np.load(root / "three" / f"{name}.npz", allow_pickle=False) as stored:
            assert stored["arr_0"].shape == (40, size, size, 1)

    out = _run(
        "evaluate",
        "--sweep",
        cascade,
        f"--workdir={root}",
        "--stage=sr16",
        "--aug_levels=0,0.3",
        "--truncated=false,true",
        "--write_best",
    )
    assert "sr16: best is aug_level" in out
    records = [json.loads(x) for x in (root / "sweep" / "sr16.jsonl").read_text().splitlines()]
    assert [record["seed"] for record in records] == [0] * 4  # that of the runs' config.eval
    at_zero = {r["truncated"]: r["fd_classifier_40"] for r in records if r["aug_levels"] == [0.0]}
    assert at_zero[True] == at_zero[False]
    best = min(records, key=lambda r: r["fd_classifier_40"])
    written = json.loads((root / "cascade.json").read_text())["cascade"]
    assert written["aug_levels"] == [best["aug_levels"][0], 0.1]
    assert (written["truncated"], written["seed"]) == (best["truncated"], 1)
    # What the search wrote is what sampling and the next search use without --config.
    out = _run("sample", f"--workdir={root}", f"--output={root}/best")
    assert f"aug_level ({best['aug_levels'][0]}, 0.1)" in out


def test_bits_per_dim_of_a_split(runs):
    root, _ = runs
    flags = ["--num_images=30", "--num_steps=20"]
    out = _run("evaluate", f"--workdir={root}/base16", "--bits_per_dim=test", *flags)
    record = json.loads(out.splitlines()[-1])
    assert record["num_images"] == 30
    assert record["reference"] == "mnist:test:16px"
    assert (record["chain"]["num_steps"], record["chain"]["variance"]) == (20, "large")
    assert 0 < record["standard_error"] < record["value"] < 100  # hardly trained, few steps


def test_sigterm_saves_and_exits_with_75_and_the_same_command_goes_on(tmp_path):
    flags = [
        "--config=configs/mnist_base16.py:smoke",
        f"--workdir={tmp_path}/run",
        "--config.train.train_steps=100000",
        "--config.train.lr_decay=none",  # the same program for any number of steps
        "--config.train.warmup_steps=3",
        "--config.train.sample_every_steps=None",
        "--config.checkpoint.save_every_steps=100000",
    ]
    process = subprocess.Popen(
        command("main", *flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

        # A second trainer on the same folder is refused and harms nothing.
        second = BINARIES.run("main", *flags)
        assert second.returncode == 2
        assert f"another train process (pid {process.pid})" in second.stderr

        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75
    assert "stopped by a signal" in out
    (step,) = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    again = _run("main", *(f.replace("steps=100000", f"steps={step + 2}") for f in flags))
    assert f"resuming from step {step}" in again
    assert f"finished, {step + 2} steps" in again


def test_an_evaluation_that_follows_the_run_ends_it(runs, tmp_path):
    # With no learning to speak of, a score that is no better than the last comes soon.
    run = f"--workdir={tmp_path}/run"
    root, _ = runs
    _share_classifier(root, tmp_path / "run")
    trainer = subprocess.Popen(
        command(
            "main",
            "--config=configs/mnist_base16.py:smoke",
            run,
            "--config.train.train_steps=1000000",
            "--config.train.learning_rate=1e-12",
            "--config.stage.diffusion.parameterization=v",
            "--config.train.warmup_steps=0",
            "--config.train.sample_every_steps=None",
            "--config.checkpoint.save_every_steps=200",
            "--config.eval.patience_evals=1",
            "--config.eval.num_samples=10",
        ),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "run" / "config.json").exists():
            assert trainer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        followed = _run("evaluate", run, "--follow")
        out, _ = trainer.communicate(timeout=60)
    finally:
        trainer.kill()
    assert trainer.returncode == 0
    assert "stopped early" in out
    assert "best is step" in followed
    assert followed.count("best is") < 4  # not at every look
    assert json.loads((tmp_path / "run" / "TRAIN_COMPLETE").read_text())["reason"] == "early_stop"


def test_photos_from_a_folder_are_prepared_shown_and_trained_on(tmp_path):
    with_unet = functools.partial(_run, one_layer=False)
    write_tree(tmp_path / "photos", "train", per_class=20)
    write_tree(tmp_path / "photos", "test", per_class=14)
    flags = [
        "--config=configs/cifar10_sr32.py:smoke",
        *TINY_NETWORK,
        "--config.data.name=folder",
        f"--config.data.path={tmp_path}/photos",
        "--config.data.resolution=32",
        "--config.stage.num_classes=3",
        "--config.eval.num_samples=30",
        "--config.eval.final_num_samples=30",
        "--config.train.train_steps=6",
        "--config.train.lr_decay=none",  # the same program for any number of steps
        "--config.train.warmup_steps=1",
        "--config.train.log_every_steps=1",
        "--config.train.sample_every_steps=None",
        "--config.checkpoint.save_every_steps=3",
    ]
    prepared = f"--config.data.prepared_dir={tmp_path}/prepared"
    assert "train: 60 images at 32 px" in with_unet("prepare", *flags, prepared)
    out = with_unet(
        "data", *flags, prepared, "--show", f"--output={tmp_path}/data.png", "--secs=0.2"
    )
    assert "3 classes, 20 to 20 images each" in out
    assert Image.open(tmp_path / "data.png").size[0] > 500

    # Prepared, or decoded by other processes: the same training, to the bit.
    curves = []
    for name, how in {"a": [prepared], "b": ["--config.data.read_workers=2"]}.items():
        out = with_unet("main", *flags, *how, f"--workdir={tmp_path}/{name}")
        assert "sr32: finished, 6 steps" in out
        records = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").open()]
        assert all(0 <= r["data_wait_fraction"] <= 1 for r in records)
        assert {r["data_skipped_records"] for r in records} == {0}
        curves.append([(r["step"], r["loss"], r["grad_norm"]) for r in records])
    assert curves[0] == curves[1]
    # And from the one to the other.
    longer = [f.replace("train_steps=6", "train_steps=8") for f in flags]
    assert "resuming from step 6" in with_unet("main", *longer, f"--workdir={tmp_path}/a")

    (tmp_path / "photos" / "train" / "bee" / "new.jpg").write_bytes(photo(1))
    even_longer = [f.replace("train_steps=6", "train_steps=9") for f in flags]
    with_unet("main", *even_longer, f"--workdir={tmp_path}/a", code=2)


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        (b"", [], r"error: .*bee/003.jpg: empty, 0 bytes; replace it, or train without"),
        (b"", ["--config.data.read_workers=1"], r"error: .*bee/003.jpg: empty, 0 bytes; replace"),
        (None, ["--config.data.train_split=val"], "error: .* = 'val': no such folder in .*: train"),
        (None, ["--config.stage.num_classes=4"], "error: config.stage.num_classes = 4: expected 3"),
        (None, ["--config.data.path=/nowhere"], "error: config.data.path = '/nowhere': no such"),
        (None, ["--config.data.prepared_dir=P"], "error: .* is not prepared in .*/P/folder/train"),
        (None, ["--config.data.name=cifar100"], "error: .*'cifar100': not found in .*prepare"),
    ],
)
def test_bad_data_ends_in_one_line(tmp_path, damage, flags, message):
    write_tree(tmp_path, per_class=8)
    if damage is not None:
        (tmp_path / "train" / "bee" / "003.jpg").write_bytes(damage)
    result = BINARIES.run(
        "main",
        "--config=configs/cifar10_sr32.py:smoke",
        *TINY_NETWORK,
        "--config.data.name=folder",
        f"--config.data.path={tmp_path}",
        "--config.data.resolution=32",
        "--config.data.eval_split=train[:2]",
        "--config.stage.num_classes=3",
        "--config.eval.num_samples=60",
        "--config.eval.final_num_samples=60",
        f"--workdir={tmp_path}/run",
        *flags,
    )
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert re.search(message, line), line
    if damage is None:
        assert not (tmp_path / "run").exists()


def test_samples_of_two_processes_and_of_a_killed_job_are_those_of_one(runs, tmp_path):
    root, _ = runs
    flags = ["--config=configs/mnist_cascade32.py:smoke", f"--workdir={root}"]
    flags.append(SMALLER_BATCHES)

    def samples(name):
        with np.load(tmp_path / name / "samples.npz") as stored:
            return stored["arr_0"], stored["arr_1"]

    _run("sample", *flags, f"--output={tmp_path}/whole")
    images, labels = samples("whole")
    assert images.shape == (40, 32, 32, 1)

    killed = subprocess.Popen(
        command("sample", *flags, f"--output={tmp_path}/killed"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").rglob("000000.npz")) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "samples.npz").exists()
    _run("sample", *flags, f"--output={tmp_path}/killed")
    np.testing.assert_array_equal(samples("killed")[0], images)
    assert not (tmp_path / "killed" / ".batches").exists()

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        job = [f"--coordinator=127.0.0.1:{s.getsockname()[1]}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            command("sample", *flags, f"--output={tmp_path}/two", *job, f"--process_id={i}"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    texts = [p.communicate(timeout=200)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "".join(texts)
    # The first writes; each has made a part, the first every other batch of four.
    assert "24/24 samples" in texts[0]
    found, found_labels = samples("two")
    np.testing.assert_array_equal(found_labels, labels)
    assert np.abs(found.astype(int) - images).max() <= 2
