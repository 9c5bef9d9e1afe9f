"""The benchmark for accelerators: rows are kept whatever happens, kernels are told apart."""

import argparse
import json
import pathlib
import runpy
import sys
import textwrap
import types

import pytest

from cascaded_diffusion.errors import UserError

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs all parts; `script(part)` is the Python that stands for a part's process."""
    import accelerator

    def run(script, *, seconds=60.0, configs=("base64", "sr64"), **settings):
        monkeypatch.setattr(
            accelerator.Part,
            "command",
            lambda self, args: [sys.executable, "-c", textwrap.dedent(script(self))],
        )
        args = argparse.Namespace(
            configs=list(configs),
            batch_sizes=None,
            seconds=seconds,
            torch=False,
            torch_python=None,
            keep_cache=False,
            flags=[],
            output=tmp_path / "rows.jsonl",
        )
        vars(args).update(settings)
        rows = accelerator.run_all(args, {"machine": "here"})
        stored = [json.loads(line) for line in args.output.read_text().splitlines()]
        assert stored == [{**row, "machine": "here"} for row in rows]
        return rows

    return run


def test_training_comes_first_and_the_rest_takes_its_batch(measured):
    rows = measured(lambda part: f"print('{{\"batch_size\": {part.batch_size or 24}}}')")
    assert [(row["config"], row["part"]) for row in rows] == [
        ("base64", "train"),
        ("sr64", "train"),
        ("base64", "cached"),
        ("base64", "forward"),
        ("sr64", "cached"),
        ("sr64", "forward"),
    ]
    assert {row["batch_size"] for row in rows} == {24}


def test_a_part_that_is_stopped_keeps_what_it_had(measured, monkeypatch):
    import accelerator

    monkeypatch.setattr(accelerator, "LIMITS", dict.fromkeys(accelerator.LIMITS, 1.5))
    (row, *_) = measured(
        lambda part: (
            """
            import time
            print('{"compile_secs": 3.0}', flush=True)
            time.sleep(60)
        """
        ),
        configs=["base64"],
    )
    assert row["compile_secs"] == 3.0
    assert row["problem"] == "stopped after 2 s"


def test_out_of_memory_tries_the_next_smaller_batch(measured):
    rows = measured(
        lambda part: (
            f"""
            import sys
            batch = {part.batch_size or 64}
            if batch > 32:
                print('{{"problem": "out of memory", "smaller": %d}}' % (batch // 2))
                sys.exit(1)
            print('{{"batch_size": %d}}' % batch)
        """
        ),
        configs=["base64"],
    )
    assert [row.get("problem") for row in rows] == ["out of memory", None, None, None]
    assert [row.get("batch_size") for row in rows[1:]] == [32, 32, 32]


def test_without_time_left_nothing_is_begun(measured):
    rows = measured(lambda part: "1/0", configs=["base64"], seconds=1.0)
    assert {row["problem"] for row in rows} == {"no time left"}


def test_a_part_that_fails_says_so(measured):
    rows = measured(lambda part: "import sys; sys.exit(3)", configs=["base64"])
    assert {row["problem"] for row in rows} == {"ended with exit code 3"}


def test_flags_of_xla_are_tried_one_by_one(measured, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--here")
    script = "import json, os; print(json.dumps({'seen': os.environ['XLA_FLAGS']}))"
    rows = measured(lambda part: script, configs=["base64"], flags=["--a=1", "--b=2"])
    assert [row["seen"] for row in rows if row["part"].startswith("train")] == [
        "--here",
        "--here --a=1",
        "--here --b=2",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--configs=base65"], "--configs: there is no configs/base65.py"),
        (["--batch_sizes=8"], "--batch_sizes: 1 numbers for 3 --configs"),
        (["--configs=sr64", "--batch_sizes=0"], "--batch_sizes=0: expected at least 1"),
        (["--seconds=5"], "--seconds=5: expected at least 20"),
    ],
)
def test_bad_flags_are_refused_in_one_line(argv, message):
    import accelerator

    with pytest.raises(UserError) as e:
        accelerator.main(["accelerator.py", *argv])
    assert str(e.value) == message


def test_the_table_has_the_ratio_to_pytorch_and_the_largest_kernels():
    import accelerator

    largest = {"wgrad": 17.74, "concatenate": 8.3}
    rows = [
        {
            "config": "base64",
            "part": "train",
            "images_per_sec": 600.0,
            "mfu": 0.36,
            "largest": largest,
        },
        {"config": "base64", "part": "torch", "images_per_sec": 400.0, "way": "torch.compile"},
    ]
    text = "\n".join(accelerator.table(rows))
    assert "| base64, train | 600.0 | **36.0 %** |" in text
    assert "base64: 1.50 times PyTorch's images/s (torch.compile)." in text
    assert "| base64, train: kernel | ms a step |\n|---|---|\n| `wgrad` | 17.74 |" in text


def test_the_pytorch_side_reads_the_config_of_the_same_name(monkeypatch):
    torch = types.SimpleNamespace(nn=types.SimpleNamespace(Module=object), Tensor=object)
    monkeypatch.setitem(sys.modules, "unet_torch", types.SimpleNamespace(torch=torch))
    script = runpy.run_path(str(FOLDER / "accelerator_torch.py"))
    stage, network = script["network_of"]("base64", small=False)  # Python has a base64, too
    assert stage["kind"] == "base"
    assert (network["resolution"], network["out_channels"], network["num_classes"]) == (64, 6, 1000)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_wgrad_indexed_implicit_gemm_indexed_bf16", "convolutions and products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "convolutions and products"),
        ("gemm_fusion_dot_85", "convolutions and products"),
        ("convolution fusion", "convolutions and products"),
        ("input_reduce_fusion_12", "reductions"),
        ("input_transpose_fusion_3", "transposes and copies"),
        ("MemcpyD2D", "transposes and copies"),
        ("wrapped_concatenate", "transposes and copies"),
        ("loop_convert_fusion", "elementwise"),
        ("loop_compare_select_fusion", "elementwise"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collectives"),
        ("sm90_unknown", "rest"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name, kind):
    import kernel_times

    assert kernel_times.kind_of(name) == kind


@pytest.mark.usefixtures("one_layer")
def test_a_training_step_is_measured_and_traced_here(capsys, monkeypatch):
    import accelerator_part

    from tests.tiny import smallest_base

    monkeypatch.setattr(accelerator_part, "ROUNDS", 1)
    config = accelerator_part.placed(smallest_base(), 16)
    accelerator_part.train(config)
    out, err = capsys.readouterr()
    found = {k: v for line in out.splitlines() for k, v in json.loads(line).items()}
    assert found["batch_size"] == 16
    assert found["images_per_sec"] == pytest.approx(16e3 / found["step_ms"])
    assert found["tflops"] > 0
    assert "mfu" not in found
    assert "cpu: not in the table of peaks, so MFU is left out" in err
    assert found["kernels"]["convolutions and products"] > 0
