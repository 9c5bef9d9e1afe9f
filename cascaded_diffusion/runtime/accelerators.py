"""What accelerators can do, as their makers state it: the yardstick of MFU and of `plan`.

Peak FLOP/s are those of dense bfloat16 matrix products (a multiply-add counts as two) per JAX
device, which is a chip for TPUs from v4 on. Sources: Google Cloud's pages on TPU v4, v5e, v5p
and v6e; NVIDIA's data sheets (SXM, without sparsity).
"""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One kind of device."""

    name: str
    peak_flops: float  # bfloat16, per second
    memory_bytes: float
    memory_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second, one way, over all links of a device together
    kinds: tuple[str, ...]  # prefixes of JAX's `device_kind`, in lower case


ACCELERATORS = {
    a.name: a
    for a in (
        Accelerator("v4", 275e12, 32 * _GIB, 1228e9, 300e9, ("tpu v4",)),
        Accelerator("v5e", 197e12, 16 * _GIB, 819e9, 200e9, ("tpu v5 lite", "tpu v5e")),
        Accelerator("v5p", 459e12, 95 * _GIB, 2765e9, 600e9, ("tpu v5p", "tpu v5")),
        Accelerator("v6e", 918e12, 32 * _GIB, 1640e9, 400e9, ("tpu v6 lite", "tpu v6e")),
        Accelerator("a100", 312e12, 80e9, 2039e9, 300e9, ("nvidia a100-sxm4-80gb",)),
        Accelerator("h100", 989.4e12, 80e9, 3350e9, 450e9, ("nvidia h100 80gb hbm3",)),
        Accelerator("h200", 989.4e12, 141e9, 4800e9, 450e9, ("nvidia h200",)),
    )
}


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The accelerator that JAX calls `device_kind`; None if it is not in the table."""
    kind = device_kind.lower()
    return next((a for a in ACCELERATORS.values() if kind.startswith(a.kinds)), None)
