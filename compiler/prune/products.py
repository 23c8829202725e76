"""Sums of products over tokens, which removal and repair of neurons go by.

On a CPU they come from this package's own kernels: torch multiplies bfloat16 to bfloat16 only, and would have to turn
everything into float32 first; and of a symmetric product it computes both halves.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.shared.machine import bf16_products_are_faster

from . import _products
from .triangle import pack_upper, unpack_upper

__all__ = ["add_products", "gram_matrix", "packed_gram"]

_TOKEN_CHUNK = 8192
_COLUMN_BLOCKS = 6
_MAX_THREADS = 256


def gram_matrix(activations: torch.Tensor) -> torch.Tensor:
    """Sum h h^T over tokens in float32.

    Args:
        activations: (tokens, n) of any float dtype.
    Returns:
        (n, n) float32.
    """
    return unpack_upper(packed_gram(activations), activations.shape[1])


def packed_gram(activations: torch.Tensor) -> torch.Tensor:
    """Sum h h^T over tokens in float32: what `pack_upper` returns of it."""
    num_columns = activations.shape[1]
    gram = torch.zeros((num_columns, num_columns), dtype=torch.float32, device=activations.device)
    cross = gram.new_zeros((num_columns, 0))
    rows = torch.arange(len(activations), device=activations.device)
    add_products(gram, cross, activations, activations[:, :0].contiguous(), rows)
    return pack_upper(gram)


def add_products(
    gram: torch.Tensor, cross: torch.Tensor, activations: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor
) -> None:
    """Add sums of h h^T, on and above the diagonal only, and of h y^T over some tokens.

    Args:
        gram: (n, n) float32; what is below the diagonal is of no use: see `pack_upper`.
        cross: (n, m) float32.
        activations: (tokens, n), h.
        targets: (tokens, m), y, of the same dtype.
        rows: (chosen tokens,) int64.
    """
    if activations.device.type == "cpu" and activations.dtype in (torch.bfloat16, torch.float32):
        num_threads = min(_MAX_THREADS, torch.get_num_threads())
        own = _values(activations), _values(targets)
        _products.add_products(
            gram.numpy(), cross.numpy(), *own, rows.numpy(), num_threads=num_threads, isa=_isa(activations.dtype)
        )
        return
    # Some at a time: a copy of all rows would be as large as the activations themselves.
    for part in rows.split(_TOKEN_CHUNK):
        values = activations[part].float()
        _add_upper(gram, values)
        cross.addmm_(values.T, targets[part].float())


@cache
def _isa(dtype: torch.dtype) -> str:
    """The fastest kernels: of AVX-512 alone, Intel's multiply bfloat16 faster after it was turned into float32."""
    if dtype == torch.float32 or bf16_products_are_faster():
        return "auto"
    return next(isa for isa in _products.available_isas() if not isa.endswith("bf16"))


def _values(matrix: torch.Tensor) -> npt.NDArray[np.uint16] | npt.NDArray[np.float32]:
    """Numbers of a tensor on the CPU, in place where it is contiguous: of bfloat16 its bits."""
    if matrix.dtype == torch.float32:
        floats: npt.NDArray[np.float32] = matrix.contiguous().numpy()
        return floats
    bits: npt.NDArray[np.uint16] = matrix.contiguous().view(torch.int16).numpy().view(np.uint16)
    return bits


def _add_upper(gram: torch.Tensor, values: torch.Tensor) -> None:
    """Add (tokens, n) float32 values' products to the blocks on and above the diagonal."""
    num_columns = values.shape[1]
    step = max(64, -(-num_columns // _COLUMN_BLOCKS))
    for start in range(0, num_columns, step):
        gram[start : start + step, start:].addmm_(values[:, start : start + step].T, values[:, start:])
