import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime import checkpoint, manifest
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime import sharding as sharding_lib
from cascaded_diffusion.runtime.manifest import deletable, pinned
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.tiny import tiny_base

CONFIG = tiny_base(checkpoint__max_to_keep=3).checkpoint


def _state(step, sharding=None):
    state = {
        "step": jnp.asarray(step, jnp.int32),
        "ema_params": {
            f"decay_0_{d}": {"w": jnp.arange(4096.0).reshape(8, 512) + step + int(d)}
            for d in ("99", "999")
        },
        "key": jax.random.key(step),
    }
    return state if sharding is None else jax.device_put(state, sharding)


def _abstract(sharding):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), _state(0)
    )


def _restore_latest(writer, abstract, **kwargs):
    step = writer.newest_step(**kwargs)
    return None if step is None else writer.restore(step, abstract)


EMA = "decay_0_99"
REPLICATED = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _save(folder, steps):
    writer = checkpoint.CheckpointWriter(folder, CONFIG)
    for step in steps:
        writer.save(step, _state(step))
    writer.wait(steps[-1])
    return writer


def _restore(folder):
    said = []
    writer = checkpoint.CheckpointWriter(folder, CONFIG, say=said.append)
    try:
        return _restore_latest(writer, _abstract(REPLICATED)), said
    finally:
        writer.close()


@pytest.fixture
def saved(tmp_path):
    folder = RunFolder(tmp_path / "run")
    _save(folder, [1, 2, 3]).close()
    return folder


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def _data_file(step_folder):
    return max((p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    "flipped bit": lambda d: _flip_a_bit(_data_file(d)),
    "cut in half": lambda d: os.truncate(_data_file(d), _data_file(d).stat().st_size // 2),
    "emptied": lambda d: os.truncate(_data_file(d), 0),
    "removed": lambda d: _data_file(d).unlink(),
    "item removed": lambda d: shutil.rmtree(d / "state"),
    "added": lambda d: (d / "state" / "stray").write_text("x"),
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "broken manifest": lambda d: (d / "manifest.json").write_text("{"),
    "empty folder": lambda d: (shutil.rmtree(d), d.mkdir()),
    "older file": lambda d: shutil.copy(_data_file(d.parent / "2"), _data_file(d)),
}


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert _restore(RunFolder(tmp_path)) == (None, [])


def test_the_newest_is_restored_to_the_bit_with_its_key(saved):
    restored, said = _restore(saved)
    assert said == []
    expected = _state(3)
    np.testing.assert_array_equal(
        restored["ema_params"][EMA]["w"], expected["ema_params"][EMA]["w"]
    )
    assert restored["step"] == 3
    assert jax.random.key_data(restored["key"]).tolist() == [0, 3]
    np.testing.assert_array_equal(
        jax.random.normal(restored["key"], (3,)), jax.random.normal(expected["key"], (3,))
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_named_and_passed_over(saved, damage):
    DAMAGE[damage](saved.checkpoints / "3")
    restored, said = _restore(saved)
    assert restored["step"] == 2
    np.testing.assert_array_equal(
        restored["ema_params"][EMA]["w"], _state(2)["ema_params"][EMA]["w"]
    )
    (line,) = said
    assert line.startswith("checkpoint 3 is damaged (")
    # Out of the way: step 3 can be saved again.
    assert not (saved.checkpoints / "3").exists()
    _save(saved, [3]).close()
    assert _restore(saved)[0]["step"] == 3


def test_every_single_file_is_covered(saved):
    original = saved.path / "original"
    shutil.copytree(saved.checkpoints / "3", original)
    files = [p.relative_to(original) for p in original.rglob("*") if p.is_file()]
    assert len(files) > 5
    for name in files:
        shutil.rmtree(saved.checkpoints / "3")
        shutil.copytree(original, saved.checkpoints / "3")
        assert manifest.damage(saved.checkpoints / "3") is None
        target = saved.checkpoints / "3" / name
        if target.stat().st_size:
            _flip_a_bit(target)
            assert manifest.damage(saved.checkpoints / "3") is not None, name
        target.unlink()
        assert manifest.damage(saved.checkpoints / "3") is not None, name


def test_a_stray_folder_is_not_the_latest(saved):
    (saved.checkpoints / "99").mkdir()
    restored, said = _restore(saved)
    assert restored["step"] == 3
    assert "checkpoint 99 is damaged" in said[0]


def test_without_an_intact_checkpoint_the_run_does_not_begin_again(saved):
    for step in (1, 2, 3):
        DAMAGE["flipped bit"](saved.checkpoints / str(step))
    for _ in range(2):  # also when asked again
        with pytest.raises(UserError, match=r"none of the checkpoints \[1, 2, 3\] is intact"):
            _restore(saved)
        assert manifest.finished_steps(saved) == [1, 2, 3]


def test_a_first_save_that_was_cut_off_is_no_damage(tmp_path):
    folder = RunFolder(tmp_path)
    _save(folder, [1]).close()
    (folder.checkpoints / "1" / "manifest.json").unlink()
    folder.saved_path.unlink()  # written after the manifest
    restored, said = _restore(folder)
    assert restored is None
    assert "checkpoint 1 is damaged (manifest.json is missing" in said[0]
    _save(folder, [1]).close()
    assert _restore(folder)[0]["step"] == 1


def test_the_latest_and_the_best_are_kept(tmp_path):
    folder = RunFolder(tmp_path)
    folder.eval.mkdir()
    folder.best_path.write_text(json.dumps({"step": 2, "ema_decay": 0.99}))
    writer = _save(folder, [1, 2, 3, 4, 5, 6])
    writer.close()
    assert writer.steps() == [2, 4, 5, 6]
    assert manifest.finished_steps(folder) == [2, 4, 5, 6]


def test_readers_see_only_finished_checkpoints(saved):
    abstract = _abstract(REPLICATED)["ema_params"]["decay_0_99"]
    (saved.checkpoints / "3" / "manifest.json").unlink()
    assert manifest.finished_steps(saved) == [1, 2]
    with pytest.raises(UserError, match="not an intact checkpoint"):
        checkpoint.load_ema_params(saved, 3, 0.99, abstract)
    with pytest.raises(UserError, match="it is not there"):
        checkpoint.load_ema_params(saved, 7, 0.99, abstract)
    for decay, name in ((0.99, "decay_0_99"), (0.999, "decay_0_999")):
        params = checkpoint.load_ema_params(saved, 2, decay, abstract)
        np.testing.assert_array_equal(params["w"], _state(2)["ema_params"][name]["w"])
    with pytest.raises(UserError, match="cannot be restored"):
        checkpoint.load_ema_params(saved, 2, 0.5, abstract)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.EMFILE, "Too many open files"), OSError),
        (ValueError("INTERNAL: reading failed [os_error_code='24']"), OSError),
        (ValueError("NOT_FOUND: reading failed [os_error_code='2']"), UserError),
        (ValueError("DATA_LOSS: truncated"), UserError),
        (MemoryError("no memory"), MemoryError),
    ],
)
def test_a_checkpoint_is_not_to_blame_for_the_system(saved, monkeypatch, error, raised):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", fail)
    abstract = _abstract(REPLICATED)["ema_params"]["decay_0_99"]
    with pytest.raises(raised, match="cannot be restored|no memory") as found:
        checkpoint.load_ema_params(saved, 2, 0.99, abstract)
    assert type(found.value) is raised


def test_a_save_that_fails_is_reported(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    writer = checkpoint.CheckpointWriter(folder, CONFIG)

    def no_space(path, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_manifest", no_space)
    writer.save(1, _state(1))
    with pytest.raises(UserError, match="saving a checkpoint failed .* No space left"):
        writer.wait(1)
    writer.close()


def test_restores_onto_another_mesh(tmp_path):
    folder = RunFolder(tmp_path)
    mesh = mesh_lib.build_mesh(MeshConfig(data=2, fsdp=4, tensor=1))
    split = sharding_lib.state_shardings(_abstract(None), mesh)
    writer = checkpoint.CheckpointWriter(folder, CONFIG)
    writer.save(1, jax.device_put(_state(1), split))
    writer.wait(1)
    for other in ((8, 1), (1, 8)):
        target = mesh_lib.build_mesh(MeshConfig(data=other[0], fsdp=other[1], tensor=1))
        shardings = sharding_lib.state_shardings(_abstract(None), target)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            _abstract(None),
            shardings,
        )
        restored = _restore_latest(writer, abstract)
        np.testing.assert_array_equal(
            restored["ema_params"][EMA]["w"], _state(1)["ema_params"][EMA]["w"]
        )
        assert restored["ema_params"][EMA]["w"].sharding == shardings["ema_params"][EMA]["w"]
    writer.close()


def test_the_old_checkpoint_is_deleted_after_the_new_one_has_its_manifest(tmp_path, monkeypatch):
    config = tiny_base(checkpoint__max_to_keep=1).checkpoint
    folder = RunFolder(tmp_path)
    whole = []
    original = manifest.write_manifest

    def watched(path, step):
        whole.append((manifest.finished_steps(folder), "before"))
        original(path, step)
        whole.append((manifest.finished_steps(folder), "after"))

    monkeypatch.setattr(manifest, "write_manifest", watched)
    writer = checkpoint.CheckpointWriter(folder, config)
    for step in (1, 2, 3):
        writer.save(step, _state(step))
        writer.wait(step)
        assert manifest.finished_steps(folder) == [step]
    writer.close()
    assert whole == [
        ([], "before"), ([1], "after"), ([1], "before"), ([1, 2], "after"), ([2], "before"),
        ([2, 3], "after"),
    ]  # fmt: skip


def test_what_was_written_is_opened_before_it_counts(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    writer = _save(folder, [1])
    original = writer._manager.wait_until_finished

    def merge_fails():
        original()
        (folder.checkpoints / "2" / "state" / "manifest.ocdbt").unlink(missing_ok=True)

    monkeypatch.setattr(writer._manager, "wait_until_finished", merge_fails)
    writer.save(2, _state(2))
    with pytest.raises(UserError, match="saving a checkpoint failed .* cannot be opened"):
        writer.wait(2)
    writer.close()
    assert manifest.finished_steps(folder) == [1]
    assert _restore(folder)[0]["step"] == 1


def test_what_was_written_is_compared_with_what_was_saved(saved):
    arrays = checkpoint._described(checkpoint._storable(_state(3)))
    checkpoint._check_opens(saved.checkpoints / "3", arrays)
    name = f"ema_params.{EMA}.w"
    for other in ({**arrays, name: ((8, 511), "float32")}, {**arrays, "lost": ((), "int32")}):
        with pytest.raises(OSError, match="not what was saved"):
            checkpoint._check_opens(saved.checkpoints / "3", other)


def test_a_copy_under_another_step_is_damage(saved):
    shutil.copytree(saved.checkpoints / "3", saved.checkpoints / "999")
    restored, said = _restore(saved)
    assert restored["step"] == 3
    assert said == [
        "checkpoint 999 is damaged (it is a copy of checkpoint 3); falling back to the one before"
    ]
    _save(saved, [4]).close()
    assert manifest.finished_steps(saved) == [2, 3, 4]
    shutil.rmtree(saved.checkpoints / "4")
    shutil.copytree(saved.checkpoints / "2", saved.checkpoints / "4")
    restored, said = _restore(saved)
    assert restored["step"] == 3
    assert "checkpoint 4 is damaged (it is a copy of checkpoint 2)" in said[0]


@pytest.mark.parametrize("name", ["0070", "\u0667\u0660"])
def test_folders_that_no_step_is_named_like_are_set_aside(saved, name):
    shutil.copytree(saved.checkpoints / "3", saved.checkpoints / name)
    assert manifest.finished_steps(saved) == [1, 2, 3]
    restored, said = _restore(saved)
    assert restored["step"] == 3
    assert f"{name}: not named as a checkpoint is" in said[0]
    assert (saved.path / "checkpoints_damaged" / name).is_dir()
    _save(saved, [60]).close()
    assert manifest.finished_steps(saved)[-1] == 60


def test_lost_checkpoints_are_not_silently_begun_again(saved):
    shutil.rmtree(saved.checkpoints)
    with pytest.raises(UserError, match="saved.json says that one was.*--start_over"):
        _restore(saved)
    writer = checkpoint.CheckpointWriter(saved, CONFIG, say=lambda line: None)
    assert _restore_latest(writer, _abstract(REPLICATED), start_over=True) is None
    writer.close()
    assert (saved.path / "lost_run_1" / "saved.json").exists()
    assert _restore(saved) == (None, [])


def test_an_intact_checkpoint_is_gone_on_from_though_starting_over_is_allowed(saved):
    writer = checkpoint.CheckpointWriter(saved, CONFIG)
    assert _restore_latest(writer, _abstract(REPLICATED), start_over=True)["step"] == 3
    writer.close()


def test_damaged_json_beside_checkpoints_does_not_stop_a_save(saved):
    saved.eval.mkdir(exist_ok=True)
    saved.best_path.write_text("{")
    _save(saved, [4]).close()
    assert manifest.finished_steps(saved) == [2, 3, 4]
    assert (saved.eval / "best.json.damaged").exists()


def test_the_mark_of_a_killed_reader_is_forgotten(saved):
    code = (
        "import sys, os, signal\n"
        "from cascaded_diffusion.runtime.manifest import pinned\n"
        "from cascaded_diffusion.runtime.run_folder import RunFolder\n"
        "with pinned(RunFolder(sys.argv[1]), 1) as is_there:\n"
        "  assert is_there\n"
        "  os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(saved.path)], timeout=60)
    assert result.returncode == -9
    with pinned(saved, 2) as is_there, deletable(saved, [1, 2, 3]) as steps:
        assert is_there
        assert steps == {1, 3}
    with pinned(saved, 77) as is_there:
        assert not is_there
    _save(saved, [4, 5]).close()
    assert manifest.finished_steps(saved) == [3, 4, 5]


def test_nfs_locks_only_what_is_open_for_writing(saved, monkeypatch):
    flock = fcntl.flock

    def flock_of_nfs(file, operation):
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    with pinned(saved, 2), deletable(saved, [1, 2, 3]) as steps:
        assert steps == {1, 3}


def test_a_folder_that_was_moved_away_is_not_made_again(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.writer_lock("train"):
        writer = _save(folder, [1])
        os.rename(tmp_path / "run", tmp_path / "elsewhere")
        with pytest.raises(UserError, match="the folder was moved or removed"):
            writer.save(2, _state(2))
        writer.close()
    assert not (tmp_path / "run").exists()


def test_a_copy_beside_a_live_trainer_costs_no_checkpoint(tmp_path):
    folder = RunFolder(tmp_path / "run")
    writer = checkpoint.CheckpointWriter(folder, tiny_base(checkpoint__max_to_keep=1).checkpoint)
    writer.save(1, _state(1))
    writer.wait(1)
    shutil.copytree(folder.checkpoints / "1", folder.checkpoints / "999")
    assert manifest.finished_steps(folder) == [1]
    # Orbax knows only its own steps until it is asked to look again.
    writer.save(2, _state(2))
    writer.wait(2)
    writer.close()
    assert manifest.finished_steps(folder) == [2]
    assert manifest.damage(folder.checkpoints / "2") is None
    state, said = _restore(folder)
    assert int(state["step"]) == 2
    assert "999 is damaged (it is a copy of checkpoint 1)" in said[0]


def test_a_folder_moved_during_a_save_can_be_brought_back(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    with folder.writer_lock("train"):
        writer = checkpoint.CheckpointWriter(folder, CONFIG)
        writer.save(1, _state(1))
        writer.wait(1)
        finish = writer._manager.wait_until_finished

        def moved_meanwhile():
            finish()
            # Orbax itself waits, too, before it saves.
            if not threading.current_thread().name.startswith("manifest"):
                return
            folder.path.rename(tmp_path / "moved")
            # Orbax, later by a moment, would have made its own folder again.
            shutil.copytree(tmp_path / "moved/checkpoints/2", folder.checkpoints / "2")

        monkeypatch.setattr(writer._manager, "wait_until_finished", moved_meanwhile)
        writer.save(2, _state(2))
        with pytest.raises(UserError, match="was moved or removed while this process was writing"):
            writer.wait(2)
        writer.close()
    assert not folder.path.exists()
    (tmp_path / "moved").rename(folder.path)
    assert int(_restore(folder)[0]["step"]) == 1


def test_a_reader_that_lets_go_disturbs_no_deletion(saved, monkeypatch):
    pins = saved.eval / "reading"
    pins.mkdir(parents=True)
    (pins / f"1.1.{'0' * 32}").touch()
    (pins / "notes.txt").write_text("mine")
    (pins / "folder").mkdir()
    opened = type(pins).open

    def gone_before_it_is_opened(self, *args, **kwargs):
        if self.parent == pins:
            self.unlink()
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(type(pins), "open", gone_before_it_is_opened)
    with deletable(saved, [1, 2]) as steps:
        assert steps == {1, 2}
    assert {p.name for p in pins.iterdir()} == {"notes.txt", "folder"}


def test_a_checkpoint_chosen_while_pins_are_awaited_is_kept(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    writer = checkpoint.CheckpointWriter(folder, tiny_base(checkpoint__max_to_keep=1).checkpoint)
    writer.save(1, _state(1))
    writer.wait(1)
    awaited = manifest.deletable

    def chosen_meanwhile(folder, steps):
        assert steps == {1}
        folder.eval.mkdir(exist_ok=True)
        folder.best_path.write_text(json.dumps({"step": 1, "ema_decay": 0.99}))
        return awaited(folder, steps)

    monkeypatch.setattr(manifest, "deletable", chosen_meanwhile)
    writer.save(2, _state(2))
    writer.wait(2)
    writer.close()
    assert manifest.finished_steps(folder) == [1, 2]


def test_a_full_disk_is_named_without_stack_traces(tmp_path):
    code = (
        "import sys, resource\n"
        "from cascaded_diffusion.commands import entry\n"
        "from tests.runtime.test_checkpoint import CONFIG, RunFolder, _state, checkpoint\n"
        "def main(argv):\n"
        "    writer = checkpoint.CheckpointWriter(RunFolder(argv[1]), CONFIG)\n"
        "    try:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "        writer.save(1, _state(1))\n"
        "        writer.wait(1)\n"
        "    finally:\n"
        "        writer.close()\n"
        "entry.run(main)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "saving a checkpoint failed at or before step 1 (File too large)" in line
