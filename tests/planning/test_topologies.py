"""Slices by name: those that exist, and those that do not."""

import math

import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.planning.topologies import parse_topology, set_up_tpu_compiler
from cascaded_diffusion.runtime.accelerators import ACCELERATORS


@pytest.mark.parametrize(
    ("text", "kind", "devices", "is_tpu"),
    [
        ("v5e:16x16", "v5e", 256, True),
        ("v5e:1x1", "v5e", 1, True),
        ("v6e:4x8", "v6e", 32, True),
        ("v4:2x2x4", "v4", 16, True),
        ("v5p:4x4x8", "v5p", 128, True),
        ("v5p:28x1x1", "v5p", 28, True),
        ("h100:8", "h100", 8, False),
        ("a100:1024", "a100", 1024, False),
        ("h200:1", "h200", 1, False),
    ],
)
def test_a_slice_is_its_kind_and_the_product_of_its_sizes(text, kind, devices, is_tpu):
    topology = parse_topology(text)
    assert topology.name == text
    assert topology.accelerator is ACCELERATORS[kind]
    assert topology.num_devices == devices == math.prod(map(int, text.split(":")[1].split("x")))
    assert topology.is_tpu == is_tpu


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--topology=: unknown accelerator ''; expected KIND:SHAPE, as v5e:16x16"),
        ("v9:2x2", "unknown accelerator 'v9'; .* of the kinds v4, v5e, v5p, v6e, a100, h100, h200"),
        ("V5E:2x2", "unknown accelerator 'V5E'"),
        ("16x16", "unknown accelerator '16x16'"),
        ("v5e", "--topology=v5e: '' is not a shape"),
        ("v5e:", "'' is not a shape"),
        ("v5e:0x4", "'0x4' is not a shape"),
        ("v5e:4x", "'4x' is not a shape"),
        ("v5e:-4x4", "'-4x4' is not a shape"),
        ("v5e:4*4", "'4[*]4' is not a shape"),
        ("v5e:4x4:2", "'4x4:2' is not a shape"),
        ("h100:0", "'0' is not a shape"),
        ("v5e:4", r"v5e comes in shapes of 2 number\(s\), of at most 16 each"),
        ("v5e:4x4x4", r"v5e comes in shapes of 2 number\(s\), of at most 16 each"),
        ("v5p:4x4", r"v5p comes in shapes of 3 number\(s\), of at most 28 each"),
        ("v4:1x1x17", "of at most 16 each"),
        ("v5e:16x17", "of at most 16 each"),
        ("h100:8x8", r"h100 comes in shapes of 1 number\(s\), of at most 16384 each; expected"),
        ("h100:16385", "of at most 16384 each"),
        ("v5e:" + "9" * 5000 + "x2", "is not a shape"),
        ("v5e:٤x4", "'٤x4' is not a shape"),
    ],
)
def test_what_is_no_slice_is_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_topology(text)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "cloud_type"), [("v5e:4x4", "v5e-16"), ("v5p:2x2x4", "v5p-32"), ("v4:2x2x1", "v4-8")]
)
def test_the_compiler_is_told_the_slices_type(text, cloud_type, monkeypatch):
    environ = {"OTHER": "1"}
    monkeypatch.setattr("os.environ", environ)
    set_up_tpu_compiler(parse_topology(text))
    # Types count cores, of which some chips have two.
    assert environ["TPU_ACCELERATOR_TYPE"] == cloud_type
    assert environ["JAX_PLATFORMS"] == "cpu"
    assert environ["OTHER"] == "1"
