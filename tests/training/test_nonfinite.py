"""Steps that are not finite: one is skipped, too many end the training, and a replay shows why."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cascaded_diffusion.commands.replay_step import replay_step
from cascaded_diffusion.commands.train_stage import prepared, train_stage
from cascaded_diffusion.config.schema import TrainConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.training import step as step_lib
from cascaded_diffusion.training.nonfinite import NonFiniteSteps
from tests.tiny import smallest_base

CONFIG = smallest_base(
    train__train_steps=12,
    train__batch_size=1024,  # of 4,000 images
    train__warmup_steps=0,
    train__log_every_steps=1,
    train__sample_every_steps=None,
    train__max_nonfinite_per_thousand=1,
    checkpoint__save_every_steps=1,
    checkpoint__max_to_keep=100,
)


@pytest.fixture
def poisoned(one_layer, monkeypatch):
    """The number of a record whose image is infinite on the device; the second step has it."""
    given = prepared(CONFIG, None)
    bad = int(given.stream[1]["index"][37])
    image = jnp.asarray(given.source[bad]["image"])
    drawn = step_lib.noised_batch

    def with_poison(stage, state, records):
        noised, key = drawn(stage, state, records)
        is_bad = (records["image"] == image).all((1, 2, 3), keepdims=True)
        return dataclasses.replace(noised, x0=jnp.where(is_bad, jnp.inf, noised.x0)), key

    monkeypatch.setattr(step_lib, "noised_batch", with_poison)
    return bad


def _state(folder, step):
    restored = ocp.PyTreeCheckpointer().restore(folder.checkpoints / str(step) / "state")
    return {name: jax.tree.leaves(restored[name]) for name in restored}


def test_a_bad_record_costs_its_step_and_is_named_by_a_replay(poisoned, tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError) as ended:
        train_stage(CONFIG, folder)
    first, second = read_lines(folder.nonfinite_log)
    assert first["step"] == 2
    said = capsys.readouterr().out
    assert f"step {first['step']} is not finite and was skipped (grad_norm nan; loss " in said

    # Every step's records are known, and only steps with the bad one were skipped.
    given = prepared(CONFIG, None)
    for step in range(1, second["step"] + 1):
        numbers = given.stream[step - 1]["index"].tolist()
        line = {first["step"]: first, second["step"]: second}.get(step)
        assert (poisoned in numbers) == (line is not None)
        if line is not None:
            assert line["records"] == numbers

    # The step changed nothing but its number; the one after it trained on.
    at = first["step"]
    before, skipped, after = (_state(folder, step) for step in (at - 1, at, at + 1))
    for name in ("params", "ema_params", "opt_state"):
        for old, same, new in zip(before[name], skipped[name], after[name], strict=True):
            np.testing.assert_array_equal(old, same)
            assert np.isfinite(new).all()
    assert any(
        (old != new).any() for old, new in zip(before["params"], after["params"], strict=True)
    )
    records = {r["step"]: r for r in folder.metrics()}
    assert "loss" not in records[at]
    assert records[at]["nonfinite_steps"] == 1
    assert np.isfinite(records[at + 1]["loss"])

    text = str(ended.value)
    dump = folder.nonfinite / str(second["step"])
    assert text.startswith(
        f"2 of the last 1000 steps were not finite, the last of them step {second['step']} ("
    )
    assert f"`python -m cascaded_diffusion.main --replay={dump}`" in text
    assert replay_step(dump, None) == 0
    found = capsys.readouterr().out
    row = second["records"].index(poisoned)
    assert f"rows whose loss is not finite: {row} (record {poisoned})\n" in found
    assert found.endswith("the same as recorded\n")
    assert "gradients that are not finite: conv_in/bias, conv_in/kernel" in found

    # A run that goes on remembers.
    with pytest.raises(UserError, match="2 of the last 1000 steps were not finite"):
        train_stage(CONFIG, folder)
    assert len(read_lines(folder.nonfinite_log)) <= 4


@pytest.mark.usefixtures("poisoned")
def test_a_replay_says_if_the_step_is_finite_now(tmp_path, capsys, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError):
        train_stage(CONFIG, folder)
    monkeypatch.undo()
    (dump,) = folder.nonfinite.iterdir()
    from tests.one_layer import in_place_of_the_unet

    with in_place_of_the_unet():
        assert replay_step(dump, None) == 1
    out = capsys.readouterr().out
    assert f"step {dump.name} is finite here: " in out
    assert "recorded: {" in out


def _policy(tmp_path, first_step=0, **changes):
    train = dict.fromkeys(TrainConfig.__dataclass_fields__) | changes
    return NonFiniteSteps(
        TrainConfig(**train), RunFolder(tmp_path), first_step=first_step, writes=True
    )


def _first_end(policy, steps):
    for step in steps:
        if (reason := policy.add(step, {"loss": float("nan")}, [], None)) is not None:
            return step, reason
    return None


def test_three_in_a_row_or_eleven_of_a_thousand_are_too_many(tmp_path):
    ended = _first_end(_policy(tmp_path / "a"), [1, 2, 4, 5, 7, 8, 9])
    assert ended == (9, "3 steps in a row were not finite")
    ended = _first_end(_policy(tmp_path / "b"), range(100, 5000, 90))
    assert ended == (1000, "11 of the last 1000 steps were not finite")
    assert _first_end(_policy(tmp_path / "c"), range(100, 5000, 100)) is None
    ended = _first_end(_policy(tmp_path / "d", max_nonfinite_in_row=2), [5, 6])
    assert ended == (6, "2 steps in a row were not finite")


def test_what_was_counted_before_a_kill_counts(tmp_path):
    assert _first_end(_policy(tmp_path), [7, 8, 12]) is None
    again = _policy(tmp_path, first_step=8)
    assert again.count == 2
    assert again.near(9)
    assert not again.near(1008)
    assert _first_end(again, [9]) == (9, "3 steps in a row were not finite")
    lines = read_lines(again._folder.nonfinite_log)
    assert [line["step"] for line in lines] == [7, 8, 9]  # 12 is done again
