"""What JAX calls a device, and which entry of the table that is."""

import pytest

from cascaded_diffusion.runtime.accelerators import ACCELERATORS, accelerator_of


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v6e", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_device_kinds_are_found(device_kind, name):
    found = accelerator_of(device_kind)
    assert found is ACCELERATORS[name]
    assert found.name == name


@pytest.mark.parametrize("device_kind", ["cpu", "", "TPU v2", "TPU v3", "NVIDIA L4", "Tesla V100"])
def test_others_are_not_guessed(device_kind):
    assert accelerator_of(device_kind) is None


def test_the_table_is_in_base_units():
    for name, accelerator in ACCELERATORS.items():
        assert accelerator.name == name
        assert 1e14 < accelerator.peak_flops < 1e16, name
        assert 1e10 < accelerator.memory_bytes < 1e12, name
        assert 1e11 < accelerator.memory_bandwidth < 1e13, name
        # Devices are farther from each other than from their memory.
        assert 1e11 < accelerator.link_bandwidth < accelerator.memory_bandwidth, name
