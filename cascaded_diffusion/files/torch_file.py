"""Reads the tensors of a PyTorch checkpoint without executing any of it.

A `.pth` file is pickled, and unpickling runs whatever the file says. Here its opcodes are only
disassembled, by `pickletools`, and the few that a state dict is written with are interpreted:
dicts, tuples, numbers, strings, and descriptions of tensors. Every other opcode and every other
name is refused. Both layouts of `torch.save` are known:

    before 1.6   four pickles (magic number, protocol, system, state dict), the pickled
                 list of storage keys, then per storage its count (int64) and its numbers
    since 1.6    a zip with data.pkl, and one file of numbers per storage

The declared sizes are compared with the file's size before anything is allocated: numbers are
stored uncompressed, so neither storages nor tensors can be larger than the file. The file is
mapped into memory, so that a tensor takes memory only when it is used.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import pickletools
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from cascaded_diffusion.files.npz_archive import DAMAGED

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
# Far beyond any network for features. A state dict has some 40 opcodes per tensor.
_MAX_BYTES = 1 << 30
_MAX_OPCODES = 200_000
_MAX_DIMENSIONS = 8
# What a walk over damaged data raises, besides ValueError.
_DAMAGED = (*DAMAGED, TypeError, AttributeError, OSError)


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int

    @property
    def num_bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape)


def _integers(numbers: object) -> tuple[int, ...]:
    if not isinstance(numbers, tuple) or not all(isinstance(x, int) for x in numbers):
        raise ValueError("a tensor whose shape is no tuple of integers")
    if len(numbers) > _MAX_DIMENSIONS or any(abs(x) >= 1 << 63 for x in numbers):
        raise ValueError("a tensor whose shape is none that memory can hold")
    return numbers


def _tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> _Tensor:
    if not isinstance(storage, _Storage) or not isinstance(offset, int):
        raise ValueError("a tensor without a storage")
    shape, strides = _integers(shape), _integers(strides)
    tensor = _Tensor(storage, offset, shape)
    if min(offset, *shape, 0) < 0 or tensor.end > storage.count:
        raise ValueError(f"a tensor of {shape} lies outside of its storage")
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if any(n > 1 and a != b for n, a, b in zip(shape, strides, steps, strict=True)):
        raise ValueError(f"a tensor of {shape} that is not contiguous")
    return tensor


# The items that an opcode takes from the stack: so many, or (None) all since the last mark.
_TAKEN = {
    "TUPLE": None, "SETITEMS": None, "APPENDS": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3,
    "SETITEM": 2, "APPEND": 1, "REDUCE": 2, "BINPERSID": 1, "BUILD": 1, "STOP": 1,
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# The only names that a state dict refers to, and what they stand for here.
_NAMES = {
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "collections OrderedDict": dict,
    "torch._utils _rebuild_tensor_v2": _tensor,
}


def _storage(reference: object) -> _Storage:
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise ValueError("a reference that is not to a storage")
    _, dtype, key, _, count, *view = reference
    if not isinstance(dtype, np.dtype):
        raise ValueError("a storage of something else than float16, bfloat16, float32 or int64")
    if not isinstance(key, str) or not isinstance(count, int) or not 0 <= count < 1 << 63:
        raise ValueError("a storage without a key or a count")
    if view and view[0] is not None:
        raise ValueError("a view of a storage")
    return _Storage(key, dtype, count)


def _evaluated(stream: BinaryIO) -> Any:
    """The value of one pickle. Raises ValueError for whatever a state dict does not have."""
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, object] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number >= _MAX_OPCODES:
            raise ValueError(f"more than {_MAX_OPCODES} opcodes, which no state dict needs")
        if (count := _TAKEN.get(opcode.name, 0)) is None:
            items, stack = stack, outer.pop()
        else:
            items = [stack.pop() for _ in range(count)][::-1]
        match opcode.name:
            case "PROTO" | "BUILD":  # which sets attributes of the dict: versions of modules
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "GLOBAL" if argument not in _NAMES:
                raise ValueError(
                    f"the name {argument[:80]!r}, which no state dict of tensors needs"
                )
            case "GLOBAL":
                stack.append(_NAMES[argument])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "SETITEMS" | "SETITEM":
                target, names = stack[-1], items[::2]
                if not isinstance(target, dict) or not all(isinstance(x, str) for x in names):
                    raise ValueError("items of something that is no dict of names")
                target.update(zip(names, items[1::2], strict=True))
            case "APPENDS" | "APPEND":
                stack[-1].extend(items)
            case "REDUCE":
                function, arguments = items
                if function is not _tensor and (function is not dict or arguments != ()):
                    raise ValueError("a call of something that no state dict calls")
                stack.append(function(*arguments))
            case "BINPERSID":
                stack.append(_storage(*items))
            case "STOP":
                return items[0]
            case name:
                raise ValueError(f"the opcode {name}, which no state dict needs")
    raise ValueError("it ends in the middle")


def _checked(state: object, file_bytes: int) -> Mapping[str, _Tensor]:
    """The state dict; raises ValueError if a file of this size cannot hold it."""
    if not isinstance(state, Mapping) or not all(isinstance(x, _Tensor) for x in state.values()):
        raise ValueError("it holds something else than a dict of tensors")
    storages = {tensor.storage for tensor in state.values()}
    if len({storage.key for storage in storages}) < len(storages):
        raise ValueError("it has two storages of one key")
    # Tensors that share a storage are copied, and every copy counts.
    sizes = {
        "storages": sum(x.num_bytes for x in storages),
        "tensors": sum(math.prod(x.shape) * x.storage.dtype.itemsize for x in state.values()),
    }
    for kind, declared in sizes.items():
        if declared > file_bytes:
            raise ValueError(f"its {kind} would take {declared} bytes, and it has {file_bytes}")
    return state


def _stored(data: mmap.mmap, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of a part of a zip that is not compressed, compared with their checksum."""
    # The part begins behind its own header, whose last two numbers are lengths of what follows.
    lengths = data[info.header_offset + 26 : info.header_offset + 30]
    name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > len(data):
        raise ValueError(f"{info.filename[:80]!r} is cut off")
    view = memoryview(data)[start : start + info.file_size]
    if zlib.crc32(view) != info.CRC:
        raise ValueError(f"{info.filename[:80]!r} is damaged")
    return view


def _read_zip(
    file: BinaryIO, data: mmap.mmap
) -> tuple[Mapping[str, _Tensor], dict[str, np.ndarray]]:
    """The state dict, and the numbers of each storage."""
    with zipfile.ZipFile(file) as archive:
        # torch.save compresses nothing, so a compressed file is not its own.
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("its parts are compressed, as torch.save leaves none")
        names = archive.namelist()
        pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} data.pkl, expected one")
        folder = pickles[0].split("/")[0]
        order = f"{folder}/byteorder"
        if order in names and archive.read(order) != b"little":
            raise ValueError("it was not written on a little-endian machine")
        with archive.open(pickles[0]) as stream:
            state = _checked(_evaluated(stream), len(data))
        numbers = {}
        for storage in {tensor.storage for tensor in state.values()}:
            member = f"{folder}/data/{storage.key}"
            info = archive.getinfo(member)
            if info.file_size != storage.num_bytes:
                raise ValueError(f"storage {storage.key[:80]!r} is not of the size it declares")
            numbers[storage.key] = np.frombuffer(_stored(data, info), storage.dtype)
    return state, numbers


def _read_legacy(data: mmap.mmap) -> tuple[Mapping[str, _Tensor], dict[str, np.ndarray]]:
    """Likewise."""
    if _evaluated(data) != _MAGIC or _evaluated(data) != _PROTOCOL:
        raise ValueError("it is not a file of torch.save")
    if _evaluated(data).get("little_endian") is not True:
        raise ValueError("it was not written on a little-endian machine")
    state, keys = _checked(_evaluated(data), len(data)), _evaluated(data)
    storages = {tensor.storage.key: tensor.storage for tensor in state.values()}
    # Checked before they are looked up: hashing nested tuples can take forever.
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("its list of storages is none of names")
    numbers = {}
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(data.read(8), "little", signed=True)
        start = data.tell()
        if count != storage.count or start + storage.num_bytes > len(data):
            raise ValueError(f"storage {key[:80]!r} is cut off")
        numbers[key] = np.frombuffer(data, storage.dtype, storage.count, start)
        data.seek(storage.num_bytes, os.SEEK_CUR)
    if data.read(1):
        raise ValueError("there is something after its end")
    return state, numbers


def map_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name, as read-only views of the file.

    They are float16, bfloat16, float32 or int64. Raises ValueError, in a few words, if the file is
    no state dict of such tensors, declares more than it can hold, or is damaged.
    """
    try:
        with path.open("rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            is_zip = data[:4] == b"PK\x03\x04"
            state, numbers = _read_zip(f, data) if is_zip else _read_legacy(data)
        return {
            name: numbers[x.storage.key][x.offset : x.end].reshape(x.shape)
            for name, x in state.items()
        }
    except _DAMAGED as e:
        reason = f"{type(e).__name__}: {e}"[:120]
        raise ValueError(f"not a whole state dict of tensors ({reason})") from e


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Like `map_tensors`, but copied into memory: of networks of at most 1 GiB."""
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{size} bytes, expected at most {_MAX_BYTES}")
    return {name: x.copy() for name, x in map_tensors(path).items()}
