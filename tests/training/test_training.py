"""The trainer's promises, on a network of one layer."""

import itertools
import json
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.cascade.pixels import float_from_uint8, uint8_from_float
from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.data.loader import build_stream, iterate
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import read_lines
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.run_data import RunData
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.training import loop
from cascaded_diffusion.training import step as step_lib
from tests.tiny import Split, random_source, round_trip, smallest_base, smallest_sr, two_devices

pytestmark = pytest.mark.usefixtures("one_layer")
SOURCE = random_source(64)
EXAMPLES = {"image": SOURCE.raw.images[:40], "label": SOURCE.raw.labels[:40]}


def _data(config):
    stream = build_stream(SOURCE, config.data, global_batch_size=config.train.batch_size)
    return lambda start: iterate(stream, SOURCE, config.data, start_step=start)


def _train(config, path, data_from=None, **settings):
    return loop.train(
        config,
        RunFolder(path),
        data_from or _data(config),
        image_shape=SOURCE.image_shape,
        grid_examples=EXAMPLES,
        mesh=two_devices(),
        **settings,
    )


def _losses(path):
    return {r["step"]: (r["loss"].hex(), r["grad_norm"].hex()) for r in _records(path)}


def _records(path):
    return read_lines(RunFolder(path).metrics_path)


def test_what_is_trained_changes_only_where_it_is_allowed(tmp_path, capsys):
    begun = {"train__train_steps": 2, "train__warmup_steps": 0}
    _train(smallest_base(**begun), tmp_path)
    changed = {**begun, "train__train_steps": 3, "train__learning_rate": 0.5}
    with pytest.raises(UserError, match=r"--allow_changed=train\.learning_rate"):
        _train(smallest_base(**changed), tmp_path)
    allowed = ["train.learning_rate"]
    assert _train(smallest_base(**changed), tmp_path, allow_changed=allowed).step == 3
    assert "changed since the run began: config.train.learning_rate" in capsys.readouterr().out
    assert RunFolder(tmp_path).read_config().train.learning_rate == 0.5
    for other, message in (
        ({"stage__network__channels": 16}, "needs other parameters than the run has: .* was"),
        ({"train__ema_decays": (0.5,), "eval__ema_decays": (0.5,)}, "needs other parameters"),
    ):
        config = smallest_base(**{**changed, **other})
        with pytest.raises(UserError, match=message):
            _train(config, tmp_path, allow_changed=["train", "stage.network"])


def test_a_longer_run_resumes_from_a_finished_one(tmp_path, monkeypatch):
    # And None is never: no grid of samples, not at the last step either.
    monkeypatch.setattr(loop, "GridSampler", None)
    config = smallest_base(
        train__train_steps=4,
        train__warmup_steps=1,
        train__sample_every_steps=None,
    )
    assert _train(config, tmp_path / "a").step == 4
    before = _losses(tmp_path / "a")
    again = _train(config, tmp_path / "a")  # nothing left to do
    assert (again.reason, again.step) == ("complete", 4)
    assert _losses(tmp_path / "a") == before
    longer = round_trip(config, train__train_steps=6)
    assert _train(longer, tmp_path / "a").step == 6
    assert _train(longer, tmp_path / "b").step == 6
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")


def test_sigterm_saves_and_the_run_resumes(tmp_path):
    config = smallest_base(
        train__train_steps=8,
        train__warmup_steps=1,
        train__lr_decay="cosine",
        checkpoint__save_every_steps=50,
    )

    def signals_at(number):
        def data_from(start):
            for i, batch in enumerate(_data(config)(start), start=start):
                if i == number:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return data_from

    handler = signal.getsignal(signal.SIGTERM)
    outcome = _train(config, tmp_path / "run", signals_at(5))
    assert outcome.reason == "preempted"
    assert 1 <= outcome.step <= 6
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not RunFolder(tmp_path / "run").complete_path.exists()
    assert _train(config, tmp_path / "run").step == 8
    assert _train(config, tmp_path / "whole").step == 8
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")


def test_early_stop_ends_the_run_with_a_checkpoint(tmp_path):
    config = smallest_base(checkpoint__save_every_steps=50)
    folder = RunFolder(tmp_path)

    def data_from(start):
        for i, batch in enumerate(_data(config)(start), start=start):
            if i == 6:  # read a few steps before it is used
                folder.early_stop_path.write_text("no better\n")
            yield batch

    outcome = _train(config, tmp_path, data_from)
    step = outcome.step
    assert outcome.reason == "early_stop"
    assert 2 <= step <= 7
    assert (folder.checkpoints / str(step) / "manifest.json").exists()
    assert json.loads(folder.complete_path.read_text()) == {"reason": "early_stop", "step": step}
    assert _train(config, tmp_path).step == step


def test_divergence_is_reported_and_never_saved(tmp_path, monkeypatch):
    config = smallest_base(train__warmup_steps=0, checkpoint__save_every_steps=1)
    # More than a config may say.
    monkeypatch.setattr(step_lib, "build_learning_rate", lambda config: lambda step: 1e30)
    ended = r"^3 steps in a row were not finite, the last of them step \d+ \(.*(nan|inf).*diverged"
    with pytest.raises(UserError, match=ended):
        _train(config, tmp_path)
    steps = [int(p.name) for p in RunFolder(tmp_path).checkpoints.iterdir() if p.name.isdecimal()]
    logged = [r["step"] for r in _records(tmp_path)]
    assert steps
    assert max(steps) <= max(logged)


def test_a_folder_of_another_run_is_refused(tmp_path):
    config = smallest_base(train__train_steps=3, train__warmup_steps=1)
    _train(config, tmp_path)
    other = round_trip(config, train__learning_rate=5e-3)
    with pytest.raises(UserError, match="config.train.learning_rate = 0.005: .* with 0.002"):
        _train(other, tmp_path)


def test_ema_warms_up_and_then_has_its_decay():
    ema, params = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    for at, effective in ((0, 0.1), (89, 90 / 99), (10**6, 0.999)):
        new = step_lib.updated_ema(ema, params, jnp.asarray(at), decay=0.999)["w"]
        np.testing.assert_allclose(new, 1 - effective, rtol=1e-4)


@pytest.mark.parametrize("decay", ["none", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rate_warms_up_and_decays(decay, warmup):
    config = smallest_base(train__lr_decay=decay, train__warmup_steps=warmup).train
    rate = step_lib.build_learning_rate(config)
    values = [float(rate(i)) for i in range(config.train_steps + 1)]
    np.testing.assert_allclose(values[warmup], config.learning_rate, rtol=1e-6)
    assert values[:warmup] == sorted(values[:warmup])
    if warmup:
        assert values[0] == 0
    end = config.learning_rate * (1 if decay == "none" else 1 / 20)
    np.testing.assert_allclose(values[-1], end, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    config = smallest_base(
        train__grad_clip_norm=0.5, train__adam_b2=0.0, train__warmup_steps=0
    ).train
    chain = step_lib.build_optimizer(config)
    grads = {"a": jnp.full((4,), 30.0), "b": jnp.full((4,), 40.0)}
    clipped, _ = chain.update(grads, chain.init(grads), grads)
    small, _ = chain.update(jax.tree.map(lambda g: g * 0.5 / 100, grads), chain.init(grads), grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), clipped, small)


def test_grids_and_curves_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _train(
        smallest_sr(train__train_steps=4, train__warmup_steps=1, train__sample_every_steps=2),
        tmp_path,
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {
        "loss",
        "learning_rate",
        "grad_norm",
        "images_per_sec",
        "data_wait_fraction",
        "model_flops_per_sec",
    } <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Images("ema_samples")] == [2, 4]
    logged = [r["loss"] for r in _records(tmp_path)]
    np.testing.assert_allclose([e.value for e in events.Scalars("loss")], logged, rtol=1e-6)


def test_a_run_resumes_with_the_images_it_began_with(tmp_path):
    config = smallest_base(
        train__train_steps=4, train__warmup_steps=1, checkpoint__save_every_steps=2
    )

    def train(config, times):
        split = Split(times=times, contents=f"contents at {times}")
        return loop.train(
            config,
            RunFolder(tmp_path),
            _data(config),
            image_shape=SOURCE.image_shape,
            grid_examples=EXAMPLES,
            mesh=two_devices(),
            data=RunData(splits={"train": split}, path="/photos"),
        )

    assert train(config, "monday").step == 4
    longer = round_trip(config, train__train_steps=6)
    with pytest.raises(UserError, match="were modified since"):
        train(longer, "tuesday")
    assert train(longer, "monday").step == 6


def test_low_res_images_of_the_data_are_what_the_stage_is_shown(tmp_path):
    # Derived and stored alike, the loss is the same; of another image it is another.
    config = smallest_sr(train__train_steps=2, train__warmup_steps=1)
    stage = build_stage(config.stage)
    images = SOURCE.raw.images
    low_res = np.asarray(uint8_from_float(stage.low_res_from(float_from_uint8(images))))

    def run(name, low_res):
        def data_from(start):
            for batch in _data(config)(start):
                if low_res is not None:
                    batch["low_res"] = low_res[batch["image"][:, 0, 0, 0]]
                yield batch

        loop.train(
            config,
            RunFolder(tmp_path / name),
            data_from,
            image_shape=SOURCE.image_shape,
            low_res_shape=None if low_res is None else low_res.shape[1:],
            grid_examples=EXAMPLES,
            mesh=two_devices(),
        )
        # The norm of the gradients, too: a new network does not hear of its input yet.
        return [float.fromhex(x) for pair in _losses(tmp_path / name).values() for x in pair]

    derived = run("derived", None)
    # Two programs: XLA may add in another order, so that a pixel may round the other way.
    stored = run("stored", low_res)
    np.testing.assert_allclose(derived, stored, rtol=1e-4)
    assert not np.allclose(run("other", 255 - low_res), stored, rtol=1e-3)


def test_batches_are_put_on_the_devices_ahead_of_time():
    mesh = mesh_lib.build_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    taken = []

    def batches():
        for i in range(6):
            taken.append(i)
            yield {"image": np.full((8, 2, 2, 1), i, np.uint8)}
        raise UserError("no more")

    ahead = mesh_lib.DeviceBatches(batches(), mesh, depth=3)
    deadline = time.monotonic() + 30
    while len(taken) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert taken == [0, 1, 2]
    for i in range(6):
        batch = next(ahead)
        assert batch["image"].sharding == mesh_lib.batch_sharding(mesh)
        np.testing.assert_array_equal(batch["image"], i)
    with pytest.raises(UserError, match="no more"):
        next(ahead)
    ahead.close()

    endless = mesh_lib.DeviceBatches(itertools.repeat({"x": np.zeros(8)}), mesh)
    next(endless)
    endless.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("device batches")]
