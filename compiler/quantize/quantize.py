"""Stage `quantize`: round weights to few bits, minimising the error of a layer's outputs, not of the weights.

The error of a row's output is, with inputs x whose second moments are m_i = E[x_i^2] and which are taken as
uncorrelated, sum_i m_i (w_i - w'_i)^2 (OBQ, arXiv 2208.11580, with a diagonal Hessian). Each row's groups of 32
inputs are independent under it: several ranges are tried for each group, the best is refitted by weighted least
squares, and the one with the lowest error is kept. Weights that already lie on a 4-bit grid with a minimum, as those of
Q4_1 files do, are found again up to the rounding of the zero point.

The work is done in C++ (csrc/), on all threads of torch; the result depends neither on their number nor on the CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from coreinfer.bundles.errors import ModelOutputError
from coreinfer.bundles.formats import NEURON_FORMAT, PACKED_FORMATS, stored_shapes
from coreinfer.bundles.row_formats import ROW_SUFFIXES, pack_rows
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler.prune.narrow import bf16_bits

from . import _kernels

__all__ = ["QuantizeOptions", "store_matrix"]


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Formats of the groups of tensors.

    Attributes:
        body: FFN and attention.
        head: token embedding and head.
        by_neuron: whether the FFN is stored neuron by neuron; the body is int4 then.
    """

    body: str
    head: str
    by_neuron: bool = False

    @property
    def ffn(self) -> str:
        """Format of the FFN."""
        return NEURON_FORMAT if self.by_neuron else self.body


def store_matrix(
    name: str, weight: torch.Tensor, kind: str, moments: torch.Tensor | None
) -> Mapping[str, StoredTensor]:
    """Turn a matrix into the tensors that a bundle stores.

    Args:
        name: of the matrix.
        weight: (rows, cols) of any strides; bfloat16 and float32 are read in place where they lie on the CPU.
        kind: "bf16", "int8", "int8-planes", "int4", "int4-rows" or "int4-columns".
        moments: (cols,) second moments of the inputs; None for all alike. Columns of int4-columns are rounded each by
            itself, so that they weigh nothing there.
    Raises:
        ModelOutputError: weights that are rounded, or moments, are not finite.
    """
    if kind == "int4-columns":
        weight, moments = weight.T, None
    if kind not in PACKED_FORMATS and kind not in ROW_SUFFIXES:
        return {name: StoredTensor("BF16", bf16_bits(weight.detach()))}
    importance = None if moments is None else moments.float().cpu().numpy()
    try:
        rounded = "int4" if kind in ROW_SUFFIXES else kind
        arrays = _kernels.round_matrix(_values(weight), rounded, importance, num_threads=torch.get_num_threads())
    except ValueError as error:
        raise ModelOutputError(f"{name}: {error}; compile with --dtype float32") from error
    if kind in ROW_SUFFIXES:
        codes, scales, zeros = arrays
        return {name + ROW_SUFFIXES[kind]: StoredTensor("U8", pack_rows(codes, scales, zeros, len(weight)))}
    shapes = stored_shapes(name, kind, (weight.shape[0], weight.shape[1]))
    return {part: StoredTensor(dtype, array) for (part, (dtype, _)), array in zip(shapes.items(), arrays, strict=True)}


def _values(weight: torch.Tensor) -> npt.NDArray[Any]:
    """View a matrix as numpy: the bits of bfloat16, else float32."""
    weight = weight.detach().cpu()
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.int16).numpy().view("uint16")
    return weight.float().numpy()
