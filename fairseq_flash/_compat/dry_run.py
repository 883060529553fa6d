"""Reads a checkpoint file without making anything of it: what it is, if it is whole, how large it becomes.

``torch.load(weights_only=True)`` calls no function that runs code, but it checks no checksum, believes what a
file says about sizes, and some of the classes that it lists take a size as their argument. So the file is
looked at first: its archive record by record, and its pickle by an unpickler that knows stand-ins only.
"""

import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import torch

__all__ = ["examine"]

#: What an object in memory may take: so many bytes a byte of the file, and so many more.
_GROWTH, _ALLOWANCE = 100, 2**26
_NODE = 32  # bytes, of an item in a container
_DEPTH = 200  # containers in containers
_MALFORMED = (EOFError, struct.error, zipfile.BadZipFile, LookupError, TypeError, AttributeError, OSError)

# What torch.save writes, and all that its checked unpickler reads.
_OPCODES = {
    *("PROTO", "STOP", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_LIST"),
    *("EMPTY_DICT", "EMPTY_SET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
    *("GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPERSID"),
}
# Of torch's own list, what fairseq writes; none takes memory that its arguments do not take.
_LISTED_BY_TORCH = {
    *("builtins.set", "builtins.complex", "collections.OrderedDict", "collections.Counter"),
    *("_codecs.encode", "torch.Size", "torch.device", "torch.nn.parameter.Parameter"),
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
}
# The type of a storage's numbers; one of the newer format is bytes, and its tensors know their type.
_STORAGES = {
    **{f"{name.title()}Storage": getattr(torch, name) for name in ("double", "float", "half", "long", "int")},
    **{"ShortStorage": torch.short, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    **{"BoolStorage": torch.bool, "BFloat16Storage": torch.bfloat16, "UntypedStorage": torch.uint8},
    **{"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}


class _Made(dict):
    """Stands for an object of a listed class: its arguments, its state and the items set in it."""

    def __new__(cls, *parts: Any) -> "_Made":
        made = super().__new__(cls)
        made.parts = list(parts)
        return made

    def __init__(self, *_parts: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    __hash__ = object.__hash__


class _Storage(NamedTuple):
    item_size: int
    items: int


class _Tensor(NamedTuple):
    bytes: int


def examine(path: str) -> Any:
    """Checks a file that ``torch.load`` is to read.

    The cost is one more pass over the file, for the checksums: about half a second a gigabyte, half of what
    the reading itself takes from a warm cache.

    Args:
        path: A file that ``torch.save`` wrote, of today's format or the one before torch 1.6.

    Returns:
        What the file holds, with stand-ins for all but plain values.

    Raises:
        ValueError: the file is something else, is damaged, or would take far more memory than it has bytes.
        pickle.UnpicklingError: it holds code, or a class that is not allowed.
    """
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            begin = file.read(263)
            file.seek(0)
            if begin.startswith(b"PK\x03\x04"):
                content = _examine_archive(file, size)
            elif begin.startswith(b"\x80\x02"):
                content = _examine_legacy(file, size)
            else:
                raise ValueError(_what_it_is(begin))
        _check_growth(content, size)
    except _MALFORMED as error:
        raise ValueError(f"it is damaged, or not from torch.save ({type(error).__name__}: {error})") from None
    return content


def _what_it_is(begin: bytes) -> str:
    if not begin:
        return "it is empty"
    if begin[257:262] == b"ustar":
        return "it is a tar archive, or a checkpoint of a torch before 0.1.10"
    if begin.startswith(b"\x80"):
        return f"it is a pickle of protocol {begin[1]}, which torch.save does not write"
    text = begin.isascii() and b"\0" not in begin
    return f"it is {'a text' if text else 'no file'} that torch.save wrote, and begins with {begin[:16]!r}"


def _examine_archive(file: BinaryIO, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        folder = records[0].filename.partition("/")[0]
        sizes = {record.filename.removeprefix(f"{folder}/"): record.file_size for record in records}
        if "constants.pkl" in sizes:
            raise ValueError("it is a TorchScript program, not a checkpoint of weights")
        # Where two readers could see two things, or one byte stands for many, torch.save wrote none of it.
        if _directory(file, size) != archive.start_dir or len(sizes) < len(records):
            raise ValueError("it is no archive that torch.save wrote")
        if any(record.compress_type for record in records) or sum(sizes.values()) > size:
            raise ValueError("its records are compressed or overlap, which torch.save never writes")
        if not any(record.CRC for record in records):
            # Saved after torch.serialization.set_crc32_options(False): there is nothing to be compared.
            for record in records:
                record.CRC = None
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"it is damaged: the checksum of its record {damaged!r} is wrong")

        def storage(item_size: int, key: str, items: int) -> _Storage:
            if items * item_size > sizes[f"data/{key}"]:
                raise ValueError(f"its storage {key} of {items} numbers has {sizes[f'data/{key}']} bytes")
            return _Storage(item_size, items)

        return _unpickle(archive.read(f"{folder}/data.pkl"), storage)


def _directory(file: BinaryIO, size: int) -> int:
    """Where the archive itself says that its directory begins."""
    file.seek(max(0, size - 98))
    end = file.read()
    signature, offset = end[-22:-18], struct.unpack("<I", end[-6:-2])[0]
    if signature != b"PK\x05\x06":
        return -1
    return struct.unpack("<Q", end[-50:-42])[0] if end.startswith(b"PK\x06\x06") else offset


def _examine_legacy(file: BinaryIO, size: int) -> Any:
    """A magic number, a version, the system, the content, the keys of the storages; then their numbers."""
    total = 0

    def storage(item_size: int, key: str, items: int) -> _Storage:
        nonlocal total
        total += 0 if key in seen else item_size * items
        seen.add(key)
        if total > size:
            raise ValueError(f"its storages have more numbers than its {size} bytes")
        return _Storage(item_size, items)

    seen: set[str] = set()
    parts = []
    for _ in range(5):
        begin = file.tell()
        for _operation in pickletools.genops(file):
            pass
        end = file.tell()
        file.seek(begin)
        parts.append(_unpickle(file.read(end - begin), storage))
    return parts[3]


def _unpickle(data: bytes, storage: Callable[[int, str, int], _Storage]) -> Any:
    for operation, argument, _ in pickletools.genops(data):
        if operation.name not in _OPCODES:
            raise ValueError(f"its pickle holds {operation.name}, which torch.save does not write")
        if "PUT" in operation.name and argument > len(data):
            raise ValueError(f"its pickle names object {argument}, and has {len(data)} bytes")
    unpickler = _StandIns(io.BytesIO(data), encoding="utf-8")
    unpickler.storage = storage
    return unpickler.load()


class _StandIns(pickle.Unpickler):
    """Makes plain values, and stand-ins for all else; knows the listed names only."""

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in _TENSORS:
            return _TENSORS[full]
        item = getattr(torch, name, None) if module == "torch" else None
        if isinstance(item, torch.dtype):
            return item
        if name in _STORAGES and module in ("torch", "torch.storage"):
            return _STORAGES[name]
        if full in _LISTED_BY_TORCH or full in _listed_by_user():
            # A class of its own, so that no name can be mistaken for another.
            return type(name, (_Made,), {})
        raise pickle.UnpicklingError(f"GLOBAL {full} is not allowed")

    def persistent_load(self, identity: Any) -> _Storage:
        _, kind, key, _, items, *_ = identity
        if not isinstance(items, int) or items < 0:
            raise ValueError(f"its storage {key} has {items!r} numbers")
        return self.storage(kind.itemsize, str(key), items)


def _listed_by_user() -> frozenset[str]:
    """What ``torch.serialization.add_safe_globals`` lists, by the name in the pickle."""
    listed = torch.serialization.get_safe_globals()
    return frozenset(e[1] if isinstance(e, tuple) else f"{e.__module__}.{e.__qualname__}" for e in listed)


def _tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *rest: Any) -> _Tensor:
    """Stands for ``_rebuild_tensor``: a view into a storage, which must hold it."""
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and number >= 0 for number in numbers) or len(size) != len(stride):
        raise ValueError(f"a tensor of it has offset {offset!r}, size {size!r} and stride {stride!r}")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.items:
        raise ValueError(f"a tensor of it of size {size} does not lie in its storage of {storage.items}")
    return _Tensor(math.prod(size) * storage.item_size)


def _typed_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *rest: Any) -> _Tensor:
    """Stands for ``_rebuild_tensor_v3``, whose storage is bytes."""
    item_size = rest[2].itemsize
    return _tensor(_Storage(item_size, storage.items * storage.item_size // item_size), offset, size, stride)


_TENSORS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, arguments, state: rebuild(*arguments),
}


def _check_growth(content: Any, size: int) -> None:
    """Counts what is shared as often as it is used, because many a reader copies it as often."""
    weight, allowed = _weight(content, {}, 0), _GROWTH * size + _ALLOWANCE
    if weight > allowed:
        raise ValueError(f"it would take {weight:,} bytes of memory, from a file of {size:,}")


def _weight(value: Any, known: dict[int, int], depth: int) -> int:
    if isinstance(value, _Tensor):
        return value.bytes
    if isinstance(value, (str, bytes)):
        return _NODE + len(value)
    items = tuple(_items(value))
    if not items:
        return _NODE
    if id(value) not in known:
        if depth == _DEPTH:
            raise ValueError(f"its containers are nested deeper than {_DEPTH}")
        # A node of omegaconf, as a checkpoint that was loaded and saved again holds, knows its parent.
        known[id(value)] = 0
        known[id(value)] = _NODE + sum(_weight(item, known, depth + 1) for item in items)
    return known[id(value)]


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
        yield from getattr(value, "parts", ())
    elif isinstance(value, (list, tuple, set)):
        yield from value
