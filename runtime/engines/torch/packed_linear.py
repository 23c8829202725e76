"""int4 matrices that torch's own int4 product multiplies in place of unpacked ones.

`aten::_weight_int4pack_mm` computes with w = scale * (code - 8) + offset, in groups of 32 inputs; a bundle's
w = scale * (code - zero) (docs/format.md) is that with offset = scale * (8 - zero). On a GPU scale and offset are
rounded to bfloat16. int8 stays unpacked: `aten::_weight_int8pack_mm` has one scale a row, a bundle one a group.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from coreinfer.bundles import Bundle, ConfigError
from coreinfer.bundles.formats import GROUP_SIZE, int4_grid
from coreinfer.bundles.tensors import StoredTensor
from torch import nn
from torch.nn import functional

__all__ = [
    "GRID",
    "PackedLinear",
    "is_down",
    "pack_grid",
    "pack_matrix",
    "packed_problem",
    "packed_product",
    "packed_shapes",
    "pick_packed",
    "replace_linear",
]

_log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
GRID = "_grid"
_TILE = 16
_TOLERANCE = 0.02


class PackedLinear(nn.Module):
    """A linear layer whose weights are packed, or plain where they come without a grid."""

    def __init__(self, out_features: int | None) -> None:
        """Leave the weights open.

        Args:
            out_features: cut the output to this many columns; None leaves the padding, whose weights are 0.
        """
        super().__init__()
        self.out_features = out_features
        self.weight = torch.empty(0)
        self.grid: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply (..., in) -> (..., out)."""
        return packed_product(inputs, self.weight, self.grid, self.bias, self.out_features)


def packed_product(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    grid: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int | None,
) -> torch.Tensor:
    """Multiply (..., in) -> (..., out) by packed weights, or by plain ones where there is no grid.

    Args:
        out_features: cut the output to this many columns; None leaves the padding, whose weights are 0.
    """
    if grid is None:
        return functional.linear(inputs, weight, bias)
    rows = inputs.reshape(-1, inputs.shape[-1])
    if missing := grid.shape[0] * GROUP_SIZE - rows.shape[1]:
        rows = functional.pad(rows, (0, missing))
    outputs = _multiply(rows.contiguous(), weight, grid)[:, :out_features]
    if bias is not None:
        outputs = outputs + bias
    return outputs.reshape(*inputs.shape[:-1], -1)


def is_down(role: str) -> bool:
    """Whether a matrix is a down projection, that of an expert too (`expert_role`)."""
    return role.rpartition(".")[2] == "down"


def replace_linear(layer: nn.Module, path: str, *, keep_padding: bool) -> None:
    """Put a `PackedLinear` in the place of a linear module."""
    old: Any = layer.get_submodule(path)
    layer.set_submodule(path, PackedLinear(None if keep_padding else old.out_features))


def _multiply(rows: torch.Tensor, codes: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    operators = torch.ops.aten
    multiply = operators._weight_int4pack_mm_for_cpu if rows.device.type == "cpu" else operators._weight_int4pack_mm
    product: torch.Tensor = multiply(rows, codes, GROUP_SIZE, grid)
    return product


def _padded_shape(role: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows of gate and up are padded to what the down projection takes in: whole groups."""
    unit = _TILE if is_down(role) else GROUP_SIZE
    return -(-shape[0] // unit) * unit, -(-shape[1] // GROUP_SIZE) * GROUP_SIZE


def _inner_tiles(num_columns: int) -> int:
    """Tiles of 16 inputs that lie together on a GPU: as many as fit evenly."""
    return next(tiles for tiles in (8, 4, 2) if num_columns % (tiles * _TILE) == 0)


def packed_shapes(role: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Shapes:
    """Shapes and dtypes of what `pack_matrix` returns."""
    rows, columns = _padded_shape(role, shape)
    shapes: Shapes = {role + GRID: ((columns // GROUP_SIZE, rows, 2), dtype)}
    if device.type == "cpu":
        shapes[role] = ((rows, columns // 2), torch.uint8)
    else:
        tiles = _inner_tiles(columns)
        shapes[role] = ((-(-rows // 8), columns // (tiles * _TILE), 32, tiles // 2), torch.int32)
    return shapes


def pack_matrix(
    file: Mapping[str, StoredTensor],
    name: str,
    role: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensors:
    """Read an int4 matrix in the layout of the device's product; the tensors lie on the host.

    Raises:
        KeyError: the file does not hold it as int4.
    """
    return pack_grid(int4_grid(file, name, shape), role, shape, dtype, device)


def pack_grid(
    grid_of: tuple[Any, Any, Any], role: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensors:
    """Arrange codes, scales and zeros, as `int4_grid` returns them, as `pack_matrix` does."""
    codes, scales, zeros = (torch.from_numpy(part) for part in grid_of)
    missing = _padded_shape(role, shape)[0] - codes.shape[0]
    codes, scales, zeros = (functional.pad(part, (0, 0, 0, missing)) for part in (codes, scales, zeros))
    grid = torch.stack([scales, scales * (8 - zeros)], dim=-1).transpose(0, 1).contiguous()
    return {role: _device_layout(codes, device), role + GRID: grid.to(dtype)}


def _device_layout(codes: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Let the device itself arrange codes (rows, columns) uint8 as its product reads them."""
    if device.type == "cpu":
        arranged: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return arranged
    # The first of two inputs is the high nibble.
    nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous().to(device)
    arranged = torch.ops.aten._convert_weight_to_int4pack(nibbles, _inner_tiles(codes.shape[1]))
    return arranged.cpu()


def packed_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the device's int4 product cannot be used, after trying it on a small matrix; None where it can."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8, generator=generator)
    scales, zeros = (torch.rand(32, 2, generator=generator) for _ in range(2))
    inputs = torch.randn(1, 64, generator=generator)
    weights = (codes.view(32, 2, GROUP_SIZE) - 16 * zeros[..., None]) * scales[..., None]
    expected = inputs @ weights.reshape(32, 64).T
    grid = torch.stack([scales, scales * (8 - 16 * zeros)], dim=-1).transpose(0, 1).contiguous()
    try:
        arranged = _device_layout(codes, device).to(device)
        got = _multiply(inputs.to(device, dtype), arranged, grid.to(device, dtype)).float().cpu()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return str(error).strip().split("\n")[0]
    relative = float((got - expected).norm() / expected.norm())
    return None if relative < _TOLERANCE else f"its product is wrong by {relative:.0%}"


def pick_packed(bundle: Bundle, weights: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Decide whether int4 weights are multiplied as they are.

    Raises:
        ConfigError: they are asked to be and cannot.
    """
    if weights not in ("auto", "bfloat16", "packed"):
        raise ConfigError(f"weights: expected auto, bfloat16, packed, got {weights!r}")
    kind = bundle.manifest.quantization["ffn"].format
    if weights == "bfloat16" or (weights == "auto" and (device.type != "cuda" or kind != "int4")):
        return False
    problem = f"the FFN is stored as {kind}, and torch multiplies int4 only" if kind != "int4" else None
    problem = problem or packed_problem(device, dtype)
    if problem is None:
        return True
    if weights == "packed":
        raise ConfigError(f"weights 'packed': {problem}; use 'bfloat16'")
    _log.warning("int4 weights are unpacked: %s", problem)
    return False
