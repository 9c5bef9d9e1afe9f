"""Reads the tensors of a PyTorch checkpoint without executing any of it.

A `.pth` file is pickled, and unpickling runs whatever the file says. Here its opcodes are only
disassembled, by `pickletools`, and the few that a state dict is written with are interpreted:
dicts, tuples, numbers, strings, and descriptions of tensors. Every other opcode and every other
name is refused. Both layouts of `torch.save` are known:

    before 1.6   four pickles (magic number, protocol, system, state dict), the pickled
                 list of storage keys, then per storage its count (int64) and its numbers
    since 1.6    a zip with data.pkl, and one file of numbers per storage

The declared sizes are compared with the file's size before anything is allocated: numbers are
stored uncompressed, so neither storages nor tensors can be larger than the file.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pathlib
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_STORAGES = {"torch FloatStorage": np.dtype("<f4"), "torch LongStorage": np.dtype("<i8")}
_DICT, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_NAMES = {*_STORAGES, _DICT, _TENSOR}
# Far beyond any network for features. A state dict has some 40 opcodes per tensor.
_MAX_BYTES = 1 << 30
_MAX_OPCODES = 200_000
_MAX_DIMENSIONS = 8


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global that a state dict refers to. It is never looked up."""

    name: str


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

    def __post_init__(self):
        outside = self.offset + self.count > self.storage.count
        if min(self.offset, *self.shape, 0) < 0 or outside:
            raise ValueError(f"a tensor of {self.shape} lies outside of its storage")

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.count * self.storage.dtype.itemsize


class _Mark:
    pass


def _reduced(function: Any, arguments: Any) -> Any:
    """The result of a call in the file."""
    if function == _Name(_DICT) and arguments == ():
        return {}
    if function == _Name(_TENSOR) and isinstance(arguments, tuple) and len(arguments) >= 4:
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, _Storage) or not isinstance(offset, int):
            raise ValueError("a tensor without a storage")
        for numbers in (shape, strides):
            if not isinstance(numbers, tuple) or not all(isinstance(x, int) for x in numbers):
                raise ValueError("a tensor whose shape is no tuple of integers")
            if len(numbers) > _MAX_DIMENSIONS or any(abs(x) >= 1 << 63 for x in numbers):
                raise ValueError("a tensor whose shape is none that memory can hold")
        steps = [1]
        for size in reversed(shape):
            steps.append(steps[-1] * size)
        if any(
            size > 1 and stride != step
            for size, stride, step in zip(shape, strides, steps[-2::-1], strict=True)
        ):
            raise ValueError(f"a tensor of {shape} that is not contiguous")
        return _Tensor(storage, offset, shape)
    raise ValueError(f"a call of a {type(function).__name__}, which no state dict makes")


def _storage_of(reference: Any) -> _Storage:
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise ValueError("a reference that is not to a storage")
    _, kind, key, _, count = reference[:5]
    if not isinstance(kind, _Name) or kind.name not in _STORAGES:
        raise ValueError("a storage of something else than float32 or int64")
    if not isinstance(key, str) or not isinstance(count, int) or not 0 <= count < 1 << 63:
        raise ValueError("a storage without a key or a count")
    if len(reference) > 5 and reference[5] is not None:
        raise ValueError("a view of a storage")
    return _Storage(key, _STORAGES[kind.name], count)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _evaluated(stream: BinaryIO) -> Any:
    """The value of one pickle of a state dict's file.

    Raises:
      ValueError: an opcode, a name or a structure does not belong there.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        items = []
        while not isinstance(stack[-1], _Mark):
            items.append(stack.pop())
        stack.pop()
        return items[::-1]

    def fill(target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or not all(isinstance(k, str) for k in items[::2]):
            raise ValueError("items of something that is no dict of names")
        target.update(zip(items[::2], items[1::2], strict=True))

    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if number >= _MAX_OPCODES:
            raise ValueError(f"more than {_MAX_OPCODES} opcodes, which no state dict needs")
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "GLOBAL":
            if argument not in _NAMES:
                raise ValueError(
                    f"the name {argument[:80]!r}, which no state dict of tensors needs"
                )
            stack.append(_Name(argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_Mark())
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_reduced(stack.pop(), arguments))
        elif name == "BINPERSID":
            stack.append(_storage_of(stack.pop()))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            fill(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = since_mark()
            fill(stack[-1], items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else since_mark()
            stack[-1].extend(items)
        elif name == "BUILD":
            stack.pop()  # attributes of the dict: versions of modules
        elif name == "STOP":
            return stack.pop()
        else:
            raise ValueError(f"the opcode {name}, which no state dict needs")
    raise ValueError("it ends in the middle")


def _checked(state: Any, file_bytes: int) -> Mapping[str, _Tensor]:
    """The state dict; raises ValueError if a file of this size cannot hold it."""
    if not isinstance(state, Mapping) or not all(isinstance(x, _Tensor) for x in state.values()):
        raise ValueError("it holds something else than a dict of tensors")
    storages = {tensor.storage for tensor in state.values()}
    if len({storage.key for storage in storages}) < len(storages):
        raise ValueError("it has two storages of one key")
    # Tensors that share a storage are copied, and every copy counts.
    for kind, parts in (("storages", storages), ("tensors", state.values())):
        declared = sum(part.num_bytes for part in parts)
        if declared > file_bytes:
            raise ValueError(f"its {kind} would take {declared} bytes, and it has {file_bytes}")
    return state


def _arrays(
    state: Mapping[str, _Tensor], numbers: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors, copied out of the numbers of their storages."""
    arrays = {}
    for name, tensor in state.items():
        part = numbers[tensor.storage.key][tensor.offset : tensor.offset + tensor.count]
        arrays[name] = part.reshape(tensor.shape).copy()
    return arrays


def _read_zip(data: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
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
        state = _checked(_evaluated(io.BytesIO(archive.read(pickles[0]))), len(data))
        numbers = {}
        for storage in {tensor.storage for tensor in state.values()}:
            member = f"{folder}/data/{storage.key}"
            if archive.getinfo(member).file_size != storage.num_bytes:
                raise ValueError(f"storage {storage.key[:80]!r} is not of the size it declares")
            numbers[storage.key] = np.frombuffer(archive.read(member), storage.dtype)
    return _arrays(state, numbers)


def _read_legacy(data: bytes) -> dict[str, np.ndarray]:
    stream = io.BytesIO(data)
    if _evaluated(stream) != _MAGIC or _evaluated(stream) != _PROTOCOL:
        raise ValueError("it is not a file of torch.save")
    if _evaluated(stream).get("little_endian") is not True:
        raise ValueError("it was not written on a little-endian machine")
    state, keys = _checked(_evaluated(stream), len(data)), _evaluated(stream)
    storages = {tensor.storage.key: tensor.storage for tensor in state.values()}
    # Checked before they are looked up: hashing nested tuples can take forever.
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("its list of storages is none of names")
    numbers = {}
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(stream.read(8), "little", signed=True)
        stored = stream.read(storage.num_bytes)
        if count != storage.count or len(stored) != storage.num_bytes:
            raise ValueError(f"storage {key[:80]!r} is cut off")
        numbers[key] = np.frombuffer(stored, storage.dtype)
    if stream.read(1):
        raise ValueError("there is something after its end")
    return _arrays(state, numbers)


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, float32 and int64, by name.

    Raises:
      ValueError: in a few words: the file is no state dict of such tensors, declares more than it
        can hold, or is damaged.
    """
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"{size} bytes, expected at most {_MAX_BYTES}")
    data = path.read_bytes()
    try:
        return _read_zip(data) if data[:4] == b"PK\x03\x04" else _read_legacy(data)
    except ValueError:
        raise
    except (LookupError, TypeError, AttributeError, OverflowError, EOFError, OSError) as e:
        reason = f"{type(e).__name__}: {e}"[:120]
        raise ValueError(f"not a whole state dict of tensors ({reason})") from e
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, struct.error) as e:
        raise ValueError(f"a damaged zip ({e})") from e
