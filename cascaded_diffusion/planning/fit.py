"""Whether a training step fits on the devices, and which division of the state makes it fit."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any

import jax

from cascaded_diffusion.config.run_checks import check_devices
from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.planning.step_memory import (
    StepMemory,
    fits,
    rough_step_memory,
    step_memory,
)
from cascaded_diffusion.runtime.accelerators import accelerator_of

_MAX_FSDP = 64
# No compiler has needed less than this share of the estimated activations.
_LEAST = 0.5


def device_bytes() -> float:
    """The memory of one device of this process. CPU devices share that of the machine."""
    device = jax.local_devices()[0]
    stats, accelerator = device.memory_stats() or {}, accelerator_of(device.device_kind)
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    if accelerator is not None:
        return accelerator.memory_bytes
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / jax.local_device_count()


def choose_fsdp(
    config: RunConfig, num_devices: int, memory_bytes: float
) -> tuple[RunConfig, str | None]:
    """Where `mesh.fsdp` is None, chooses the smallest one whose estimate fits.

    `num_devices` are those of all processes, with `memory_bytes` each.

    Returns:
      The config, and a line about the choice where there was something to choose.
    """
    mesh, rest = config.mesh, num_devices // config.mesh.tensor_size
    if mesh.fsdp is not None:
        return config, None

    def with_fsdp(fsdp: int) -> RunConfig:
        return dataclasses.replace(config, mesh=dataclasses.replace(mesh, fsdp=fsdp))

    sizes = [d for d in range(1, min(rest, _MAX_FSDP) + 1) if rest % d == 0]
    if mesh.data > 0:
        sizes = [d for d in sizes if mesh.data * d == rest]
    try:
        for fsdp in sizes:
            check_devices(with_fsdp(fsdp), num_devices)
    except UserError:
        sizes = []
    if not sizes or num_devices == 1:
        return with_fsdp(1), None  # `check_devices` then says what is wrong, if anything is
    if sizes[0] == 1 and _fits_by_far(rough_step_memory(config, num_devices), memory_bytes):
        return with_fsdp(1), "config.mesh.fsdp = 1: the state and a step fit on each device by far"
    totals = {}
    for fsdp in sizes:
        totals[fsdp] = step_memory(with_fsdp(fsdp), num_devices).total
        if fits(totals[fsdp], memory_bytes):
            return with_fsdp(fsdp), (
                f"config.mesh.fsdp = {fsdp}: the smallest division whose estimated"
                f" {totals[fsdp] / 1e9:.3g} GB per device fits in {memory_bytes / 1e9:.3g} GB"
            )
    fsdp = min(totals, key=totals.__getitem__)
    return with_fsdp(fsdp), (
        f"config.mesh.fsdp = {fsdp}: no division fits by estimate; with this one a device needs"
        f" {totals[fsdp] / 1e9:.3g} of {memory_bytes / 1e9:.3g} GB"
    )


def _fits_by_far(memory: StepMemory, memory_bytes: float) -> bool:
    return 2 * memory.state + 4 * memory.activations <= memory_bytes / 2


def check_memory(config: RunConfig, num_devices: int, memory_bytes: float) -> str | None:
    """Checks that a training step can fit, before anything is compiled.

    Returns a line of warning if the step may not fit; how much the compiler needs varies. Raises
    UserError if it cannot fit. The config's mesh must fit the devices.
    """
    rough = rough_step_memory(config, num_devices)
    if _fits_by_far(rough, memory_bytes):
        return None
    least = rough.activations if config.train.remat is None else 0.0
    if rough.state / 2 + _LEAST / 2 * least > memory_bytes:
        raise UserError(_too_large(config, rough, memory_bytes))
    memory = step_memory(config, num_devices)
    if fits(memory.total, memory_bytes):
        return None
    line = _too_large(config, memory, memory_bytes)
    if found := advice(config, num_devices, memory_bytes):
        line += f"; by estimate it fits with {found}"
    if memory.state + _LEAST * memory.activations > memory_bytes:
        raise UserError(line)
    return f"it may not fit: {line}"


def _too_large(config: RunConfig, memory: StepMemory, memory_bytes: float) -> str:
    train = config.train
    return (
        f"config.train.batch_size = {train.batch_size}, config.train.accumulation_steps ="
        f" {train.accumulation_steps}, config.train.remat = {train.remat!r}, config.mesh.fsdp ="
        f" {config.mesh.fsdp_size}: by estimate a device needs {memory.state / 1e9:.3g} GB for the"
        f" state and {memory.activations / 1e9:.3g} GB for a step, and has"
        f" {memory_bytes / 1e9:.3g} GB; expected a smaller batch, more parts, remat ="
        " 'everything', a larger fsdp or more devices"
    )


def advice(
    config: RunConfig, num_devices: int, memory_bytes: float, used: float | None = None
) -> str | None:
    """Names the keys to change for a step to fit, or returns None if no change that is tried helps.

    `used` is what a device needs by the compiler, if it was asked; estimates are scaled to it.
    """
    scale = 1.0 if used is None else used / step_memory(config, num_devices).total
    for changes, changed in _changes(config):
        try:
            check_devices(changed, num_devices)
        except UserError:
            continue
        if fits(scale * step_memory(changed, num_devices).total, memory_bytes):
            return ", ".join(f"--config.{key}={value}" for key, value in changes.items())
    return None


def _changes(config: RunConfig) -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """Yields changes that need less memory, those that cost the least time first."""
    train, mesh = config.train, config.mesh
    fsdps = [mesh.fsdp_size * 2**i for i in range(7) if mesh.fsdp_size * 2**i <= _MAX_FSDP]
    remats = [None] if train.remat == "everything" else [None, "everything"]
    for parts, remat, fsdp in itertools.product((1, 2, 4, 8, 16), remats, fsdps):
        changes: dict[str, Any] = {}
        changed = train
        if fsdp != mesh.fsdp_size:
            changes["mesh.fsdp"] = fsdp
        if remat is not None:
            changes["train.remat"] = remat
            changed = dataclasses.replace(changed, remat=remat, remat_resolutions=None)
        if parts > 1:
            changes["train.accumulation_steps"] = parts * (train.accumulation_steps or 1)
            changed = dataclasses.replace(
                changed, accumulation_steps=changes["train.accumulation_steps"]
            )
        if changes:
            changed_mesh = dataclasses.replace(mesh, fsdp=fsdp)
            yield changes, dataclasses.replace(config, train=changed, mesh=changed_mesh)
