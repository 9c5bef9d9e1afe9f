"""What samples are compared with: extractors that can mean something, references that fit."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest

from cascaded_diffusion import evaluate, main, report
from cascaded_diffusion.config.run_checks import cascade_config_from
from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.data.sources import examples
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import evaluator as lib
from cascaded_diffusion.evaluation.features import classifier_training
from cascaded_diffusion.evaluation.features.classifier_training import RECIPES
from cascaded_diffusion.evaluation.jobs import bits_per_dim
from cascaded_diffusion.evaluation.samples.sample_sources import RealSplit
from cascaded_diffusion.evaluation.settings import final_count
from cascaded_diffusion.evaluation.sweep import Sweep
from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.runtime.mesh import build_mesh
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.binaries import TINY_NETWORK
from tests.data.photos import photo
from tests.evaluation.stubs import Extractor, untrained_classifier
from tests.tiny import ROOT, array_source, config_values, random_source, tiny_base

SOURCE = random_source(64, 16)
UNLABELLED = {
    "stage__num_classes": 0,
    "stage__diffusion__label_dropout_prob": 0.0,
    "stage__sampler__guidance_scale": 1.0,
}


def _split(source, **changes):
    split = RealSplit("noise", "train", len(source), partial(examples, source))
    return dataclasses.replace(split, **changes)


@pytest.mark.parametrize("num_classes", [0, 1])
@pytest.mark.parametrize("features", ["classifier", "resnet", "resnet50"])
def test_a_classifier_needs_two_classes(num_classes, features):
    with pytest.raises(UserError) as error:
        tiny_base(**{**UNLABELLED, "stage__num_classes": num_classes}, eval__features=features)
    assert str(error.value) == (
        f"config.eval.features = {features!r}: expected 'rotation' or 'inception': a classifier"
        f" needs at least 2 classes, and config.stage.num_classes is {num_classes}"
    )
    tiny_base(**UNLABELLED, eval__features="rotation")
    tiny_base(eval__features="rotation")


def _extractor(folder, train, held_out, **overrides):
    config = tiny_base(**overrides)
    said = []
    mesh = build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1), jax.devices()[:1])
    how = dict(load_inception=None, say=said.append)
    found = lib.build_extractor(config, RunFolder(folder), train, held_out, mesh, **how)
    return config, found, said


def test_rotations_that_cannot_be_told_are_said(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 1), np.uint8)
    symmetric = np.maximum.reduce([np.rot90(noise, k, (1, 2)) for k in range(4)])
    split = _split(array_source(symmetric, np.zeros(64, np.int32)))
    config, extractor, said = _extractor(
        tmp_path, split, split, **UNLABELLED, eval__features="rotation"
    )
    assert (tmp_path / "eval" / "rotation.npz").exists()
    first, doubt = said
    assert first == (
        "base16: rotation at 16 px tells the rotation of 25.0 % of the 64 held-out real images"
    )
    assert "base16: that is near the 25 % of guessing: the features are those of an" in doubt
    evaluator = lib.build_evaluator(config, RunFolder(tmp_path), extractor, {"train": split})
    assert not evaluator.classes
    assert set(evaluator.scores(noise[:40], None)) == {
        f"{name}_rotation_40" for name in ("fd", "kid", "kid_std", "precision", "recall")
    }


def test_inception_is_asked_for_the_runs_way_of_resizing(tmp_path):
    config = tiny_base(eval__features="inception", eval__resize="clean")
    asked = {}
    how = dict(load_inception=lambda **kwargs: asked.update(kwargs))
    lib.build_extractor(config, RunFolder(tmp_path), None, None, None, **how)
    assert asked == {"resize": "clean"}


def test_a_classifier_no_better_than_guessing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier_training, "train_classifier", untrained_classifier)
    _, _, said = _extractor(tmp_path, _split(SOURCE), _split(SOURCE, size=2, split="test"))
    assert "that is no more than the 50.0 % of their most frequent class" in said[-1]


def test_a_reference_that_does_not_fit_is_made_anew(tmp_path):
    config, folder = tiny_base(), RunFolder(tmp_path)
    path, said = folder.eval / "reference_train.npz", []

    def reference(split=None, extractor=None):
        split, extractor = split or _split(SOURCE), extractor or Extractor()
        return lib.run_reference(config, folder, extractor, "train", split, say=said.append)

    first = reference()
    assert reference().name == first.name
    assert said == []

    kept = tmp_path / "kept.npz"
    shutil.copy(path, kept)
    for change, why in (
        (
            dict(extractor=Extractor("other")),
            "its field 'features' is 'projection:1', expected 'other:1'",
        ),
        (dict(split=_split(SOURCE, size=40)), "its field 'num_images' is 64, expected 40"),
        (
            dict(split=_split(SOURCE, data="photos")),
            "its field 'data' is 'noise', expected 'photos'",
        ),
    ):
        made = reference(**change)
        assert said.pop() == f"{path}: {why}; it is made anew"
        assert reference(**change).name == made.name
        assert said == []
        shutil.copy(kept, path)

    whole = path.read_bytes()
    for damage in (whole[:-50], b"", b"no archive"):
        path.write_bytes(damage)
        assert reference().name == first.name
        assert said.pop().endswith("; it is made anew")
        assert path.read_bytes() == whole
    with np.load(path) as stored:
        arrays = dict(stored)
    for change, why in (
        ({"mu": arrays["mu"] + 1}, "its arrays have changed since it was written"),
        ({"digest": None, "fingerprint": None}, "it has no fingerprint"),
        ({"digest": None, "fingerprint": np.asarray('{"data": "x"}')}, "of another version"),
    ):
        changed = {k: v for k, v in {**arrays, **change}.items() if v is not None}
        np.savez(path, **changed)
        assert reference().name == first.name
        assert why in said.pop()
        assert said == []


def test_what_no_metric_can_be_of_is_refused(tmp_path):
    config = tiny_base()
    with pytest.raises(UserError, match=r"split 'train' of config.data: 1 image, expected at le"):
        lib.run_reference(config, RunFolder(tmp_path), Extractor(), "train", _split(SOURCE, size=1))
    with pytest.raises(UserError, match="samples: labels from 0 to 10, expected 0 to 9"):
        lib.evaluated_labels(np.asarray([0, 10]), 10)
    assert lib.evaluated_labels(np.asarray([0, 10]), 0) is None
    section = cascade_config_from(config_values("mnist_cascade32")).cascade
    with pytest.raises(UserError, match=r"config.cascade.num_samples = 1: expected at least 2"):
        Sweep(dataclasses.replace(section, num_samples=1), [], None, tmp_path, None, None)
    folder = RunFolder(tmp_path)
    folder.write_config(config)
    with pytest.raises(UserError, match="bits/dim of 1 image: expected at least 2"):
        bits_per_dim(folder, _split(SOURCE, size=1))


def test_photos_without_classes_are_trained_on_and_scored(tmp_path, monkeypatch, capsys, one_layer):
    """The recipe of the README, in small."""
    monkeypatch.setitem(RECIPES, "rotation", dataclasses.replace(RECIPES["rotation"], epochs=2))
    monkeypatch.chdir(ROOT)
    for split, count in (("train", 24), ("test", 8)):
        folder = tmp_path / "photos" / split
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i:03d}.jpg").write_bytes(photo(i))
    flags = [
        "main",
        "--config=configs/cifar10_sr32.py:smoke",
        *TINY_NETWORK,
        f"--workdir={tmp_path}/run",
        "--config.data.name=folder",
        f"--config.data.path={tmp_path}/photos",
        "--config.data.resolution=32",
        "--config.stage.num_classes=0",
        "--config.stage.diffusion.label_dropout_prob=0",
        "--config.eval.num_samples=16",
        "--config.eval.batch_size=16",
        "--config.train.batch_size=8",
        "--config.train.train_steps=2",
        "--config.train.warmup_steps=1",
        "--config.train.sample_every_steps=None",
        "--config.checkpoint.save_every_steps=2",
    ]
    with pytest.raises(UserError, match="config.eval.features = 'classifier': expected 'rotation'"):
        main.main(flags)
    assert not (tmp_path / "run").exists()
    assert main.main([*flags, "--config.eval.features=rotation"]) == 0
    assert evaluate.main(["evaluate", f"--workdir={tmp_path}/run"]) == 0
    out = capsys.readouterr().out
    assert "rotation at 32 px tells the rotation of" in out
    assert "low-res real (8 images, enlarged 2 times each): fd_rotation_16" in out
    folder = RunFolder(tmp_path / "run")
    best = folder.best()
    assert (best["metric"], best["step"], best["num_real_low_res"]) == ("fd_rotation_16", 2, 8)
    assert {r["metric"] for r in read_lines(folder.results_path)} == {
        *(f"{x}_rotation_16" for x in ("fd", "kid", "kid_std", "precision", "recall")),
        "psnr_low_res_16",
    }

    # What else reads a run has no need of classes, or says that it has.
    final = ["evaluate", f"--workdir={tmp_path}/run", "--final", "--num_samples=16"]
    assert evaluate.main(final) == 0
    assert "Low-res input: real (8 images); " in capsys.readouterr().out
    # By other noise than that of the samples by which the checkpoint was chosen.
    record = json.loads((folder.eval / "final_real.json").read_text())
    assert (best["seed"], record["seed"]) == (0, 1)
    assert record["metrics"]["fd_rotation_16_train"] != best["value"]
    samples = f"--samples={tmp_path}/run/eval/final_real.npz"
    assert evaluate.main(["evaluate", f"--workdir={tmp_path}/run", samples]) == 0
    assert '"fd_rotation_16": ' in capsys.readouterr().out
    with pytest.raises(UserError, match="`evaluate cas`: 'sr32' has no classes to tell apart"):
        evaluate.main(["evaluate", f"--workdir={tmp_path}/run", samples, "--cas"])
    assert report.main(["report", f"--workdir={tmp_path}/run"]) == 0
    assert "fd_rotation_16_val" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("count", "generated", "refused"),
    [
        (30, True, None),
        (25, True, r"25 samples .*expected a multiple of config.stage.num_classes, which is 10"),
        (25, False, None),  # given images have their own classes
        (1, False, "1 samples .*expected at least 2"),
    ],
)
def test_final_numbers_are_of_as_many_samples_of_every_class(count, generated, refused):
    config = tiny_base()
    if refused is None:
        lib.Evaluation({}).check_final_count(count, config, generated=generated)
        return
    with pytest.raises(UserError, match=refused):
        lib.Evaluation({}).check_final_count(count, config, generated=generated)
    if count > 1:
        lib.Evaluation({}, allow_few_samples=True).check_final_count(count, config, generated=True)


def test_a_cascade_says_how_many_final_samples_it_has():
    config, section = tiny_base(), cascade_config_from(config_values("mnist_cascade32")).cascade
    assert final_count(config, None) == config.eval.final_num_samples
    assert final_count(config, dataclasses.replace(section, num_samples=70)) == 70
