"""What a run was trained with is kept, and what changes is said."""

import json

import jax

from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.runtime.environment import store_environment
from cascaded_diffusion.runtime.mesh import build_mesh
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.tiny import two_devices


def test_only_what_changed_is_said(tmp_path):
    folder = RunFolder(tmp_path)
    assert store_environment(folder, two_devices()) == []
    assert store_environment(folder, two_devices()) == []
    one = build_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    assert store_environment(folder, one) == ["mesh.data: 2 -> 1"]
    record = json.loads(folder.environment_path.read_text())
    assert record["versions"]["jax"] == jax.__version__
    assert record["device_kind"] == "cpu"
    record["versions"]["jax"] = "0.1"
    folder.environment_path.write_text(json.dumps(record))
    assert store_environment(folder, one) == [f"versions.jax: 0.1 -> {jax.__version__}"]


def test_a_damaged_record_is_written_anew(tmp_path):
    folder = RunFolder(tmp_path)
    folder.environment_path.write_text("{")
    assert store_environment(folder, two_devices()) == []
    assert json.loads(folder.environment_path.read_text())["processes"] == 1
