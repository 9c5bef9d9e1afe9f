"""The tables about the paper's claims: rows are kept, never mixed, and the docs agree with them."""

import dataclasses
import json
import pathlib
import re
import shutil
import sys
import textwrap
from unittest import mock

import numpy as np
import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features.extractor import Features
from cascaded_diffusion.evaluation.features.inception_extractor import RESIZES
from tests.one_layer import in_place_of_the_unet

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "ablations"
STORED = sorted(RESULTS.glob("*.json"))


@pytest.fixture(autouse=True, scope="module")
def _scripts():
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("benchmarks", "benchmarks/ablations"):
            patch.syspath_prepend(str(ROOT / folder))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, _scripts):
    """Runs the command at its smallest, on drawn shapes; returns its exit code and its results."""
    import jax
    import lab
    import run as command
    import tables

    from cascaded_diffusion.evaluation.features.classifier_training import RECIPES
    from cascaded_diffusion.runtime.mesh import build_mesh

    folder = tmp_path_factory.mktemp("ablations")
    small = dataclasses.replace(RECIPES["small"], epochs=1)

    @mock.patch.object(lab, "build_mesh", lambda config: build_mesh(config, jax.devices()[:1]))
    @mock.patch.object(tables, "LEVELS", (0.0, 0.6))
    @mock.patch.dict(RECIPES, small=small)
    @in_place_of_the_unet()
    def run(table, *flags):
        argv = ["run.py", f"--table={table}", "--budget=smoke", f"--workdir={folder / 'work'}"]
        code = command.main([*argv, f"--results={folder}", "--flops=1e9", *flags])
        path = folder / f"{table}_smoke.json"
        return code, json.loads(path.read_text()) if path.exists() else None, path

    return run


@pytest.fixture(scope="module")
def augmentation(run):
    return run("augmentation")


def test_every_row_of_a_table_is_measured_and_stored(augmentation):
    from tables import BUDGETS, TABLES

    code, results, path = augmentation
    assert code == 0
    all_levels = [row.label for row in TABLES["augmentation"].rows(BUDGETS["smoke"])]
    labels = [label for label in all_levels if label.get("s", 0.0) in (0.0, 0.6)]
    assert [row["label"] for row in results["rows"]] == labels
    for row in results["rows"]:
        assert row["scores"].keys() == {"fd", "precision", "recall", "is", "accuracy", "cas"}
        assert row["num_samples"] == 40
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_single_model_costs_what_the_cascade_costs(augmentation):
    single, plain = augmentation[1]["rows"][:2]
    assert single["label"] == {"model": "single model"}
    assert single["flops_per_sample"] == pytest.approx(plain["flops_per_sample"], rel=0.1)


def test_a_truncated_chain_is_shorter(augmentation):
    rows = [row for row in augmentation[1]["rows"] if row["label"].get("s") == 0.6]
    whole, truncated = rows
    assert truncated["label"]["model"] == "cascade, truncated"
    assert truncated["evaluations"] < whole["evaluations"]
    assert truncated["flops_per_sample"] < whole["flops_per_sample"]


def test_noise_is_further_from_the_data_than_real_images(augmentation):
    real, enlarged, noise = (row["scores"]["fd"] for row in augmentation[1]["rows"][-3:])
    assert max(real, enlarged) < noise / 2


def test_cas_is_tested_on_images_that_it_was_not_trained_on(
    run, augmentation, tmp_path, monkeypatch
):
    import scores

    tested = []

    class Counted(scores.Classifier):
        def predictions(self, images):
            tested.append({image.tobytes() for image in images})
            return super().predictions(images)

    monkeypatch.setattr(scores, "Classifier", Counted)
    assert run("augmentation", f"--results={tmp_path}")[0] == 0
    labels = [row["label"]["model"] for row in augmentation[1]["rows"]]
    kinds = dict(zip(labels, tested, strict=True))
    held_out = kinds["single model"]
    assert kinds["Gaussian noise"] == held_out
    assert kinds["real held-out images"] == kinds["the same, from 16 px enlarged bilinearly"]
    assert 0 < len(held_out) - len(kinds["real held-out images"]) <= 40


def test_what_is_there_is_not_made_again(run, augmentation, monkeypatch):
    import lab

    def refuse(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr(lab.Lab, "_train", refuse)
    code, results, path = augmentation
    # A row that a killed command had not stored yet is made from the networks that are there.
    path.write_text(json.dumps({**results, "rows": results["rows"][:-3] + results["rows"][-2:]}))
    again, now, _ = run("augmentation")
    assert (code, again) == (0, 0)
    assert sorted(map(_without_time, now["rows"])) == sorted(map(_without_time, results["rows"]))


@pytest.mark.parametrize("origin", ["processor", "versions"])
def test_what_another_device_or_version_made_is_made_again(
    run, augmentation, tmp_path, monkeypatch, origin
):
    import lab
    import machine

    def notice(*args, **kwargs):
        raise UserError("made again")

    monkeypatch.setattr(lab.Lab, "_train", notice)
    monkeypatch.setattr(machine, origin, lambda: "another")
    with pytest.raises(UserError, match="made again"):
        run("augmentation", f"--results={tmp_path}")


def _without_time(row):
    return json.dumps({k: v for k, v in row.items() if k != "wall_s"}, sort_keys=True)


def test_fid_stands_beside_where_its_network_is_given(run, augmentation, tmp_path, monkeypatch):
    import lab
    import pages

    @dataclasses.dataclass(frozen=True)
    class Means:
        """In place of FID's network: means of the rows of an image."""

        identity: str
        name: str = "inception"

        def __call__(self, images):
            return Features(pooled=images.mean((2, 3), dtype=np.float64))

    def load_inception(weights, *, resize, mesh):
        assert resize in RESIZES
        return Means(weights)

    monkeypatch.setattr(lab, "load_inception", load_inception)
    flags = (f"--results={tmp_path}", "--inception_weights=W")
    assert run("augmentation", *flags)[0] == 0
    results = json.loads((tmp_path / "augmentation_smoke.json").read_text())
    rows, without = results.pop("rows"), augmentation[1]["rows"]
    assert [row["scores"].pop("fid") > 0 for row in rows] == [True] * len(rows)
    assert [row["scores"] for row in rows] == [row["scores"] for row in without]
    assert results["features"] == f"{augmentation[1]['features']}, W"
    rows[0]["scores"]["fid"] = 7.0
    assert "| FID |" in pages.table_of(results, rows)
    with pytest.raises(UserError, match="another network for the features"):
        run("augmentation", f"--results={tmp_path}")


def test_seeds_differ_and_are_told_apart(run):
    assert "--seeds" not in run("inputs")[1]["command"]
    code, results, _ = run("inputs", "--seeds=2")
    assert "--seeds=2" in results["command"]  # which made all rows that are there
    assert code == 0
    rows = results["rows"]
    assert [row["seed"] for row in rows] == [0] * (len(rows) // 2) + [1] * (len(rows) // 2)
    assert rows[0]["label"] == rows[len(rows) // 2]["label"]
    assert rows[0]["scores"]["fd"] != rows[len(rows) // 2]["scores"]["fd"]


def test_every_length_is_a_training_of_its_own(run, monkeypatch):
    import lab
    import tables

    trained = []
    train = lab.Lab._train

    def counted(self, config, *args):
        trained.append(config)
        return train(self, config, *args)

    monkeypatch.setattr(lab.Lab, "_train", counted)
    monkeypatch.setattr(tables, "_LENGTHS", (0.5, 1.0))
    code, results, _ = run("training", "--flops=1e10")
    assert code == 0
    assert [config.stage.name for config in trained] == 2 * ["base16", "sr32", "sr32"]
    steps = [config.train.train_steps for config in trained]
    assert steps[3:] == pytest.approx([2 * n for n in steps[:3]], abs=1)
    # Its learning rate rises and falls within it.
    assert [config.train.warmup_steps for config in trained] == [n // 10 for n in steps]
    flops = [
        (row["label"]["FLOP, base"], row["label"]["FLOP, enlarging"]) for row in results["rows"]
    ]
    lengths = [("2.5e+09", "2.5e+09"), ("5e+09", "5e+09"), ("5e+09", "2.5e+09")]
    assert flops == [pair for pair in lengths for _ in range(4)]
    distances = [row["scores"]["fd"] for row in results["rows"]]
    assert len(set(distances)) == len(distances)


def test_the_first_samples_above_one_base_model_are_shown(run, monkeypatch, capsys):
    import lab
    import tables
    from PIL import Image

    monkeypatch.setattr(tables, "_WIDE_LEVELS", (0.0, 0.6))
    table = dataclasses.replace(tables.TABLES["mistakes"], shown=3)
    monkeypatch.setitem(tables.TABLES, "mistakes", table)
    code, results, path = run("mistakes", "--flops=1e10")
    assert code == 0
    assert [row["label"]["FLOP, base"] for row in results["rows"][:4]] == ["5e+08"] * 3 + ["1e+09"]
    with Image.open(path.with_name("mistakes_smoke_samples.png")) as picture:
        assert picture.size == (3 * (10 * 33 + 1), 4 * (18 + 3 * 34))
        shown = np.asarray(picture).reshape(4, 18 + 3 * 34, 3 * (10 * 33 + 1), 3)
    # The first image of each row, without its frame.
    base, *enlarged = shown[:, 18 + 3 : 18 + 3 + 96, 3 : 3 + 96]

    def has_16_px(image):
        return (image == image[::6, ::6].repeat(6, 0).repeat(6, 1)).all()

    assert has_16_px(base)
    assert not any(map(has_16_px, enlarged))
    assert not (enlarged[0] == enlarged[1]).all()

    monkeypatch.setattr(lab.Lab, "_is_late", lambda self: True)
    assert run("mistakes", "--flops=1e10")[0] == 0  # from the samples that are there
    for samples in path.parent.glob("work/*/samples"):
        shutil.rmtree(samples)
    assert run("mistakes", "--flops=1e10")[0] == 75
    assert "out of time: the picture is missing; run it again" in capsys.readouterr().out


def test_neighbours_tell_what_was_seen_from_what_was_not(run):
    code, results, path = run("memorised")
    assert code == 0
    samples, real, train = (row["scores"] for row in results["rows"])
    assert train["pixels_train"] == train["pixels_least"] == 0
    for kind in ("pixels", "features"):
        # A network rounds an image's features by where in a batch it stands.
        assert train[f"{kind}_train"] < 1e-5 * train[f"{kind}_held_out"]
        assert real[f"{kind}_train"] > 0 < real[f"{kind}_held_out"]
        assert samples[f"{kind}_train"] > real[f"{kind}_train"]
        assert train[f"{kind}_nearer"] == 1
        assert 0.2 < real[f"{kind}_nearer"] < 0.8
        assert real[f"{kind}_least"] > 0
    assert path.with_suffix(".png").exists()


def _python(path, code):
    """A program in place of a Python with PyTorch."""
    path.write_text(f"#!{sys.executable}\nimport sys\nimport numpy as np\n{textwrap.dedent(code)}")
    path.chmod(0o755)
    return f"--torch_python={path}"


def test_a_peer_is_trained_as_long_as_the_cascade(run, tmp_path, monkeypatch):
    import lab
    import tables

    # As with the larger budgets, a config's warm-up is longer than the steps that are timed.
    monkeypatch.setattr(lab, "_TIMED_STEPS", 2)
    measured = lab.Lab._seconds_of_step
    # On a machine that is busy with other work a second would be too short.
    monkeypatch.setattr(lab.Lab, "_seconds_of_step", lambda *args: min(0.1, measured(*args)))
    changes = {"train.train_steps": 9, "train.warmup_steps": 3, "train.lr_decay": "cosine"}
    for key, value in changes.items():
        monkeypatch.setitem(tables.BUDGETS["smoke"].changes, key, value)
    peer = _python(
        tmp_path / "python",
        """
        given = dict(x[2:].split("=", 1) for x in sys.argv[2:])
        with np.load(given["images"]) as images:
            shape = images["arr_0"].shape
        assert given["seconds"] == "1.0", given
        made = np.random.default_rng(0).integers(256, size=(int(given["num_samples"]), *shape[1:]))
        np.savez(given["output"], arr_0=made.astype(np.uint8))
        """,
    )
    code, results, _ = run("peer", "--seconds=1", peer)
    assert code == 0
    ours, *peers = results["rows"]
    assert "accuracy" in ours["scores"]  # without labels nothing is recognised
    assert ["accuracy" in row["scores"] for row in peers] == [False, False]
    assert [row["evaluations"] for row in peers] == [2, 2]
    with pytest.raises(UserError, match="--torch_python is not given: expected a Python with"):
        run("peer", "--seconds=1", f"--results={tmp_path}")
    assert not list(tmp_path.glob("*.json"))  # before our row is made
    with monkeypatch.context() as slow:
        slow.setattr(lab.Lab, "_seconds_of_step", lambda self, config: 1.0)
        few = "--seconds=1: expected at least 6, in which base16 is trained for 3 steps here"
        slow.setattr(lab.Lab, "trained", None)  # before anything is trained
        with pytest.raises(UserError, match=few):
            run("peer", "--seconds=1", f"--results={tmp_path}", peer)
    broken = _python(tmp_path / "broken", "sys.exit('no module named diffusers')")
    with pytest.raises(UserError, match="broken: no module named diffusers"):
        run("peer", "--seconds=1", f"--results={tmp_path}", broken)


@pytest.mark.parametrize("budget", ["cpu", "gpu", "smoke"])
def test_every_row_of_every_table_has_a_config(tmp_path, monkeypatch, budget):
    from lab import Lab
    from real_images import Data
    from tables import BUDGETS, TABLES

    monkeypatch.setattr(Lab, "_flops_of_step", lambda self, config: 1e9)
    for table in TABLES.values():
        named = budget != "smoke" and table.changes.get("data.name") == "folder"
        data = Data(path="PHOTOS" if named else None)
        lab = Lab(BUDGETS[budget], table, data, tmp_path, made_by="", deadline=0.0)
        labels = []
        for row in table.rows(BUDGETS[budget]):
            labels.append(row.label)
            assert len(row.aug_levels) == max(0, len(row.models) - 1) or row.images != "cascade"
            for model in row.models:
                config = lab.config(model, seed=3)
                assert config.train.seed == 3
                row.sampler_of(config.stage)
        assert len({str(label) for label in labels}) == len(labels)


def test_out_of_time_it_stops_and_says_what_is_missing(run, capsys):
    code, results, _ = run("samplers", "--minutes=1e-9")
    assert (code, results) == (75, None)
    assert re.search(r"out of time: \d+ rows are missing; run it again", capsys.readouterr().out)


def test_a_training_that_runs_out_of_time_goes_on_where_it_was(run, tmp_path, monkeypatch):
    import lab

    fresh = [f"--workdir={tmp_path / 'work'}", f"--results={tmp_path}"]
    monkeypatch.setattr(lab, "_REPORT_STEPS", 2)
    trained = []
    original = lab.step_lib.compile_train_step

    def counted(*args, **kwargs):
        program = original(*args, **kwargs)

        def step(state, records):
            trained.append(int(state.step))
            return program(state, records)

        return step

    lab._train_program.cache_clear()
    monkeypatch.setattr(lab.step_lib, "compile_train_step", counted)
    monkeypatch.setattr(lab.Lab, "_is_late", lambda self: len(trained) == 2)
    assert run("inputs", *fresh)[0] == 75
    (part,) = tmp_path.glob("work/*/models/*.part")
    assert trained == [0, 1]
    monkeypatch.setattr(lab.Lab, "_is_late", lambda self: False)
    assert run("inputs", *fresh)[0] == 0
    assert trained[:3] == [0, 1, 2]
    assert not part.exists()
    lab._train_program.cache_clear()
    (results,) = tmp_path.glob("inputs*.json")
    rows = json.loads(results.read_text())["rows"]
    whole = [row for row in run("inputs")[1]["rows"] if row["seed"] == 0]
    assert list(map(_without_time, rows)) == list(map(_without_time, whole))


def test_a_training_that_is_killed_goes_on_where_it_last_stored(run, tmp_path, monkeypatch):
    import lab

    class Killed(BaseException):
        pass

    fresh = [f"--workdir={tmp_path / 'work'}", f"--results={tmp_path}", "--flops=1e10"]
    monkeypatch.setattr(lab, "_REPORT_STEPS", 2)
    monkeypatch.setattr(lab, "_STORE_SECS", 0)
    stored, restored = [], []
    original = {name: getattr(lab, name) for name in ("_stored", "_restored")}

    def killed(state):
        if len(stored) == 2:
            raise Killed
        stored.append(int(state.step))
        return original["_stored"](state)

    def seen(path, state):
        state = original["_restored"](path, state)
        restored.append(int(state.step))
        return state

    monkeypatch.setattr(lab, "_stored", killed)
    with pytest.raises(Killed):
        run("inputs", *fresh)
    monkeypatch.setattr(lab, "_stored", original["_stored"])
    monkeypatch.setattr(lab, "_restored", seen)
    assert run("inputs", *fresh)[0] == 0
    assert (stored, restored) == ([2, 4], [4])


def test_samples_that_run_out_of_time_go_on_where_they_were(run, tmp_path, monkeypatch):
    import lab

    fresh = ["--num_samples=60", f"--results={tmp_path}"]
    made = []
    original = lab.generate.make_enlarger

    def counted(*args, **kwargs):
        enlarge = original(*args, **kwargs)

        def batch(params, rows, level):
            made.append(rows[0])
            return enlarge(params, rows, level)

        return batch

    monkeypatch.setattr(lab.generate, "make_enlarger", counted)
    monkeypatch.setattr(lab.Lab, "_is_late", lambda self: len(made) == 2)
    assert run("inputs", *fresh)[0] == 75
    assert made == [0, 20]
    monkeypatch.setattr(lab.Lab, "_is_late", lambda self: False)
    assert run("inputs", *fresh)[0] == 0
    assert made[:3] == [0, 20, 40]
    # Other tests have stores of two batches there.
    (damaged, *_) = tmp_path.parent.glob("ablations*/work/*/samples/*/000002.npz")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    (tmp_path / "inputs_smoke.json").unlink()
    with pytest.raises(UserError, match="missing or damaged; run the same command again"):
        run("inputs", *fresh)
    assert run("inputs", *fresh)[0] == 0


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("code", "another program (0123456789ab, now "),
        ("device", "another device (a TPU, now "),
        ("versions", "other versions (a JAX, now Python "),
        ("settings", "other settings (flops = 5.0, now flops = 1000000000.0)"),
    ],
)
def test_rows_of_another_origin_are_not_mixed(run, augmentation, key, found):
    _, results, path = augmentation
    other = {"code": "0123456789ab", "device": "a TPU", "versions": "a JAX"}
    changed = {**results["settings"], "flops": 5.0}
    whole = path.read_text()
    path.write_text(json.dumps({**results, key: other.get(key, changed)}))
    with pytest.raises(UserError, match=re.escape(f"{path}: was begun with {found}")):
        run("augmentation")
    path.write_text(whole)


def test_too_small_a_budget_is_refused_with_what_it_needs(run):
    with pytest.raises(
        UserError, match=r"--flops=1e\+07: expected at least \d\.\d+e\+\d+, by which"
    ):
        run("augmentation", "--flops=1e7")


@pytest.mark.parametrize("flag", ["--seeds=0", "--flops=-1", "--num_samples=1", "--minutes=0"])
def test_numbers_that_cannot_be_are_refused(run, flag):
    with pytest.raises(UserError, match=re.escape(flag.replace("-1", "-1.0"))):
        run("augmentation", flag)


def test_a_folder_that_is_not_named_is_one_line(run):
    with pytest.raises(UserError, match="--data_path is not given: expected the folder with"):
        run("augmentation", "--data_name=folder")


def test_missing_images_are_named_with_the_command_that_makes_them(run, tmp_path):
    missing = tmp_path / "nothing"
    folder = ("--data_name=folder", f"--data_path={missing}")
    with pytest.raises(UserError, match="python -m cascaded_diffusion.prepare --config=configs"):
        run("augmentation", *folder)
    with pytest.raises(UserError, match="name a folder of images by --data_name") as e:
        run("blur", "--flops=1e12", *folder)
    assert "prepare" not in str(e.value)  # its photos are read as they are


def test_a_table_goes_between_its_marks_and_nowhere_else(tmp_path, augmentation):
    import pages

    _, results, _ = augmentation
    page, text = tmp_path / "page.md", pages.table_of(results, results["rows"])
    page.write_text("before\n<!-- ablations: augmentation_smoke -->\nold\n<!-- end -->\nafter\n")
    pages.write_into(page, "augmentation_smoke", text)
    assert pages.section_in(page.read_text(), "augmentation_smoke") == text
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("<!-- end -->\nafter\n")
    with pytest.raises(UserError, match="expected the lines"):
        pages.write_into(page, "inputs_smoke", text)


def test_seeds_are_one_line_with_their_spread(augmentation):
    import pages

    rows = augmentation[1]["rows"][:1]
    twice = [*rows, {**rows[0], "seed": 1, "scores": {**rows[0]["scores"], "fd": 3.0}}]
    twice[0]["scores"]["fd"] = 1.0
    text = pages.table_of(augmentation[1], twice)
    assert "| 2.00 (1.00 to 3.00) |" in text
    assert "40 samples a row, the mean of 2 seeds (the least to the greatest)" in text
    # A row of one seed only, and of fewer samples, says so.
    short = {**augmentation[1]["rows"][1], "num_samples": 30}
    text = pages.table_of(augmentation[1], [*twice, short])
    assert "the mean of 1 to 2 seeds, as the table is not complete" in text
    assert ("| samples |" in text, "| 30 |" in text, "samples a row" in text) == (True, True, False)


def test_a_plot_waits_for_rows_to_draw(augmentation):
    import pages

    about, rows = augmentation[1], augmentation[1]["rows"]
    assert pages.plot_of(about, rows[:1]) is None  # a single model, without a level
    assert pages.plot_of(about, rows) is not None


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_the_docs_have_the_tables_of_the_stored_rows(path):
    import pages

    results = json.loads(path.read_text())
    for key in ("commit", "command", "device", "machine"):
        assert results[key]
    assert "uncommitted" not in results["commit"]
    assert all(row["wall_s"] > 0 for row in results["rows"])
    page = (ROOT / "docs" / "results.md").read_text()
    assert pages.section_in(page, path.stem) == pages.table_of(results, results["rows"])
