"""What `--labels` lists, where numbers and names can be confused and files are damaged."""

import numpy as np
import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples import sample_request

NAMES = ("1", "10", "2")


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setattr(sample_request, "trained_classes", lambda folder: NAMES)


def _read(text, num_classes=3):
    return sample_request.read_labels(str(text), None, num_classes)[0].tolist()


def test_a_number_that_is_the_name_of_another_class_is_refused(named, tmp_path):
    assert _read("0") == [0]
    for text in ("1", "0,1", "10"):
        with pytest.raises(UserError, match="may mean the class called .* or class number"):
            _read(text)
    np.save(tmp_path / "labels.npy", np.asarray([1, 2]))
    assert _read(tmp_path / "labels.npy") == [1, 2]


def test_a_number_that_names_its_own_class_is_taken(monkeypatch):
    monkeypatch.setattr(sample_request, "trained_classes", lambda folder: ("0", "1", "2"))
    assert _read("2,0") == [2, 0]


@pytest.mark.parametrize("shape", ["(True,)", "(" * 9000 + "1" + ")" * 9000, "(1,", "('a',)"])
def test_damaged_arrays_are_refused_in_one_line(named, tmp_path, shape):
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path = tmp_path / "labels.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + bytes(4))
    with pytest.raises(UserError, match="cannot be read, expected an array of labels"):
        _read(path)
