"""The device mesh, and the way of batches onto it.

The mesh has the axes `data`, `fsdp` and `tensor`. A batch is split over the first two.
What is split over the others, and how, is for `sharding` to say.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cascaded_diffusion.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
# Those that a batch is split over.
DATA_AXES = ("data", "fsdp")


def build_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices. `config_checks.check_devices` has been called before."""
    devices = jax.devices() if devices is None else devices
    tensor = config.tensor_size
    data = len(devices) // (config.fsdp * tensor) if config.data == -1 else config.data
    return jax.make_mesh(
        (data, config.fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def global_batch(local: Any, mesh: Mesh) -> Any:
    """Joins every process's rows (in order of process) to one sharded array."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


class DeviceBatches:
    """A process's batches as global arrays, put on the devices ahead of time by a thread.

    While a step computes, the next `depth` batches are read and copied: what `next` waits
    is what the devices would wait for data.

    Args:
      batches: of this process. Closed with this, if it can be.
      mesh: the device mesh.
      depth: how many batches ahead.
    """

    def __init__(self, batches: Iterator[Any], mesh: Mesh, *, depth: int = 2):
        self._batches, self._mesh = batches, mesh
        # Each is a batch, or the exception that ended them.
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="device batches", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        while not self._closing.is_set():
            try:
                item: Any = global_batch(next(self._batches), self._mesh)
            except BaseException as e:  # whatever it is, it is for the other thread to raise
                item = e
            while not self._closing.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def __iter__(self) -> DeviceBatches:
        return self

    def __next__(self) -> Any:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread, and with it the batches."""
        self._closing.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)
        if hasattr(self._batches, "close"):
            self._batches.close()


def host_array(x: jax.Array) -> np.ndarray:
    """The whole of an array, on every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
