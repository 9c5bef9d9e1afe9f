"""The device mesh, the way of batches onto it, and agreement between processes.

The mesh has the axes `data`, `fsdp` and `tensor`. A batch is split over the first two;
`sharding` says what else is split, and how.
"""

import contextlib
import hashlib
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.bucket import AnyPath, BucketPath
from cascaded_diffusion.files.whole import write_whole

AXES = ("data", "fsdp", "tensor")
# The axes that a batch is split over.
DATA_AXES = ("data", "fsdp")
# A file may take this long to appear on another host.
_SHARED_SECS = 60.0


def build_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices. Raises UserError if those of a process do not fit the axes."""
    devices = jax.devices() if devices is None else devices
    tensor = config.tensor_size
    data = len(devices) // (config.fsdp_size * tensor) if config.data == -1 else config.data
    shape = (data, config.fsdp_size, tensor)
    try:
        # The order that suits the network; an axis may be part of one of the slice's axes.
        return _checked_mesh(
            mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
        )
    except (NotImplementedError, ValueError):
        # No such order exists, or it gives a process rows that are not neighbours. The plain
        # order works unless a host's devices do not fit the axes.
        plain = sorted(devices, key=lambda d: (d.process_index, d.id))
    try:
        return _checked_mesh(np.asarray(plain).reshape(shape))
    except ValueError as e:
        hosts = len({d.process_index for d in devices})
        raise UserError(
            f"config.mesh.tensor = {tensor}: expected devices of a process that fit the axes;"
            f" {len(devices)} devices of {hosts} processes as data {data} x fsdp"
            f" {config.fsdp_size} x tensor {tensor} do not ({e})"
        ) from e


def _checked_mesh(devices: np.ndarray) -> Mesh:
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    batch_share(mesh)
    return mesh


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process has rows index B / count to (index + 1) B / count of a batch.

    Processes whose devices differ only in their place along `tensor` have the same rows. Raises
    ValueError if the rows of a process are not neighbours.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    owned: dict[int, set[int]] = {}
    places = batch_sharding(mesh).devices_indices_map((shards,))
    for device, (rows,) in places.items():
        owned.setdefault(device.process_index, set()).add(rows.start or 0)
    shares = sorted({tuple(sorted(rows)) for rows in owned.values()})
    width = len(shares[0])
    expected = [tuple(range(i * width, (i + 1) * width)) for i in range(shards // width)]
    if shares != expected:
        raise ValueError("a process's rows of the batch are not neighbours")
    mine = owned.get(jax.process_index())
    # A mesh of other machines' devices, which is only compiled for, has none of this process.
    return (0 if mine is None else shares.index(tuple(sorted(mine)))), len(shares)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def global_batch(local: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins every process's rows (its `batch_share`) to sharded arrays, by name."""
    sharding, (_, count) = batch_sharding(mesh), batch_share(mesh)
    joined = jax.make_array_from_process_local_data
    return {k: joined(sharding, x, (len(x) * count, *x.shape[1:])) for k, x in local.items()}


@contextlib.contextmanager
def fail_on_all_processes() -> Iterator[None]:
    """All processes raise at the end of a block without collectives if one of them fails in it."""
    error: UserError | None = None
    try:
        yield
    except UserError as e:
        error = e
    except OSError as e:
        error = UserError(str(e))
        error.__cause__ = e
    raise_on_all_processes(error)


def broadcast_from_process_0(values: Sequence[int]) -> list[int]:
    """Returns process 0's numbers (int32) in all processes."""
    if jax.process_count() == 1:
        return list(values)
    values = multihost_utils.broadcast_one_to_all(np.asarray(values, np.int32))
    return np.asarray(values).tolist()


def is_as_in_process_0(value: object) -> bool:
    """Whether a value's `repr` is that of process 0's; every process calls it."""
    number = int(hashlib.sha256(repr(value).encode()).hexdigest()[:7], 16)
    return broadcast_from_process_0([number]) == [number]


def check_shared(folder: AnyPath, flag: str) -> None:
    """Raises UserError in all processes unless they all see one folder. Every process calls it."""
    if jax.process_count() == 1:
        return
    (number,) = broadcast_from_process_0([secrets.randbelow(2**31)])
    mark = folder / f".shared-{number}"
    with fail_on_all_processes():
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(mark, b"")
    with fail_on_all_processes():
        deadline = time.monotonic() + _SHARED_SECS
        while not mark.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"--{flag}={folder}: process {jax.process_index()} does not see what process 0"
                    " writes there; expected one folder that all hosts share"
                )
            time.sleep(0.1)
            if not isinstance(folder, BucketPath):
                os.listdir(folder if folder.is_dir() else folder.parent)  # NFS asks its server
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)


def raise_on_all_processes(error: UserError | None) -> None:
    """Raises `error`, or where it is None, that another process has one. Every process calls it."""
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(error is not None)).ravel()
        if error is None and failed.any():
            names = ", ".join(str(i) for i in np.flatnonzero(failed))
            raise UserError(f"process {names} failed, see what it printed")
    if error is not None:
        raise error


class DeviceBatches:
    """A process's batches as global arrays, put on the devices ahead of time by a thread.

    The thread reads and copies the next `depth` batches while a step computes, so the time that
    `next` waits is the time that the devices wait for data.
    """

    def __init__(self, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh, *, depth: int = 3):
        self._batches, self._mesh = batches, mesh
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="device batches")
        self._ahead = deque(self._reader.submit(self._read) for _ in range(depth))

    def _read(self) -> dict[str, jax.Array]:
        return global_batch(next(self._batches), self._mesh)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        batch = self._ahead.popleft().result()
        self._ahead.append(self._reader.submit(self._read))
        return batch

    def close(self) -> None:
        """Ends the thread and closes the batches."""
        self._reader.shutdown(cancel_futures=True)
        if hasattr(self._batches, "close"):
            self._batches.close()


def host_array(x: jax.Array) -> np.ndarray:
    """The whole array, on every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
