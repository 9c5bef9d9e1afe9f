"""RUN/environment.json: what a run was last trained with, besides its config.

A run is the same to the bit only with the same versions, kind of device and mesh; with others it
agrees up to rounding. So what has changed is said.
"""

import platform
from importlib.metadata import PackageNotFoundError, version

import jax
from jax.sharding import Mesh

from cascaded_diffusion.config.convert import flattened
from cascaded_diffusion.files.json_files import Record, readable_record, write_json
from cascaded_diffusion.runtime.run_folder import RunFolder

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment_of(mesh: Mesh) -> Record:
    """Versions, devices and mesh of this process."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # it lies on the path without having been installed
            versions[name] = "not installed"
    return {
        "versions": versions,
        "device_kind": mesh.devices.flat[0].device_kind,
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
    }


def store_environment(folder: RunFolder, mesh: Mesh) -> list[str]:
    """Writes the record, and returns a line for each value that is not that of the last time."""
    record = environment_of(mesh)
    now = flattened(record)
    before = flattened(readable_record(folder.environment_path) or {})
    write_json(folder.environment_path, record)
    changed = [key for key in now if before and before.get(key) != now[key]]
    return [f"{key}: {before.get(key)} -> {now[key]}" for key in changed]
