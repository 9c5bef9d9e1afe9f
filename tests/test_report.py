"""The report of hand-made run folders, read back with the standard parser."""

import html.parser
import json
import subprocess
import sys

import numpy as np
import pytest

from cascaded_diffusion import report
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import append_line
from cascaded_diffusion.reporting.page import _SCRIPT
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.tiny import ROOT, tiny_base, tiny_sr

VOID = {"meta", "img", "br"}
HOSTILE = "<script>alert('x')</script>"


class Parser(html.parser.HTMLParser):
    """Checks that tags nest, and collects text and attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.sources, self.tags, self.alts = [], [], [], set(), []
        self.scripts = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "data"):
                self.sources.append(value)
            if name == "alt":
                self.alts.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)


def _parsed(path):
    parser = Parser()
    parser.feed(path.read_text())
    assert parser.open == []
    # Self-contained: nothing is fetched, and nothing runs but the sliders.
    assert all(s.startswith(("data:image/png;base64,", "#")) for s in parser.sources)
    assert not {"link", "iframe", "object"} & parser.tags
    assert parser.scripts in ([], [_SCRIPT])
    assert all(parser.alts)
    return parser, "\n".join(parser.text)


def _record(step, metric, value, **extra):
    return {
        "step": step,
        "ema_decay": 0.995,
        "metric": metric,
        "value": value,
        "num_samples": 1000,
        "reference": "mnist:train:4000",
        "features": "classifier:abc",
        "low_res": "none",
        "aug_level": None,
        "sampler": {"name": "ddim"},
        "seed": 0,
        **extra,
    }


def _png(path):
    pictures.save_png(path, np.zeros((4, 4, 3), np.uint8))


def _run(path, config):
    folder = RunFolder(path)
    folder.write_config(config)
    for step in range(1, 6):
        append_line(folder.metrics_path, {"step": step, "loss": 1 / step, "images_per_sec": 10.5})
    for step, value in ((2, 5.125), (4, 4.0625)):
        append_line(folder.results_path, _record(step, "fd_classifier_1k", value))
        append_line(folder.results_path, _record(step, "is_classifier_1k", 8 + step / 16))
    append_line(
        folder.results_path, _record(5, "fd_classifier_1k", None, failed=f"damaged {HOSTILE}")
    )
    folder.results_path.open("a").write('{"step": 6, "metr')  # cut off by a crash
    folder.best_path.write_text(json.dumps(_record(4, "fd_classifier_1k", 4.0625)))
    _png(folder.eval / "step_4_none.png")
    _png(folder.eval / "step_2_none.png")
    return folder


def _final(folder):
    record = {
        "stage": HOSTILE,
        "step": 4,
        "ema_decay": 0.995,
        "num_samples": 50000,
        "low_res": "real",
        "references": {"train": {"num_images": 4000}},
        "metrics": {"fid_50k_train": 1.484375, "fid_50k_val": 2.484375},
        "health": {
            "channel_mean_drift": [0.25],
            "psnr_low_res": {"mean": 31.5, "min": 22.25},
            "aug_response": {
                "aug_levels": [0.0, 0.5],
                "psnr_low_res": [30.75, 20.125],
                "change": [0.0, 3.375],
            },
        },
    }
    (folder.eval / "final_real.json").write_text(json.dumps(record))
    _png(folder.eval / "final_real.png")
    _png(folder.eval / "final_real_level_0.png")
    _png(folder.eval / "final_real_level_0.5.png")
    cas = {
        "metric": "cas",
        "network": "resnet",
        "generated": {"top1": 0.8125, "top5": 0.96875, "num_images": 1000},
        "real": {"top1": 0.9375, "top5": 0.984375, "num_images": 4000},
        "test_images": 1000,
    }
    append_line(folder.cas_path, cas)


def test_a_run_of_which_all_is_known(tmp_path, capsys):
    folder = _run(tmp_path, tiny_sr())
    _final(folder)
    append_line(
        folder.results_path,
        {
            "step": 4,
            "ema_decay": 0.995,
            "metric": "bits_per_dim",
            "value": 3.515625,
            "standard_error": 0.015625,
        },
    )
    assert report.main(["report", f"--workdir={tmp_path}"]) == 0
    assert "report.html: " in capsys.readouterr().out
    parser, text = _parsed(tmp_path / "report.html")
    for number in (
        *("5.125", "4.0625", "8.125", "8.25", "1.48438", "2.48438", "31.5", "22.25", "30.75"),
        *("20.125", "3.375", "0.8125", "0.96875", "0.9375", "3.51562", "0.015625", "10.5"),
    ):
        assert number in text, number
    assert "Chosen: step 4, EMA 0.995, fd_classifier_1k 4.0625." in text
    assert f"failed: damaged {HOSTILE}" in text  # as text, not as a tag
    assert "stage.network.channels" in text
    assert "jaxlib" in text
    # loss, speed, two metrics, the response, two levels, the final grid, two checkpoints' grids.
    assert len(parser.alts) == 10
    assert parser.scripts == [_SCRIPT]
    assert "Real images enlarged at aug_level 0.5" in parser.alts
    assert [alt for alt in parser.alts if alt.startswith("step")] == [
        "step 2: none",
        "step 4, chosen: none",
    ]


def test_a_run_that_has_just_begun_says_what_is_missing(tmp_path):
    RunFolder(tmp_path).write_config(tiny_base())
    report.main(["report", f"--workdir={tmp_path}", f"--output={tmp_path}/page.html"])
    _, text = _parsed(tmp_path / "page.html")
    for sentence in ("Nothing was logged yet.", "Not evaluated yet.", "No final numbers yet"):
        assert sentence in text
    assert "training or stopped, at step 0 of 30" in text


def test_the_runs_of_a_cascade_in_order_of_resolution(tmp_path):
    _run(tmp_path / "asr", tiny_sr())
    _run(tmp_path / "base16", tiny_base())
    _png(tmp_path / "samples" / "samples.png")
    sweep = {"aug_levels": [0.3], "truncated": True, "fd_classifier_1k": 3.6875, "stages": ["x"]}
    pictures = ("sr32_1.png", "sr32_2.png", "sr32_lost.png", "../samples/samples.png", None)
    for level, name in zip((0.3, 0.1, 0.2, 0.4, 0.5), pictures, strict=True):
        values = sweep | {"aug_levels": [level]} | ({"picture": name} if name else {})
        append_line(tmp_path / "sweep" / "sr32.jsonl", values)
    for name in pictures[:2]:
        _png(tmp_path / "sweep" / name)
    _png(tmp_path / "sweep" / "sr32.png")
    report.main(["report", f"--workdir={tmp_path}"])
    page = tmp_path / "report.html"
    parser, text = _parsed(page)
    assert text.index("16 px base stage") < text.index("32 px super-resolution stage")
    assert "3.6875" in text
    assert "Sweep of sr32" in parser.alts
    # The slider over what was scored goes from the lowest level to the highest.
    about = "truncated True, fd_classifier_1k 3.688"
    shown = [alt for alt in parser.alts if alt.startswith("aug_levels")]
    assert shown == [f"aug_levels [0.1], {about}", f"aug_levels [0.3], {about}"]
    assert "sr32_1.png" not in text
    assert "Real images, their enlargement, and the cascade's samples" in parser.alts
    assert '<div class="as-they-are"><figure><img alt="Real images' in page.read_text()


def test_scores_of_other_settings_are_told_apart(tmp_path):
    folder = _run(tmp_path, tiny_base())
    # The same step as the chosen one, in fewer steps: of another run of `evaluate`, and later.
    for step, value in ((2, 9.125), (4, 9.0625)):
        other = {"name": "ddim", "num_steps": 1}
        append_line(folder.results_path, _record(step, "fd_classifier_1k", value, sampler=other))
    report.main(["report", f"--workdir={tmp_path}"])
    parser, text = _parsed(tmp_path / "report.html")
    assert parser.alts.count("fd_classifier_1k over checkpoints") == 2
    assert text.index("4.0625") < text.index("9.0625") < text.rindex("num_steps")
    assert text.count("What was measured, against what") == 2


def test_settings_of_a_sweep_are_told_apart(tmp_path):
    _run(tmp_path / "base16", tiny_base())
    for steps in (10, 25):
        sampler = {"name": "heun", "num_steps": steps, "guidance_scale": 1.5}
        record = {"stages": ["base16@4"], "samplers": [sampler], "aug_levels": [], "fid_1k": 1.0}
        append_line(tmp_path / "sweep" / "base16.jsonl", record)
    report.main(["report", f"--workdir={tmp_path}"])
    _, text = _parsed(tmp_path / "report.html")
    for shown in ("heun", "10", "25", "1.5", "base16@4"):
        assert shown in text[text.index("Sweep of base16") :]


def test_bad_calls_are_one_line(tmp_path):
    with pytest.raises(UserError, match=f"--workdir={tmp_path}: no run there, nor in a folder"):
        report.main(["report", f"--workdir={tmp_path}"])
    RunFolder(tmp_path).write_config(tiny_base())
    with pytest.raises(UserError, match="--output=/proc/x.html|--output=/proc: cannot write"):
        report.main(["report", f"--workdir={tmp_path}", "--output=/proc/x.html"])


def test_it_needs_no_jax(tmp_path):
    _run(tmp_path, tiny_base())
    code = (
        "import sys\n"
        "from cascaded_diffusion import report\n"
        f"report.main(['report', '--workdir={tmp_path}'])\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_files_that_no_binary_writes_do_not_stop_the_page(tmp_path, capsys):
    folder = _run(tmp_path, tiny_sr())
    _final(folder)
    with folder.metrics_path.open("ab") as f:
        f.write(b'\xff\n{"step": "six"}\n[1]\n')
    with folder.results_path.open("ab") as f:
        f.write(b'\n{"step": "4", "metric": "x"}\n' + b"[" * 100_000 + b"\n")
    folder.best_path.write_text("{")
    folder.complete_path.write_text("[]")
    folder.cas_path.write_text('{"generated": 3}\n')
    (folder.eval / "final_real.json").write_text("[" * 100_000)
    _png(folder.eval / "step_x_none.png")
    assert report.main(["report", f"--workdir={tmp_path}"]) == 0
    told = capsys.readouterr().err
    assert "metrics.jsonl: 3 line(s) that are no records" in told
    assert "results.jsonl: 3 line(s) that are no records" in told
    assert "best.json: cannot be read" in told
    _, text = _parsed(tmp_path / "report.html")
    assert text.count("Cannot be shown") == 2
    assert "final_real.json cannot be read" in text
    assert "fd_classifier_1k" in text


def test_a_folder_in_place_of_results_is_one_line(tmp_path):
    folder = _run(tmp_path, tiny_sr())
    folder.results_path.unlink()
    folder.results_path.mkdir()
    with pytest.raises(UserError, match="results.jsonl: expected a file"):
        report.main(["report", f"--workdir={tmp_path}"])
