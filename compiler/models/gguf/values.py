"""Values of a GGUF file's tensors."""

from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.errors import UnsupportedModelError

from .header import TensorEntry

__all__ = ["check_readable", "read_tensor"]


def read_tensor(entry: TensorEntry) -> npt.NDArray[Any]:
    """Read a tensor and unpack its blocks; its pages leave memory when the array does.

    Returns:
        float32 of `entry.shape`; tensors stored as float32 or float16 come in that.
    """
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType(entry.type_id)
    raw = np.fromfile(entry.file, dtype=np.uint8, count=entry.num_bytes, offset=entry.offset)
    if kind == GGMLQuantizationType.F32:
        return raw.view("<f4").reshape(entry.shape)
    if kind == GGMLQuantizationType.F16:
        return raw.view("<f2").reshape(entry.shape)
    rows: npt.NDArray[Any] = raw.reshape(*entry.shape[:-1], -1)
    return np.asarray(quants.dequantize(rows, kind)).reshape(entry.shape)


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
