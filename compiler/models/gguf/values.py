"""Values of a GGUF file's tensors."""

from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.errors import UnsupportedModelError
from coreinfer.compiler.models.unpack.mxfp4_table import mxfp4_values

from .header import TensorEntry

__all__ = ["check_readable", "read_rows", "read_tensor"]

_MXFP4_BYTES = 17


def read_tensor(entry: TensorEntry) -> npt.NDArray[Any]:
    """Read a tensor and unpack its blocks; its pages leave memory when the array does.

    Returns:
        float32 of `entry.shape`; tensors stored as float32 or float16 come in that.
    """
    return read_rows(entry, slice(0, entry.shape[0]))


def read_rows(entry: TensorEntry, rows: slice) -> npt.NDArray[Any]:
    """Read some of a tensor's rows, the first of its sizes; types and errors as `read_tensor`."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType(entry.type_id)
    start, stop, _ = rows.indices(entry.shape[0])
    shape, row_bytes = (stop - start, *entry.shape[1:]), entry.num_bytes // entry.shape[0]
    offset = entry.offset + start * row_bytes
    raw = np.fromfile(entry.file, dtype=np.uint8, count=row_bytes * shape[0], offset=offset)
    if kind == GGMLQuantizationType.F32:
        return raw.view("<f4").reshape(shape)
    if kind == GGMLQuantizationType.F16:
        return raw.view("<f2").reshape(shape)
    if kind == GGMLQuantizationType.MXFP4:
        return _mxfp4(raw).reshape(shape)
    blocks: npt.NDArray[Any] = raw.reshape(*shape[:-1], -1)
    return np.asarray(quants.dequantize(blocks, kind)).reshape(shape)


def _mxfp4(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Look blocks of 32 up: a scale, and 16 bytes whose low halves are the first 16 codes.

    ggml's own tables have doubled codes and half of the scale, and no scale that is no number.
    """
    scales, halves = np.split(raw.reshape(-1, _MXFP4_BYTES), [1], axis=1)
    codes = np.concatenate([halves & np.uint8(15), halves >> np.uint8(4)], axis=1)
    # Numbers beyond float32 become infinite, which the check of all weights names.
    with np.errstate(over="ignore"):
        table = mxfp4_values().astype(np.float32).reshape(-1)
    values: npt.NDArray[np.float32] = table[scales.astype(np.uint16) * np.uint16(16) + codes]
    return values


def check_readable(name: str, entry: TensorEntry) -> None:
    """Refuse a tensor whose type cannot be unpacked, before anything is read.

    Raises:
        UnsupportedModelError: the gguf package has no way to unpack its type.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    kind = GGMLQuantizationType(entry.type_id)
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{entry.file.name}: tensor {name} is of type {entry.type_name}, which the gguf package cannot unpack; "
            "use a file of another type, such as Q8_0 or Q4_K_M"
        ) from error
