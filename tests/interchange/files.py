"""Files as other programs write them, made without those programs."""

import pickle
import struct
import zipfile

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def _text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _int(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def _ints(values):
    return b"(" + b"".join(map(_int, values)) + b"t"


def write_pt(path, tensors):
    """A state dict as `torch.save` writes it: a zip, with a storage for each tensor."""
    state = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for key, (name, x) in enumerate(tensors.items()):
        strides = np.cumprod([1, *x.shape[:0:-1]])[::-1] if x.ndim else ()
        state += [
            _text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _text("storage") + f"ctorch\n{_STORAGES[str(x.dtype)]}\n".encode(),
            _text(str(key)) + _text("cpu") + _int(x.size) + b"tQ" + _int(0),
            _ints(x.shape) + _ints(map(int, strides)),
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"".join([*state, b"u."]))
        for key, x in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(x).tobytes())
