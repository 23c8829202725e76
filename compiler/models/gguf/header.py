"""What a GGUF file states before its weights: metadata, and name, type, shape and place of each tensor.

The format is little-endian: magic, version, counts, then key-value pairs, then the table of tensors, then their
bytes. Every length is checked against the file, so that a file that was cut short is named as such.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer.bundles.errors import ConfigError

__all__ = ["Header", "TensorEntry", "read_header"]

_MAGIC = b"GGUF"
# Version 1 counts in 32 bits; llama.cpp itself no longer reads it.
_VERSIONS = (2, 3)
# Value types of metadata that have one size: number in the file -> struct format.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies, and how it is stored.

    Attributes:
        file: the file that holds its bytes; a model in several files has several.
        type_name: what ggml calls the type, such as "Q4_K".
        type_id: the type's number in the file.
        shape: sizes in torch's order, the fastest last.
        offset: of the first byte, from the start of the file.
        num_bytes: that it takes there.
    """

    file: Path
    type_name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """A GGUF file's metadata and table of tensors.

    Attributes:
        metadata: key -> int, float, bool, str or a list of them.
        tensors: name in the file -> where it lies.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


def read_header(file: Path) -> Header:
    """Read what a GGUF file states before its weights.

    Raises:
        ConfigError: it is not a GGUF file, has an unsupported version or byte order, or is cut short or damaged.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(file, data)
    # mmap refuses an empty file with ValueError; so do numbers, texts and types that cannot be.
    except (OSError, ValueError, struct.error, OverflowError, MemoryError) as error:
        raise ConfigError(
            f"{file.name}: expected a whole GGUF file, got one that cannot be read ({error}); download it again"
        ) from error


class _Cursor:
    """Reads values one after another and knows where it is."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.offset = 0

    def scalars(self, letters: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{letters}", self._data, self.offset)
        self.offset += struct.calcsize(f"<{letters}")
        return values

    def text(self) -> str:
        (length,) = self.scalars("Q")
        end = self.offset + length
        if end > len(self._data):
            raise ValueError(f"a text of {length} bytes at byte {self.offset} goes past the end of {len(self._data)}")
        raw = self._data[self.offset : end]
        self.offset = end
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalars(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        raise ValueError(f"a metadata value at byte {self.offset} has the unknown type {kind}")

    def _array(self) -> list[Any]:
        kind, count = self.scalars("IQ")
        if kind in _SCALARS:
            if count > len(self._data):
                raise ValueError(f"a list of {count} values at byte {self.offset} goes past the end")
            return list(self.scalars(f"{count}{_SCALARS[kind]}"))
        return [self.value(kind) for _ in range(count)]


def _parse(file: Path, data: mmap.mmap) -> Header:
    cursor = _Cursor(data)
    if data[:4] != _MAGIC:
        raise ConfigError(f"{file.name}: expected a GGUF file, which starts with the bytes GGUF, got {data[:4]!r}")
    cursor.offset = 4
    _check_version(file, cursor.scalars("I")[0])
    num_tensors, num_keys = cursor.scalars("QQ")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"the key {key} stands in it twice")
        metadata[key] = cursor.value(cursor.scalars("I")[0])
    rows = [_table_row(cursor) for _ in range(num_tensors)]
    start = _aligned(cursor.offset, metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT))
    tensors = {}
    for name, shape, type_id, offset in rows:
        if name in tensors:
            raise ValueError(f"the tensor {name} stands in it twice")
        tensors[name] = _entry(file, name, shape, type_id, start + offset)
        end = tensors[name].offset + tensors[name].num_bytes
        if end > len(data):
            raise ValueError(f"tensor {name} ends at byte {end}, the file at {len(data)}: it was cut short")
    return Header(file=file, metadata=metadata, tensors=tensors)


def _check_version(file: Path, version: int) -> None:
    if version in _VERSIONS:
        return
    # Of a big-endian file the low half is 0.
    what = "a big-endian file" if version & 0xFFFF == 0 and version else f"version {version}"
    raise ConfigError(
        f"{file.name}: expected a little-endian GGUF file of version {' or '.join(map(str, _VERSIONS))}, got {what}; "
        "convert the model again with a current llama.cpp"
    )


def _table_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape in torch's order, type, and offset from the start of the tensors' bytes."""
    name = cursor.text()
    (num_dimensions,) = cursor.scalars("I")
    sizes = cursor.scalars(f"{num_dimensions}Q")
    type_id, offset = cursor.scalars("IQ")
    return name, tuple(reversed(sizes)), type_id, offset


def _aligned(offset: int, alignment: Any) -> int:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{_ALIGNMENT} is {alignment!r}, which is no power of two")
    return -(-offset // alignment) * alignment


def _entry(file: Path, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> TensorEntry:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(type_id)
    except ValueError as error:
        raise ValueError(f"tensor {name} has type {type_id}, which the installed gguf package does not know") from error
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block_size:
        raise ValueError(f"tensor {name} of type {kind.name} has shape {list(shape)}, no multiple of {block_size}")
    num_bytes = math.prod(shape) // block_size * block_bytes
    return TensorEntry(file=file, type_name=kind.name, type_id=type_id, shape=shape, offset=offset, num_bytes=num_bytes)
