"""What a notebook calls: a cascade in memory, training on arrays, samplers of one's own."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cascaded_diffusion as cd
from cascaded_diffusion.cascade.sampler import step_of
from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.diffusion.gaussian import diffuse, predict_eps_from_x0
from cascaded_diffusion.diffusion.schedules import make_cosine_schedule
from cascaded_diffusion.runtime.manifest import finished_steps
from cascaded_diffusion.runtime.mesh import build_mesh
from tests.one_layer import in_place_of_the_unet
from tests.tiny import ROOT, smallest_base, smallest_sr

RUN = {
    "train__train_steps": 2,
    "train__warmup_steps": 0,
    "checkpoint__save_every_steps": 2,
    "stage__sampler__name": "ddim",
    "stage__sampler__eta": 0.0,
    "stage__sampler__num_steps": 3,
    "stage__sampler__guidance_scale": 1.0,
}
CASCADE = str(ROOT / "configs" / "mnist_cascade32.py:smoke")


def euler(denoise, at):
    prediction = denoise(at.xt, at.logsnr_t)
    return diffuse(prediction.x0, at.logsnr_s, prediction.eps), prediction


def drawn(count=100, size=32):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size, size, 1), np.uint8)
    return images, (np.arange(count) % 10).astype(np.int32)


def one_device():
    return build_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def _network():
    with in_place_of_the_unet():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base and a super-resolution stage, trained on arrays for two steps."""
    folder = tmp_path_factory.mktemp("runs")
    images, labels = drawn()
    for name, make in (("base16", smallest_base), ("sr32", smallest_sr)):
        run = cd.train(make(**RUN), images=images, labels=labels, workdir=folder / name)
        assert finished_steps(run) == [2]
    return folder


@pytest.fixture(scope="module")
def cascade(runs):
    config = cd.load_config(CASCADE, {"cascade.samplers": _samplers(runs)})
    return cd.load_cascade(runs, config, mesh=one_device())


def _samplers(runs):
    configs = [cd.RunFolder(runs / name).read_config() for name in ("base16", "sr32")]
    return [dataclasses.asdict(config.stage.sampler) for config in configs]


def test_a_cascade_makes_images_of_the_labels_asked_for(cascade):
    images = cascade.sample(labels=[3, 7, 3], seed=1)
    assert images.shape == (3, 32, 32, 1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(cascade.sample(labels=[3, 7, 3], seed=1, batch_size=1), images)
    assert (cascade.sample(labels=[3, 7, 3], seed=2) != images).any()
    assert len(cascade.sample()) == 10  # every class once
    assert len(cascade.sample(labels=[1, 2], num=5)) == 5


def test_stages_are_those_of_the_cascade_and_enlarge_alone(cascade):
    small, large = cascade.sample_stages(labels=[1, 2], truncated=False)
    assert (small.shape, large.shape) == ((2, 16, 16, 1), (2, 32, 32, 1))
    again = cascade.enlarge(small, labels=[1, 2])
    np.testing.assert_array_equal(again, large)
    other = cascade.sample(labels=[1, 2], truncated=False, aug_levels=(0.4,))
    assert (other != large).any()


def test_one_run_is_a_cascade_of_its_own(runs):
    base = cd.load_cascade(runs / "base16", mesh=one_device())
    assert base.sample(labels=[5]).shape == (1, 16, 16, 1)
    top = cd.load_cascade(runs / "sr32", mesh=one_device())
    low_res = drawn(2, 16)[0]
    assert top.enlarge(low_res, labels=[0, 1]).shape == (2, 32, 32, 1)
    with pytest.raises(cd.UserError, match="this stage enlarges images: give them, by `enlarge`"):
        top.sample(labels=[1])


def test_runs_in_a_folder_are_a_cascade_by_themselves(runs, cascade, tmp_path):
    alone = cd.load_cascade(runs, mesh=one_device())
    assert alone.section.stages == ("base16", "sr32")
    assert alone.sample(labels=[3]).shape == (1, 32, 32, 1)
    with pytest.raises(cd.UserError, match="no runs there, nor a cascade.json"):
        cd.load_cascade(tmp_path)


def test_stages_of_other_classes_are_no_cascade(runs, tmp_path):
    other = shutil.copytree(runs, tmp_path / "runs") / "sr32" / "data.json"
    known = json.loads((runs / "base16" / "data.json").read_text())
    names = [str(i) for i in range(10)]
    for path, classes in ((tmp_path / "runs/base16/data.json", names), (other, names[::-1])):
        path.write_text(json.dumps({**known, "class_names": classes}))
    with pytest.raises(cd.UserError, match="class 0 of run 'base16' is '0', and of run 'sr32' '9'"):
        cd.load_cascade(tmp_path / "runs", mesh=one_device())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grid": "foo"}, "grid = 'foo': expected one of uniform"),
        ({"num_steps": 0}, "num_steps = 0: expected"),
        ({"num_steps": 2.5}, "num_steps = 2.5: expected"),
        ({"threshold": "foo"}, "threshold = 'foo': expected one of"),
        ({"threshold": "dynamic"}, "threshold_percentile = None"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused_when_it_is_made(wrong, message):
    with pytest.raises(cd.UserError, match=message):
        cd.Sampler(step=euler, **wrong)
    assert cd.Sampler(step=euler, guidance_interval=[0, 1]).guidance_interval == (0, 1)


def test_the_newest_checkpoint_stands_in_until_one_is_chosen(runs, capsys):
    cd.load_cascade(runs / "base16", mesh=one_device())
    assert "no checkpoint was chosen yet; the newest, of step 2" in capsys.readouterr().out


def test_what_cannot_be_sampled_is_refused(cascade, runs):
    for wrong, message in (
        ({"labels": [10]}, "labels"),
        ({"labels": []}, r"labels: float64 \(0,\): expected a list of classes"),
        ({"labels": [0.5]}, "labels: float64"),
        ({"num": 0}, "num = 0: expected an integer from 1"),
        ({"num": "3"}, "num = '3': expected an integer from 1"),
        ({"labels": [1, 2, 3], "num": 2}, "labels: 3 for num = 2 images: expected at most"),
        ({"seed": 2**32}, "seed = 4294967296: expected an integer from 0 to 4294967295"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": None}, "seed = None"),
        ({"batch_size": -1}, "batch_size = -1"),
        ({"aug_levels": 0.3}, "aug_levels, samplers: expected a list of each"),
        ({"aug_levels": ["a"]}, "expected levels from 0 to 1"),
        ({"aug_levels": [None]}, "expected levels from 0 to 1"),
        ({"samplers": ["ddim", "ddim"]}, "samplers.0. = 'ddim': expected a SamplerConfig or"),
        (
            {"samplers": [cd.Sampler(step=euler, guidance_scale=2.0, grid="respaced")] * 2},
            r"cascade.samplers\[0\].grid = 'respaced'",
        ),
        ({"aug_levels": (0.1, 0.2)}, "aug_levels: expected 1, got 2"),
        ({"aug_levels": (-0.1,)}, "expected levels from 0 to 1"),
        ({"samplers": []}, "samplers: expected 2, got 0"),
    ):
        with pytest.raises(cd.UserError, match=message):
            cascade.sample(**wrong)
    grey, colour = np.zeros((2, 16, 16, 1), np.uint8), np.zeros((2, 16, 16, 3), np.uint8)
    for images in (grey[:, :8, :8], grey.astype(float), colour):
        with pytest.raises(cd.UserError, match=r"expected uint8 \(n, h, h, 1\) of a size .* 16 px"):
            cascade.enlarge(images)
    for labels in (None, [1], [1, 2, 3]):
        with pytest.raises(cd.UserError, match=r"labels: \d for 2 images: expected one for each"):
            cascade.enlarge(grey, labels=labels)
    with pytest.raises(cd.UserError, match="the config of a stage, expected a cascade's"):
        cd.load_cascade(runs, cd.load_config(ROOT / "configs" / "mnist_base16.py"))
    with pytest.raises(cd.UserError, match="the config of a stage, expected a cascade's"):
        cd.load_cascade(runs, ROOT / "configs" / "mnist_base16.py")


def test_a_sampler_of_ones_own_takes_the_place_of_the_configs(cascade):
    own = cd.Sampler(step=euler, num_steps=3)  # DDIM, as the config's
    ddim = cascade.sample(labels=[1, 2], samplers=cascade.section.samplers)
    np.testing.assert_array_equal(cascade.sample(labels=[1, 2], samplers=[own, own]), ddim)
    assert step_of(own) is euler


def test_a_denoiser_of_ones_own_is_sampled():
    # One that knows the image: every chain ends there.
    known = jnp.linspace(-1, 1, 4 * 4 * 3).reshape(1, 4, 4, 3)

    def denoise(xt, logsnr):
        x0 = jnp.broadcast_to(known, xt.shape)
        return cd.Prediction(x0=x0, eps=predict_eps_from_x0(xt, logsnr, x0))

    schedule = make_cosine_schedule(offset=0.008)
    own = cd.Sampler(step=euler, num_steps=4)
    x = cd.sample_chain(denoise, (2, 4, 4, 3), schedule=schedule, sampler=own)
    np.testing.assert_allclose(x, np.broadcast_to(known, x.shape), atol=1e-6)


def test_a_run_on_arrays_resumes_and_keeps_its_images(runs):
    config = smallest_base(**{**RUN, "train__train_steps": 4})
    images, labels = drawn()
    run = cd.train(config, images=images, labels=labels, workdir=runs / "base16")
    assert finished_steps(run) == [2, 4]
    with pytest.raises(cd.UserError, match=r"images\.npz: has other images; resume with the same"):
        cd.train(config, images=images[::-1], labels=labels, workdir=runs / "base16")


def test_a_refused_call_leaves_no_images_that_the_next_one_trips_over(tmp_path):
    images, labels = drawn()
    config = smallest_base(**{**RUN, "train__batch_size": 1000})
    with pytest.raises(cd.UserError, match="batch_size"):
        cd.train(config, images=images, labels=labels, workdir=tmp_path / "run")
    run = cd.train(
        smallest_base(**RUN), images=images[::-1], labels=labels[::-1], workdir=tmp_path / "run"
    )
    assert finished_steps(run)


def test_a_damaged_file_of_images_is_one_line(tmp_path):
    images, labels = drawn()
    run = cd.train(smallest_base(**RUN), images=images, labels=labels, workdir=tmp_path / "run")
    (run.path / "images.npz").write_bytes(b"PK")
    with pytest.raises(cd.UserError, match=r"images\.npz: damaged, .*; remove it, and it is wr"):
        cd.train(smallest_base(**RUN), images=images, labels=labels, workdir=tmp_path / "run")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((40, 16, 16, 1)), np.zeros(40, int), "images are float64"),
        (np.zeros((3, 16, 16, 1), np.uint8), np.zeros(3, int), "of at least 20 images"),
        (np.zeros((40, 16, 16, 1), np.uint8), None, "labels: none are given, and config.stage.num"),
        (np.zeros((40, 16, 16, 1), np.uint8), np.zeros(40, int), "class 1 has no images"),
        (np.zeros((40, 16, 16, 1), np.uint8), np.arange(40) % 11, "labels from 0 to 10"),
        (np.zeros((40, 16, 16, 1), np.uint8), np.arange(39) % 10, "expected 40 integer labels"),
        (np.zeros((40, 16, 16, 3), np.uint8), np.arange(40) % 10, "images have 3 channels"),
        (np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 10, "resolution"),
    ],
)
def test_arrays_that_do_not_fit_the_config_are_refused(images, labels, message, tmp_path):
    with pytest.raises(cd.UserError, match=message):
        cd.train(smallest_base(**RUN), images=images, labels=labels, workdir=tmp_path / "run")
    if "resolution" not in message:
        assert not (tmp_path / "run").exists()


def test_another_runs_folder_stays_as_it_is(tmp_path):
    images, labels = drawn()
    cd.RunFolder(tmp_path).write_config(smallest_base(**RUN))
    with pytest.raises(cd.UserError, match="a run that was trained on other data is there"):
        cd.train(smallest_base(**RUN), images=images, labels=labels, workdir=tmp_path)
    assert not (tmp_path / "images.npz").exists()
    with pytest.raises(cd.UserError, match="config is a dict: expected a RunConfig"):
        cd.train({}, images=images, labels=labels, workdir=tmp_path)


def test_a_config_has_its_overrides(tmp_path):
    file = ROOT / "configs" / "mnist_base16.py"
    config = cd.load_config(file, {"train.train_steps": 700, "stage.network.channels": 24})
    assert (config.train.train_steps, config.stage.network.channels) == (700, 24)
    assert isinstance(cd.load_config(CASCADE), cd.CascadeConfig)
    for wrong, message in (
        ({"train.train_step": 7}, "did you mean 'train_steps'"),
        ({"trian.train_steps": 7}, "config.trian.train_steps: no section 'trian'"),
        ({"train.batch_size": 0}, "config.train.batch_size = 0"),
    ):
        with pytest.raises(cd.UserError, match=message):
            cd.load_config(file, wrong)
    with pytest.raises(cd.UserError, match="no such .py file"):
        cd.load_config(tmp_path / "nothing.py")
