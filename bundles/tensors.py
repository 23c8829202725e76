"""Safetensors files whose tensors are aligned and memory-mapped.

The safetensors format (https://github.com/huggingface/safetensors#format) allows no holes, so alignment to 64
bytes comes from a padded header and from named filler tensors; every safetensors reader can open the files.
numpy has no bfloat16: such tensors are carried as uint16 with the dtype tag "BF16".
"""

import json
import math
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .errors import BundleCorrupt
from .pages import forget_mapped, map_file, touch

__all__ = [
    "ALIGNMENT_BYTES",
    "StoredTensor",
    "TensorFile",
    "bf16_to_float32",
    "stream_tensors",
    "write_tensors",
]

ALIGNMENT_BYTES = 64
_FILLER = "__filler__"
_COPY_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100 << 20
_MAX_DIMENSIONS = 8
_MAX_EXTENT = 1 << 56
_NUMPY_DTYPES: dict[str, npt.DTypeLike] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
}
_ITEM_BYTES = {tag: np.dtype(dtype).itemsize for tag, dtype in _NUMPY_DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a file.

    Attributes:
        dtype: safetensors dtype tag, such as "BF16" or "F32".
        array: the values; uint16 bit patterns for "BF16".
    """

    dtype: str
    array: npt.NDArray[Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return int(self.array.nbytes)


def bf16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen bfloat16 bit patterns to float32, exactly."""
    return np.asarray(bits.astype(np.uint32) << 16).view(np.float32)


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write tensors to a safetensors file, each at a multiple of 64 bytes from the file's start.

    Raises:
        TypeError: an array's dtype is not that of its tag.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        offset = _add_entries(header, name, tensor, offset)
    with path.open("wb") as file:
        _write_header(file, header)
        for tensor in tensors.values():
            _write_data(file, tensor)


def stream_tensors(path: Path, tensors: Iterable[tuple[str, StoredTensor]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Write the file that `write_tensors` writes, holding one tensor at a time.

    The header, which comes first, is known last: until then the values wait in a nameless temporary file in the same
    folder, which needs room for them twice. The target is opened only when the last tensor is there.

    Args:
        path: of the file.
        tensors: name and tensor, each made when the one before is written.
    Returns:
        Name -> dtype tag and shape of each tensor, in their order.
    Raises:
        TypeError: an array's dtype is not that of its tag.
        ValueError: a name comes twice.
        OSError: the file or the temporary file cannot be written.
    """
    header: dict[str, Any] = {}
    written: dict[str, tuple[str, tuple[int, ...]]] = {}
    offset = 0
    with tempfile.TemporaryFile(dir=path.parent) as data:
        for name, tensor in tensors:
            if name in written:
                raise ValueError(f"tensor {name} comes twice")
            offset = _add_entries(header, name, tensor, offset)
            _write_data(data, tensor)
            written[name] = tensor.dtype, tuple(tensor.array.shape)
            # Else it would stay in memory while the next one is made.
            del tensor
        data.seek(0)
        with path.open("wb") as file:
            _write_header(file, header)
            shutil.copyfileobj(data, file, _COPY_BYTES)
    return written


def _add_entries(header: dict[str, Any], name: str, tensor: StoredTensor, start: int) -> int:
    """Enter a tensor and the filler after it, if it needs one; returns where the next tensor starts."""
    if tensor.array.dtype != np.dtype(_NUMPY_DTYPES[tensor.dtype]):
        raise TypeError(f"tensor {name}: {tensor.array.dtype} cannot carry {tensor.dtype}")
    end = start + tensor.num_bytes
    header[name] = _entry(tensor.dtype, tensor.array.shape, start, tensor.num_bytes)
    if filler := -end % ALIGNMENT_BYTES:
        header[f"{_FILLER}{name}"] = _entry("U8", (filler,), end, filler)
    return end + filler


def _entry(dtype: str, shape: tuple[int, ...], start: int, num_bytes: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + num_bytes]}


def _write_header(file: IO[bytes], header: Mapping[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    file.write(len(text).to_bytes(8, "little") + text)


def _write_data(file: IO[bytes], tensor: StoredTensor) -> None:
    file.write(np.ascontiguousarray(tensor.array).data)
    file.write(bytes(-tensor.num_bytes % ALIGNMENT_BYTES))


class TensorFile(Mapping[str, StoredTensor]):
    """The tensors of one safetensors file, memory-mapped and never copied."""

    def __init__(self, path: Path) -> None:
        """Map a file.

        Raises:
            BundleCorrupt: the file is missing, is no safetensors file, or its header does not fit its length.
        """
        self.path = path
        try:
            self._map = map_file(path)
        except (OSError, ValueError) as error:
            raise BundleCorrupt(f"{path}: cannot be mapped ({error}); compile the bundle again") from error
        self._header, self._data_start = _read_header(path, self._map)

    def __getitem__(self, name: str) -> StoredTensor:
        entry = self._header[name]
        dtype = np.dtype(_NUMPY_DTYPES[entry["dtype"]])
        start, end = entry["data_offsets"]
        count = (end - start) // dtype.itemsize
        flat = np.frombuffer(self._map, dtype=dtype, count=count, offset=self._data_start + start)
        return StoredTensor(entry["dtype"], flat.reshape(entry["shape"]))

    def __contains__(self, name: object) -> bool:
        # The default would make an array for each name that is asked for.
        return name in self._header

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def shape_of(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype tag and shape of a tensor, from the header alone."""
        entry = self._header[name]
        return entry["dtype"], tuple(entry["shape"])

    def prefetch(self) -> None:
        """Have the file's pages read ahead; returns at once."""
        threading.Thread(target=touch, args=(self._map,), daemon=True).start()

    @property
    def mapped_bytes(self) -> npt.NDArray[np.uint8]:
        """The whole mapped file, of which nothing is read by making this."""
        return np.frombuffer(self._map, dtype=np.uint8)

    def forget(self) -> None:
        """Let go of the file's pages that are in memory; they are read again when they are needed."""
        forget_mapped(self._map, self.path)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, fillers and header left out."""
        return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in self._header.values())


def _read_header(path: Path, data: mmap) -> tuple[dict[str, Any], int]:
    """Parse and check a header; fillers are left out."""
    if len(data) < 8:
        raise BundleCorrupt(f"{path}: {len(data)} bytes, too short for a safetensors file; compile the bundle again")
    num_header_bytes = int.from_bytes(data[:8], "little")
    if num_header_bytes > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise BundleCorrupt(f"{path}: header of {num_header_bytes} bytes in a file of {len(data)}; compile it again")
    try:
        header = json.loads(data[8 : 8 + num_header_bytes])
        problem = _check_entries(header, len(data) - 8 - num_header_bytes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"its header cannot be read ({error})"
    if problem:
        raise BundleCorrupt(f"{path}: {problem}; compile the bundle again")
    header.pop("__metadata__", None)
    return {name: entry for name, entry in header.items() if not name.startswith(_FILLER)}, 8 + num_header_bytes


def _check_entries(header: dict[str, Any], num_data_bytes: int) -> str | None:
    """Say what is wrong with a header: an unknown dtype, a bad range or a size that does not fit the shape."""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if not (_is_size(start) and _is_size(end) and start <= end <= num_data_bytes):
            return f"tensor {name!r} lies at {start}-{end}, beyond the {num_data_bytes} bytes of data"
        if entry["dtype"] not in _ITEM_BYTES:
            return f"tensor {name!r} has the unknown dtype {entry['dtype']!r}"
        if not _is_shape(entry["shape"]):
            return f"tensor {name!r} has the impossible shape {str(entry['shape'])[:80]}"
        num_expected = math.prod(entry["shape"]) * _ITEM_BYTES[entry["dtype"]]
        if num_expected != end - start:
            return f"tensor {name!r} of shape {entry['shape']} has {end - start} bytes, not {num_expected}"
    return None


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_shape(value: Any) -> bool:
    """Whether numpy can have an array of this shape: few enough dimensions, an extent within 64 bits."""
    if not (isinstance(value, list) and len(value) <= _MAX_DIMENSIONS and all(_is_size(size) for size in value)):
        return False
    extent: int = math.prod(max(size, 1) for size in value)
    return extent < _MAX_EXTENT
