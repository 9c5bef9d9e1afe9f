"""Files as other programs write them, made without those programs."""

import pickle
import struct
import zipfile

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def integers(values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def write_pt(path, tensors):
    """A state dict as `torch.save` writes it: a zip, with a storage for each tensor."""
    state = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for key, (name, x) in enumerate(tensors.items()):
        strides = np.cumprod([1, *x.shape[:0:-1]])[::-1] if x.ndim else ()
        state += [
            text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            text("storage") + f"ctorch\n{_STORAGES[str(x.dtype)]}\n".encode(),
            text(str(key)) + text("cpu") + integer(x.size) + b"tQ" + integer(0),
            integers(x.shape) + integers(map(int, strides)),
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"".join([*state, b"u."]))
        for key, x in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(x).tobytes())
