"""`sample` in this process, on a cascade of three stages that were never trained."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from cascaded_diffusion import sample
from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.commands import config_flags
from cascaded_diffusion.commands.sample_inputs import define_inputs, read_request
from cascaded_diffusion.config.run_checks import cascade_config_from, run_config_from
from cascaded_diffusion.config.schema import ema_name, to_dict
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples import cascade_samples, generate, sample_request
from cascaded_diffusion.evaluation.samples.sample_store import SampleStore
from cascaded_diffusion.files.json_files import write_json
from cascaded_diffusion.runtime.checkpoint import CheckpointWriter
from cascaded_diffusion.runtime.run_folder import CascadeFolder, RunFolder
from tests.tiny import config_values, with_overrides

pytestmark = pytest.mark.usefixtures("one_layer")
STAGES = ("base8", "sr16", "sr32")
NUM = 24
RNG = np.random.default_rng(0)


def _write_run(path, config):
    """A run whose chosen checkpoint holds weights at random."""
    folder = RunFolder(path)
    folder.write_config(config)
    shapes = jax.eval_shape(build_stage(config.stage).init, jax.random.key(0))
    params = jax.tree.map(lambda x: 0.1 * RNG.standard_normal(x.shape, np.float32), shapes)
    params = jax.device_put(params, jax.devices()[0])
    (decay,) = config.train.ema_decays
    writer = CheckpointWriter(folder, config.checkpoint)
    writer.save(1, {"ema_params": {ema_name(decay): params}})
    writer.wait(1)
    writer.close()
    folder.eval.mkdir(exist_ok=True)
    folder.best_path.write_text(json.dumps({"step": 1, "ema_decay": decay}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The stages' runs, the cascade that a sweep would leave, and its samples."""
    root = tmp_path_factory.mktemp("RUN")
    for name in STAGES:
        values = config_values(f"mnist_{name}")
        sizes = {"stage.network.channels": 8, "stage.network.num_heads": 2}
        sampler = {"stage.sampler.num_steps": 2, "stage.sampler.guidance_scale": 1.0}
        sampler["eval.batch_size"] = 8
        _write_run(root / name, run_config_from(with_overrides(values, sizes | sampler)))
    values = config_values("mnist_cascade8to32")
    values["cascade"] |= {"num_samples": NUM, "batch_size": 8}
    for sampler in values["cascade"]["samplers"]:
        sampler |= {"num_steps": 2, "guidance_scale": 1.0}
    write_json(CascadeFolder(root).cascade_path, to_dict(cascade_config_from(values)))
    _sample(root)
    return root


def _sample(root, *argv):
    assert sample.main(["sample", f"--workdir={root}", *argv]) == 0


def _arrays(path):
    with np.load(path, allow_pickle=False) as stored:
        return stored["arr_0"], stored["arr_1"]


def _refused(root, *argv):
    with pytest.raises(UserError) as e:
        sample.main(["sample", f"--workdir={root}", *argv])
    assert "\n" not in str(e.value)
    return str(e.value)


def _request(root, *argv):
    fv = flags.FlagValues()
    argv = ["sample", f"--workdir={root}", *argv]
    config_flags.define_config(fv, argv, "")
    define_inputs(fv)
    config_flags.parse(fv, argv, "")
    return read_request(fv, argv)


def test_enlarging_what_the_cascade_made_gives_what_it_made_of_it(runs, tmp_path):
    images, labels = _arrays(runs / "samples" / "samples.npz")
    middle, _ = _arrays(runs / "samples" / "sr16.npz")
    assert (images.shape, images.std() > 1) == ((NUM, 32, 32, 1), True)
    np.testing.assert_array_equal(labels, np.arange(NUM) % 10)

    # From the first enlargement on, with the labels that are in the file.
    _sample(runs, f"--low_res={runs}/samples/base8.npz")
    found, found_labels = _arrays(runs / "enlarged" / "samples.npz")
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(found_labels, labels)
    np.testing.assert_array_equal(_arrays(runs / "enlarged" / "sr16.npz")[0], middle)
    assert not (runs / "enlarged" / "base8.npz").exists()
    assert not (runs / "enlarged" / ".batches").exists()
    with Image.open(runs / "enlarged" / "samples.png") as picture:
        assert picture.size[0] > 10 * 96

    # The stage that takes images of their size is the first; a given image is not noisy, also
    # where the cascade would have stopped the chain below. Files are in order of their names.
    for i, image in enumerate(middle):
        path = tmp_path / "given" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    _sample(
        runs,
        f"--low_res={tmp_path}/given",
        "--labels=0,1,2,3,4,5,6,7,8,9",
        "--config.cascade.truncated=True",
        f"--output={tmp_path}/out",
        "--png",
    )
    found, found_labels = _arrays(tmp_path / "out" / "samples.npz")
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(found_labels, labels)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("samples.npz", "samples.png", "png", "samples.json", ".sample.lock")
    }
    assert sorted(p.name for p in (tmp_path / "out" / "png").iterdir()) == [
        f"{i:02d}.png" for i in range(NUM)
    ]
    with Image.open(tmp_path / "out" / "png" / "07.png") as image:
        np.testing.assert_array_equal(np.asarray(image), images[7, ..., 0])

    # One run is enough; what it takes from its config can be set.
    _sample(
        runs / "sr32",
        f"--low_res={runs}/samples/sr16.npz",
        "--config.cascade.aug_levels=(0.1,)",
        f"--output={tmp_path}/alone",
    )
    alone, _ = _arrays(tmp_path / "alone" / "samples.npz")
    # Its place in the cascade is another, and with it the noise.
    assert alone.shape == images.shape
    assert (alone != images).any()


def test_a_folder_of_samples_says_how_they_were_made(runs, tmp_path, monkeypatch):
    _sample(runs, f"--output={tmp_path}", "--config.cascade.seed=5")
    about = json.loads((tmp_path / "samples.json").read_text())
    assert (about["seed"], about["num_samples"], about["aug_levels"]) == (5, NUM, [0.2, 0.1])
    assert [s.split(",")[0] for s in about["stages"]] == [f"{name}@1" for name in STAGES]
    assert [s["num_steps"] for s in about["samplers"]] == [2, 2, 2]
    assert set(about["files"]) == {p.name for p in tmp_path.iterdir()} - {".sample.lock"}

    # An enlargement of these belongs to other files, and what was said of the first is not said of
    # it, not even if it ends too early.
    argv = (f"--output={tmp_path}", f"--low_res={runs}/samples/base8.npz")
    with monkeypatch.context() as m:
        m.setattr(cascade_samples.pictures, "save_png", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _sample(runs, *argv)
    assert not (tmp_path / "samples.json").exists()
    _sample(runs, *argv)
    again = json.loads((tmp_path / "samples.json").read_text())
    assert again["files"] == ["sr16.npz", "samples.npz", "samples.png", "samples.json"]
    assert (again["low_res"] is None, about["low_res"] is None) == (False, True)


def test_chosen_classes_and_their_number(runs, tmp_path, capsys):
    _sample(
        runs, "--labels=0,7", "--config.cascade.num_samples=7", f"--output={tmp_path}/a", "--png"
    )
    images, labels = _arrays(tmp_path / "a" / "samples.npz")
    np.testing.assert_array_equal(labels, [0, 7, 0, 7, 0, 7, 0])
    out = capsys.readouterr().out
    assert "cascade: 7/7 samples" in out
    assert "7 samples of classes 0, 7, 8 px -> 16 px -> 32 px" in out
    assert (tmp_path / "a" / "classes.png").exists()
    files = sorted((tmp_path / "a" / "png").iterdir())
    assert [p.name for p in files] == [f"{i:06d}.png" for i in range(7)]
    with Image.open(files[5]) as image:
        np.testing.assert_array_equal(np.asarray(image), images[5, ..., 0])
    # Sample i is a function of (seed, i) and its label.
    whole, whole_labels = _arrays(runs / "samples" / "samples.npz")
    assert whole_labels[0] == 0
    assert np.abs(images[0].astype(int) - whole[0]).max() <= 2

    assert "a/png has the images of other samples" in _refused(
        runs, "--png", f"--output={tmp_path}/a"
    )

    # The same command may be run again.
    same = ["--labels=0,7", "--config.cascade.num_samples=7", f"--output={tmp_path}/a"]
    assert len(_request(runs, "--png", *same).png_paths) == 7
    assert "a/png has the images of other samples" in _refused(runs, *same)

    _sample(runs, "--labels=0,7", "--per_class=2")
    images_of_each, labels = _arrays(runs / "chosen_classes" / "samples.npz")
    np.testing.assert_array_equal(labels, [0, 7, 0, 7])
    assert np.abs(images_of_each.astype(int) - images[:4]).max() <= 2
    assert "4/4 samples" in capsys.readouterr().out


def test_what_is_asked_for(runs, tmp_path):
    assert _request(runs).labels.tolist() == list(range(10))
    request = _request(runs, "--per_class=8")
    assert (request.config.cascade.num_samples, request.labels.tolist()) == (80, list(range(10)))
    assert request.output.path == runs / "chosen_classes"
    # MNIST's classes are named by digits, which are numbers already.
    assert _request(runs, "--labels= 3 ,7").labels.tolist() == [3, 7]
    (tmp_path / "labels.txt").write_text("4\n5\n4\n\n")
    assert _request(runs, f"--labels={tmp_path}/labels.txt").labels.tolist() == [4, 5, 4]
    request = _request(runs, f"--labels={tmp_path}/labels.txt", "--per_class=3")
    assert (request.config.cascade.num_samples, request.labels.tolist()) == (6, [4, 5])
    np.save(tmp_path / "labels.npy", np.asarray([1, 2]))
    assert _request(runs, f"--labels={tmp_path}/labels.npy").labels.tolist() == [1, 2]
    samples = f"{runs}/samples/samples.npz"
    assert len(_request(runs, f"--labels={samples}").labels) == NUM
    assert _request(runs / "base8").stages[0].name == "base8"
    one, _ = _arrays(runs / "samples" / "base8.npz")
    np.savez(tmp_path / "one.npz", arr_0=one[:1])
    request = _request(runs, f"--low_res={tmp_path}/one.npz", "--labels=3")
    assert (len(request.low_res.images), request.config.cascade.num_samples) == (1, 1)


def test_classes_by_name(runs, monkeypatch):
    assert "the run in" in _refused(runs, "--labels=bee")  # it does not say what they are called
    names = ("ant", "bee", *"cdefghij")
    monkeypatch.setattr(sample_request, "trained_classes", lambda folder: names)
    request = _request(runs, "--labels=bee,3")
    assert (request.labels.tolist(), request.class_names) == ([1, 3], {1: "bee"})
    assert "of classes 1 (bee), 3, " in request.title()
    assert "no class is called 'cow'; there are: ant, bee, c" in _refused(runs, "--labels=cow")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--labels=3,10"], "--labels=3,10: labels from 3 to 10, expected 0 to 9"),
        (["--labels=-1"], "--labels=-1: labels from -1 to -1, expected"),
        (["--labels="], "--labels=: expected classes, by numbers or names"),
        (["--labels=3,,4"], "--labels=3,,4: expected classes"),
        (["--labels=gone.txt"], "--labels=gone.txt: no such file"),
        (
            ["--labels=gs://bucket/b.npz"],
            "--labels=gs://bucket/b.npz: expected a path on this machine",
        ),
        (["--labels=1,2", "--config.cascade.num_samples=1"], "2 labels for 1 samples"),
        (["--per_class=2", "--config.cascade.num_samples=1"], "expected none with --per_class"),
        (["--low_res={samples}/base8.npz", "--per_class=2"], "--per_class=2: expected none with"),
        (
            ["--low_res={samples}/base8.npz", "--config.cascade.num_samples=2"],
            "expected none with --low_res, which says how many",
        ),
        (["--resize_low_res=8"], "--resize_low_res=8: --low_res is missing"),
        (
            ["--low_res={samples}/base8.npz", "--resize_low_res=9"],
            "--resize_low_res=9: expected 8 or 16, the sizes that the cascade enlarges",
        ),
        (
            ["--low_res={samples}/samples.npz"],
            "image 0 is 32 x 32 pixels, expected 8 x 8 or 16 x 16, as the cascade enlarges;"
            " --resize_low_res=16",
        ),
        (["--low_res=gs://bucket/x"], "--low_res=gs://bucket/x: expected a path on this machine"),
        (["--low_res=[x]"], "contains '['"),
        (["--output=ftp://bucket/x"], "--output=ftp://bucket/x: expected a path on this machine"),
        (["--output={samples}/base8.npz"], "base8.npz is not a folder"),
        (["--low_res={samples}/gone.png"], "gone.png: no such file or folder"),
        (["--low_res={samples}/rgb.npz"], "expected 1 channel"),
        (["--low_res={samples}/8.png"], "10 classes and the images have no labels; give"),
        (["--low_res={samples}/8.png", "--labels=1,2"], "2 labels for 1 images"),
        (["--low_res={samples}/bad.npz"], "arr_1: labels from 0 to 11, expected 0 to 9"),
    ],
)
def test_what_cannot_be_is_refused(runs, tmp_path, argv, message):
    images, _ = _arrays(runs / "samples" / "base8.npz")
    Image.fromarray(images[0, ..., 0]).save(runs / "samples" / "8.png")
    np.savez(runs / "samples" / "rgb.npz", arr_0=images[:2].repeat(3, axis=-1))
    np.savez(runs / "samples" / "bad.npz", arr_0=images[:2], arr_1=np.asarray([0, 11]))
    before = sorted(runs.rglob("*"))
    assert message in _refused(runs, *(arg.format(samples=runs / "samples") for arg in argv))
    assert sorted(runs.rglob("*")) == before


def test_what_is_given_is_not_written_over(runs, tmp_path):
    images, _ = _arrays(runs / "samples" / "base8.npz")
    (tmp_path / "given").mkdir()
    Image.fromarray(images[0, ..., 0]).save(tmp_path / "given" / "1.png")
    np.savez(tmp_path / "sr16.npz", arr_0=images)
    message = "are there; choose another folder"
    for low_res, output in (("given", "given"), ("given", "given/out"), ("sr16.npz", ".")):
        argv = [f"--low_res={tmp_path}/{low_res}", "--labels=1", f"--output={tmp_path}/{output}"]
        assert message in _refused(runs, *argv)
    assert _request(runs, *argv[:2], f"--output={tmp_path}/out").first == 1

    # Images in a folder `png` beside which the output's own would be.
    (tmp_path / "given").rename(tmp_path / "png")
    for low_res in ("png", "png/1.png"):
        argv = [f"--low_res={tmp_path}/{low_res}", "--labels=1", f"--output={tmp_path}"]
        assert message in _refused(runs, *argv, "--png")


def test_a_run_of_the_wrong_kind_is_refused(runs):
    low_res = f"--low_res={runs}/samples/base8.npz"
    assert "'base8' in" in _refused(runs / "base8", low_res)
    assert "'sr16' there enlarges images: give them by --low_res" in _refused(runs / "sr16")
    message = _refused(runs / "sr16", low_res, "--config.cascade.aug_levels=(1.5,)")
    assert "config.cascade.aug_levels" in message


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(runs, tmp_path, monkeypatch, capsys):
    write, argv = SampleStore.write, [f"--low_res={runs}/samples/sr16.npz"]
    argv.append(f"--output={tmp_path}/out")

    def full(self, batch, arrays):
        if batch == 1:
            raise OSError(28, "No space left on device")
        write(self, batch, arrays)

    monkeypatch.setattr(SampleStore, "write", full)
    message = f"--output={tmp_path}/out: cannot be written (No space left on device)"
    assert _refused(runs, *argv) == message
    monkeypatch.setattr(SampleStore, "write", write)

    # Other samples are told of it: their command would not go on with these.
    request = _request(runs, *argv)
    store = SampleStore(tmp_path / "out" / ".batches", {}, num_samples=NUM, batch_size=4)
    (other,) = store.others()
    assert (other.num_samples, other.settings["batch_size"]) == (8, 8)
    store.remove()
    changed = dataclasses.replace(request, labels=(request.labels + 1) % 10)
    assert changed.identity() != request.identity()
    images = request.low_res.images.copy()
    images[3, 2, 1] ^= 1
    low_res = dataclasses.replace(request.low_res, images=images)
    assert dataclasses.replace(request, low_res=low_res).identity() != request.identity()

    made = []
    monkeypatch.setattr(
        SampleStore, "write", lambda self, *args: (made.append(args[0]), write(self, *args))
    )
    _sample(runs, *argv)
    assert made == [1, 2]
    np.testing.assert_array_equal(
        _arrays(tmp_path / "out" / "samples.npz")[0], _arrays(runs / "samples" / "samples.npz")[0]
    )

    # While the results are written, too.
    def cannot(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        "cascaded_diffusion.evaluation.samples.cascade_samples.save_sample_batches", cannot
    )
    assert _refused(runs, *argv) == message


def test_unfinished_samples_of_other_settings_are_named(runs, tmp_path, capsys):
    parent = tmp_path / "out" / ".batches"
    store = SampleStore(parent, {"seed": 1}, num_samples=12, batch_size=5)
    for batch in (0, 2):
        images = np.zeros((len(store.rows(batch)), 8, 8, 1), np.uint8)
        store.write(batch, {"images_0": images, "labels": np.zeros(len(images), np.int64)})
    _sample(runs / "base8", "--labels=1", "--per_class=1", f"--output={tmp_path}/out")
    (line,) = [x for x in capsys.readouterr().out.splitlines() if ".batches" in x]
    assert "10 of 12 samples (0.0 MB) that were made with other settings (batches of 5)" in line
    assert store.missing() == [1]


def test_samples_that_are_not_finite_are_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "_uint8_and_finite", lambda x: (x, False))
    argv = ["--labels=1", "--per_class=1", f"--output={tmp_path}/out"]
    message = _refused(runs / "base8", *argv)
    assert message.startswith("a sample of base8 is not finite: lower config.cascade.samplers")
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_pictures_of_one_small_image_have_whole_captions(runs, tmp_path):
    data = io.BytesIO()
    Image.fromarray(_arrays(runs / "samples" / "base8.npz")[0][0, ..., 0]).save(data, "WEBP")
    (tmp_path / "cat.webp").write_bytes(data.getvalue())
    argv = ["--labels=5", "--png", f"--output={tmp_path}/out"]
    _sample(runs / "sr16", f"--low_res={tmp_path}/cat.webp", *argv)
    assert [p.name for p in (tmp_path / "out" / "png").iterdir()] == ["cat.png"]
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.size[0] > 200
