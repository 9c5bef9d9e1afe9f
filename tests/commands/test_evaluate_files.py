"""`evaluate --samples --reference` and `reference --images`, with an extractor of no network."""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from cascaded_diffusion import evaluate, reference
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features import inception_extractor
from cascaded_diffusion.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from cascaded_diffusion.evaluation.samples.stored_images import save_samples
from tests.evaluation.stubs import Extractor
from tests.tiny import ROOT

RNG = np.random.default_rng(0)
SAMPLES = RNG.integers(0, 200, (40, 8, 8, 3), np.uint8)
REAL = RNG.integers(0, 256, (60, 8, 8, 3), np.uint8)
LABELS = np.zeros(60, np.int64)


@pytest.fixture(autouse=True)
def extractors(monkeypatch):
    """Loads what was asked for: the list of all resizes so far."""
    asked = []

    def load(weights, *, resize, **kwargs):
        asked.append(resize)
        extractor = Extractor("inception", spatial=True)
        extractor.identity = f"inception:{resize}:1"
        return extractor

    monkeypatch.setattr(inception_extractor, "load_inception", load)
    return asked


@pytest.fixture
def files(tmp_path):
    save_samples(tmp_path / "a.npz", SAMPLES, LABELS[:40])
    save_samples(tmp_path / "b.npz", REAL, LABELS)
    for i, image in enumerate(SAMPLES):
        path = tmp_path / "png" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    real = Extractor("inception", spatial=True)(REAL)
    pooled, spatial = FeatureStatistics.of(real.pooled), FeatureStatistics.of(real.spatial)
    np.savez(
        tmp_path / "adm.npz",
        arr_0=REAL[:50],
        mu=pooled.mean,
        sigma=pooled.covariance,
        mu_s=spatial.mean,
        sigma_s=spatial.covariance,
    )
    return tmp_path


def _record(capsys, path, *argv):
    flags = [x.format(path) for x in argv]
    assert evaluate.main(["evaluate", "--allow_few_samples", *flags]) == 0
    (line,) = capsys.readouterr().out.splitlines()  # nothing else on stdout
    return json.loads(line)


def _fid(samples=SAMPLES, real=REAL):
    a, b = (FeatureStatistics.of(Extractor()(x).pooled) for x in (samples, real))
    return pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_samples_and_images_as_reference(files, capsys, extractors):
    record = _record(capsys, files, "--samples={0}/a.npz", "--reference={0}/b.npz")
    assert record["fid_40"] == _fid()
    assert record["features"] == "inception:legacy:1"
    assert record["num_samples"] == 40
    assert {"sfid_40", "is_40", "kid_40", "precision_40", "recall_40"} <= set(record)
    assert "60:8px" in record["reference"]
    png = _record(capsys, files, "--samples={0}/png", "--reference={0}/b.npz", "--resize=clean")
    assert png["fid_40"] == record["fid_40"]
    assert png["samples_digest"] == record["samples_digest"]
    assert extractors == ["legacy", "clean"]


def test_the_first_samples_of_more(files, capsys):
    flags = ["--samples={0}/a.npz", "--reference={0}/b.npz", "--num_samples=30"]
    record = _record(capsys, files, *flags)
    assert record["fid_30"] == _fid(SAMPLES[:30])
    assert record["num_samples"] == 30
    evaluate.main(["evaluate", "--allow_few_samples", *(x.format(files) for x in flags)])
    assert "samples: 40 images\nsamples: the first 30 are measured\n" in capsys.readouterr().err


def test_an_adm_reference_gives_its_statistics_and_the_features_of_its_images(files, capsys):
    record = _record(capsys, files, "--samples={0}/a.npz", "--reference={0}/adm.npz")
    assert record["fid_40"] == _fid()  # of all 60, as mu and sigma are
    assert record["reference"].startswith("adm.npz:")
    whole = _record(capsys, files, "--samples={0}/a.npz", "--reference={0}/b.npz")
    assert record["sfid_40"] == pytest.approx(whole["sfid_40"], rel=1e-6)
    assert "precision_40" in record


def test_statistics_made_by_the_reference_command(files, capsys):
    argv = ["reference", f"--images={files}/b.npz", f"--output={files}/r.npz", "--resize=clean"]
    assert reference.main(argv) == 0
    assert "inception:clean:1" in capsys.readouterr().out
    record = _record(capsys, files, "--samples={0}/a.npz", "--reference={0}/r.npz")
    assert record["fid_40"] == _fid()
    assert record["features"] == "inception:clean:1"  # the statistics' own way


def test_references_are_made_before_a_run_begins(tmp_path, capsys, extractors, monkeypatch):
    monkeypatch.chdir(ROOT)
    features = ["--config.eval.features=inception", "--config.eval.resize=legacy"]
    argv = ["--config=configs/mnist_base16.py:smoke", f"--workdir={tmp_path}/run", "--roles=val"]
    assert reference.main(["reference", *argv, *features]) == 0
    path = tmp_path / "run" / "eval" / "reference_val.npz"
    assert f"{path}: mnist:test:" in capsys.readouterr().out
    assert extractors == ["legacy"]
    assert not (path.parent / "reference_train.npz").exists()


def test_what_is_measured_and_passed_over_is_said_on_stderr(files, capsys):
    plain = _record(capsys, files, "--samples={0}/a.npz", "--reference={0}/b.npz")
    for name in (".ipynb_checkpoints", ".Trash-0"):
        for i in range(5):
            path = files / "png" / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(REAL[i]).save(path)
    flags = ["--allow_few_samples", f"--samples={files}/png", f"--reference={files}/b.npz"]
    assert evaluate.main(["evaluate", *flags]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fid_40"] == plain["fid_40"]
    assert (
        "samples: 40 images (10 other files passed over: 5 in .Trash-0, 5 in .ipynb_checkpoints)"
        in captured.err
    )
    assert "reference: 60 images\n" in captured.err


@pytest.mark.parametrize(
    ("names", "said", "metrics"),
    [
        (
            ("mu", "sigma"),
            "it lacks mu_s and sigma_s, so that sFID is left out; and features and images (arr_0),"
            " so that KID, precision and recall are left out",
            {"fid_40"},
        ),
        (
            ("mu", "sigma", "mu_s", "sigma_s"),
            "it lacks features and images (arr_0), so that KID, precision and recall are left out",
            {"fid_40", "sfid_40"},
        ),
        (
            ("mu", "sigma", "arr_0"),
            "it lacks mu_s and sigma_s, so that sFID is left out.",
            {"fid_40", "kid_40", "precision_40", "recall_40"},
        ),
    ],
)
def test_what_a_reference_lacks_is_said_before_anything_is_measured(
    names, said, metrics, files, capsys, monkeypatch
):
    with np.load(files / "adm.npz") as stored:
        np.savez(files / "some.npz", **{name: stored[name] for name in names})
    flags = ["--samples={0}/a.npz", "--reference={0}/some.npz", "--resize=legacy"]
    record = _record(capsys, files, *flags)
    found = {name for name in record if name.endswith("_40") and "std" not in name}
    assert found - {"is_40"} == metrics
    monkeypatch.setattr(Extractor, "__call__", None)  # before any features
    with pytest.raises(TypeError):
        _record(capsys, files, *flags)
    assert f"reference: {said}" in capsys.readouterr().err


def test_paths_that_are_not_utf_8_are_measured_and_recorded(files, capsys):
    folder = os.fsdecode(os.path.join(os.fsencode(files), b"caf\xe9"))
    os.rename(files / "png", folder)
    os.rename(files / "b.npz", os.path.join(folder, "\udcff.npz"))
    flags = [f"--samples={folder}", f"--reference={folder}/\udcff.npz"]
    record = _record(capsys, files, *flags)
    assert record["samples"] == folder
    argv = ["reference", f"--images={folder}/\udcff.npz", f"--output={folder}/r\udcff.npz"]
    for stream in (sys.stdout, sys.stderr):  # as entry.run does
        stream.reconfigure(errors="backslashreplace")
    assert reference.main(argv) == 0
    assert "caf\\udce9" in capsys.readouterr().out
    again = _record(capsys, files, f"--samples={folder}", f"--reference={folder}/r\udcff.npz")
    assert again["fid_40"] == record["fid_40"]


BAD = [
    (["--samples={0}/a.npz"], "--reference is missing: "),
    (["--samples=ftp://a/b", "--reference={0}/b.npz"], "--samples=ftp://a/b: expected a path on"),
    (["--samples={0}/a.npz", "--reference=s3://b"], "--reference=s3://b: expected a path on"),
    (["--samples={0}/[1].npz", "--reference={0}/b.npz"], "--samples={0}/[1].npz: '{0}/[1].npz' "),
    (
        ["--samples={0}/a.npz", "--reference={0}/b.npz", "--inception_weights=ftp://w.pth"],
        "--inception_weights=ftp://w.pth: expected a path on this machine",
    ),
    (
        ["--samples={0}/a.npz", "--reference={0}/b.npz", "--inception_weights={0}"],
        "--inception_weights={0}: no such file; without this flag the cached weights are used, or",
    ),
    (
        ["--allow_few_samples", "--samples={0}/a.npz", "--reference={0}/none.npz"],
        "--reference={0}/none.npz: expected a folder of PNGs, or an .npz with arr_0 (images) or mu",
    ),
    (
        ["--allow_few_samples", "--samples={0}/a.npz", "--reference={0}/floats.npz"],
        "--reference={0}/floats.npz: arr_0 is float64 (60, 8, 8, 3) with values from 0 to 1, exp",
    ),
    (
        [
            "--allow_few_samples",
            "--samples={0}/a.npz",
            "--reference={0}/short_s.npz",
        ],
        "--reference={0}/short_s.npz: spatial features of sizes 5 and 3 cannot be compared",
    ),
    (
        ["--reference={0}/b.npz"],
        "--reference does not go with --workdir alone; it is for `evaluate sam",
    ),
    (["--samples={0}/c.npz", "--reference={0}/b.npz"], "--samples={0}/c.npz: expected a folder"),
    (
        ["--samples={0}/a.npz", "--reference={0}/b.npz"],
        "an FID of 40 samples: expected at least 2048, the number of Inception's features",
    ),
    (
        ["--samples={0}/a.npz", "--reference={0}/b.npz", "--num_samples=41"],
        "--num_samples=41: --samples={0}/a.npz has 40 images; expected at least as many",
    ),
    (
        ["--allow_few_samples", "--samples={0}/a.npz", "--reference={0}/small.npz"],
        "--reference={0}/small.npz: images of (6, 6, 3), expected (8, 8, 3), as",
    ),
    (
        ["--allow_few_samples", "--samples={0}/a.npz", "--reference={0}/small_r.npz"],
        "--reference={0}/small_r.npz: its field 'resolution' is 6, expected 8, as",
    ),
    (
        ["--allow_few_samples", "--samples={0}/a.npz", "--reference={0}/other_r.npz"],
        "--reference={0}/other_r.npz: its field 'features' is 'inception:legacy:0', expected",
    ),
    (
        ["--allow_few_samples", "--samples={0}/a.npz", "--reference={0}/r.npz", "--resize=clean"],
        "--resize=clean: the statistics of --reference={0}/r.npz are of --resize=legacy; the two",
    ),
    (
        ["--allow_few_samples", "--samples={0}/a.npz", "--reference={0}/adm.npz", "--resize=clean"],
        "--resize=clean: the statistics of --reference={0}/adm.npz are of --resize=legacy (as",
    ),
    (
        ["--allow_few_samples", "--samples={0}/a.npz", "--reference={0}/short.npz"],
        "--reference={0}/short.npz: does not say how its images came to Inception's 299 px; say it",
    ),
    (
        [
            "--allow_few_samples",
            "--samples={0}/a.npz",
            "--reference={0}/short.npz",
            "--resize=clean",
        ],
        "--reference={0}/short.npz: features of sizes 12 and 3 cannot be compared",
    ),
    (
        ["--allow_few_samples", "--samples={0}/a.npz", "--reference={0}/cut.npz"],
        "--reference={0}/cut.npz: expected a folder of PNGs, or an .npz with arr_0",
    ),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=lambda x: str(x)[-50:])
def test_bad_input_is_named_in_one_line(argv, message, files):
    save_samples(files / "small.npz", REAL[:, :6, :6], LABELS)
    reference.main(["reference", f"--images={files}/small.npz", f"--output={files}/small_r.npz"])
    reference.main(["reference", f"--images={files}/b.npz", f"--output={files}/r.npz"])
    _with_other_features(files / "r.npz", files / "other_r.npz")
    np.savez(files / "short.npz", mu=np.zeros(3), sigma=np.eye(3))
    with np.load(files / "adm.npz") as stored:
        adm = dict(stored)
    np.savez(files / "floats.npz", **{**adm, "arr_0": REAL / 255})
    np.savez(files / "short_s.npz", **{**adm, "mu_s": np.zeros(3), "sigma_s": np.eye(3)})
    (files / "cut.npz").write_bytes((files / "b.npz").read_bytes()[:2000])
    with pytest.raises(UserError) as error:
        evaluate.main(["evaluate", *(x.format(files) for x in argv)])
    assert str(error.value).startswith(message.format(files))
    assert "\n" not in str(error.value)


def _with_other_features(path, other):
    import dataclasses

    from cascaded_diffusion.evaluation.reference import read_reference, save_reference

    read = read_reference(str(path), flag="reference")
    fingerprint = dataclasses.replace(read.fingerprint, features="inception:legacy:0")
    save_reference(other, dataclasses.replace(read, fingerprint=fingerprint))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--workdir is missing: "),
        (["--images={0}/b.npz"], "--output is missing: "),
        (["--images={0}/b.npz", "--output={0}/r"], "--output={0}/r: expected a name that ends"),
        (["--images={0}/b.npz", "--output={0}/d.npz"], "--output={0}/d.npz: expected a name that"),
        (
            ["--images={0}/b.npz", "--output=ftp://r.npz"],
            "--output=ftp://r.npz: expected a path on",
        ),
        (["--images={0}/b.npz", "--output={0}/a*.npz"], "--output={0}/a*.npz: '{0}/a*.npz' contai"),
        (["--images=ftp://b", "--output={0}/r.npz"], "--images=ftp://b: expected a path on this"),
        (["--workdir=ftp://b"], "--workdir=ftp://b: expected a path on this"),
        (["--workdir={0}", "--inception_weights={0}/w"], "--inception_weights={0}/w: no such file"),
        (["--images={0}/b.npz", "--workdir={0}"], "--images does not go with --workdir"),
        (["--workdir={0}", "--resize=clean"], "--resize is only for --images"),
        (["--workdir={0}"], "--workdir={0}: no run there"),
        (["--workdir={0}", "--roles=test"], "--roles=test: expected train, val, or train,val"),
    ],
    ids=str,
)
def test_bad_calls_of_reference(argv, message, files):
    (files / "d.npz").mkdir()
    with pytest.raises(UserError) as error:
        reference.main(["reference", *(x.format(files) for x in argv)])
    assert str(error.value).startswith(message.format(files))
