import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.config import MeshConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime import checkpoint
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime import sharding as sharding_lib
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
        return writer.restore_latest(_abstract(REPLICATED)), said
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
        assert checkpoint.damage(saved.checkpoints / "3") is None
        target = saved.checkpoints / "3" / name
        if target.stat().st_size:
            _flip_a_bit(target)
            assert checkpoint.damage(saved.checkpoints / "3") is not None, name
        target.unlink()
        assert checkpoint.damage(saved.checkpoints / "3") is not None, name


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
        assert checkpoint.finished_steps(saved) == [1, 2, 3]


def test_a_first_save_that_was_cut_off_is_no_damage(tmp_path):
    folder = RunFolder(tmp_path)
    _save(folder, [1]).close()
    (folder.checkpoints / "1" / "manifest.json").unlink()
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
    assert checkpoint.finished_steps(folder) == [2, 4, 5, 6]


def test_readers_see_only_finished_checkpoints(saved):
    abstract = _abstract(REPLICATED)["ema_params"]["decay_0_99"]
    (saved.checkpoints / "3" / "manifest.json").unlink()
    assert checkpoint.finished_steps(saved) == [1, 2]
    with pytest.raises(UserError, match="not an intact checkpoint"):
        checkpoint.load_ema_params(saved, 3, 0.99, abstract)
    with pytest.raises(UserError, match="it is not there"):
        checkpoint.load_ema_params(saved, 7, 0.99, abstract)
    for decay, name in ((0.99, "decay_0_99"), (0.999, "decay_0_999")):
        params = checkpoint.load_ema_params(saved, 2, decay, abstract)
        np.testing.assert_array_equal(params["w"], _state(2)["ema_params"][name]["w"])
    with pytest.raises(UserError, match="cannot be restored"):
        checkpoint.load_ema_params(saved, 2, 0.5, abstract)


def test_a_save_that_fails_is_reported(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    writer = checkpoint.CheckpointWriter(folder, CONFIG)

    def no_space(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", no_space)
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
        restored = writer.restore_latest(abstract)
        np.testing.assert_array_equal(
            restored["ema_params"][EMA]["w"], _state(1)["ema_params"][EMA]["w"]
        )
        assert restored["ema_params"][EMA]["w"].sharding == shardings["ema_params"][EMA]["w"]
    writer.close()
