"""What a training that the devices refuse is told."""

import sys
import threading

import jax
import pytest

from cascaded_diffusion.commands import entry, train_stage
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime import mesh
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.tiny import round_trip, tiny_base


def test_too_little_memory_is_one_line_with_batch_estimate_and_keys(tmp_path, monkeypatch):
    def allocates(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(train_stage, "train", allocates)
    config = tiny_base()
    with pytest.raises(UserError) as error:
        train_stage.train_stage(config, RunFolder(tmp_path / "run"))
    text = str(error.value)
    problem = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
    assert text.startswith(f"out of memory ({problem}): config.train.batch_size = 16, ")
    assert "by estimate a device needs " in text
    # The estimate said that it fits, so what needs less is meant.
    assert "; try --config." in text
    assert "\n" not in text


def test_other_errors_of_the_device_stay_what_they_are(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel failed")

    monkeypatch.setattr(train_stage, "train", fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel failed"):
        train_stage.train_stage(tiny_base(), RunFolder(tmp_path / "run"))


def test_a_split_that_is_trained_on_is_not_taken_for_held_out_in_silence():
    assert train_stage.prepared(tiny_base(), None).notes == []
    config = round_trip(tiny_base(), data__eval_split="train[90%:]")
    (note,) = train_stage.prepared(config, None).notes
    problem = "config.data.eval_split = 'train[90%:]' has images of train_split = 'train'"
    assert note.startswith(f"warning: {problem}")


def test_hosts_with_other_images_do_not_train_together(monkeypatch):
    """Like a host whose disk lacks a photo, or where a class is called otherwise."""
    monkeypatch.setattr(mesh, "broadcast_from_process_0", lambda numbers: [1] * len(numbers))
    assert not mesh.is_as_in_process_0("one thing or another")
    with pytest.raises(
        UserError,
        match=r"config.data: process 0 finds other images or classes than process 0 does \('train'"
        r" is 'mnist:train:4000 images:.*'\); give all hosts the same images$",
    ):
        train_stage.prepared(tiny_base(), None)


def test_a_class_without_images_to_train_on_is_named(monkeypatch):
    load_splits = train_stage.load_splits

    def without_two(*args):
        sources = load_splits(*args)
        sources["train"].class_counts = [0 if k in (3, 7) else 400 for k in range(10)]
        return sources

    monkeypatch.setattr(train_stage, "load_splits", without_two)
    assert train_stage.prepared(tiny_base(), None).notes == [
        "warning: config.data.train_split = 'train' has no image of the class 3, 7"
    ]


def test_too_little_memory_elsewhere_is_one_line_of_the_binary(monkeypatch, capsys):
    for owner, name in ((threading, "excepthook"), (sys, "unraisablehook")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(entry.INTERRUPTS, "install", lambda: None)

    def allocates(argv):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore about it")

    with pytest.raises(SystemExit) as end:
        entry.run(allocates)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a device is out of memory (RESOURCE_EXHAUSTED: Out of memory);")
    assert "config.eval.batch_size (evaluate)" in line
