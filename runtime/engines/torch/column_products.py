"""Products of one token that read only the weights of the inputs that it wants, from a second copy in columns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from coreinfer.bundles import Bundle
from coreinfer.bundles.contract import ATTENTION_GROUPS, INPUT_GROUPS
from coreinfer.bundles.families import Family
from coreinfer.bundles.formats import GROUP_SIZE, LOW_MEAN, int4_grid
from coreinfer.bundles.manifest import Manifest
from coreinfer.bundles.tensors import TensorFile
from torch import nn

from .column_layout import Columns, column_bytes, lay_out_columns
from .low_halves import StoredMatrix, group_matrices, hold
from .packed_linear import is_down
from .wanted_inputs import Groups

__all__ = ["ColumnProducts", "column_groups", "columns_bytes", "multiply_columns"]


def column_groups(manifest: Manifest, family: Family) -> tuple[str, ...]:
    """Groups whose matrices can lie in columns: those in int4 that are modules, which experts are not."""
    formats = {group: "attention" if group in ATTENTION_GROUPS else "ffn" for group in INPUT_GROUPS}
    return tuple(
        group
        for group, part in formats.items()
        if family.input_groups.get(group) and manifest.quantization[part].format == "int4"
    )


def columns_bytes(bundle: Bundle, layers: Sequence[nn.Module], family: Family) -> int:
    """Memory that `ColumnProducts` take: the attention of all layers, and the largest FFN.

    Args:
        layers: of a model, with or without memory.
    """
    manifest, groups = bundle.manifest, column_groups(bundle.manifest, family)
    attention = sum(
        column_bytes(matrices[0].shape[1], sum(matrix.shape[0] for matrix in matrices))
        for number, layer in enumerate(layers)
        for group in groups
        if group in ATTENTION_GROUPS
        for matrices in [list(group_matrices(layer, family, bundle.base, (number, group)))]
    )
    model = manifest.model
    widths = [cluster.layer_budgets for cluster in manifest.clusters if cluster.file is not None]
    if bundle.dense is not None:
        widths.append((model.ffn_dim,) * model.num_layers)
    num_first = len(family.projections) - 1
    ffns = [
        sum(
            (column_bytes(model.hidden_size, num_first * _whole(width)) if "gate_up" in groups else 0)
            + (column_bytes(width, model.hidden_size) if "down" in groups else 0)
            for width in own
        )
        for own in widths
    ]
    return attention + max(ffns, default=0)


def _whole(num_rows: int) -> int:
    return -(-num_rows // GROUP_SIZE) * GROUP_SIZE


def multiply_columns(
    columns: Columns, values: torch.Tensor, norms: torch.Tensor, thresholds: torch.Tensor
) -> torch.Tensor:
    """Multiply one token's wanted inputs; the host waits for nothing, and shapes do not depend on the token.

    Args:
        values: (inputs,), as many as the columns or, but for padding, fewer.
        norms: (inputs or fewer,) float32 of the columns.
        thresholds: (2,); see `wanted_inputs.take`.
    Returns:
        (outputs,) float32, padding too.
    """
    from .column_kernels import launch_multiply, launch_take

    num_groups = len(columns.scales)
    assert values.numel() <= num_groups * GROUP_SIZE
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(values):
        taken = launch_take(values.contiguous(), norms, thresholds, num_groups)
        return launch_multiply((columns.high, columns.low), (columns.scales, columns.zeros), taken, float(LOW_MEAN))


@dataclass(frozen=True, kw_only=True)
class _Product:
    """The outputs of a group for some inputs, which are those of its other matrices too."""

    place: Groups
    inputs: torch.Tensor
    outputs: torch.Tensor


class ColumnProducts:
    """Multiplies by a second copy of the weights in use, which lies on the device from the first use of a share on.

    It is written over in place, so that a recorded step goes by what is in use.
    """

    def __init__(
        self, layers: Sequence[nn.Module], family: Family, bundle: Bundle, device: torch.device, *, packed: bool
    ) -> None:
        """Hold nothing yet.

        Args:
            packed: whether the FFN's modules multiply packed weights, whose padding then stays between the products.
        """
        self._layers, self._family, self._bundle = layers, family, bundle
        self._device, self._packed = device, packed
        self._groups = column_groups(bundle.manifest, family)
        self._held: dict[tuple[Groups, str], torch.Tensor] = {}
        self._rows: dict[Groups, dict[str, slice]] = {}
        self._ffn: TensorFile | None = None
        self._last: _Product | None = None

    def has(self, place: Groups) -> bool:
        """Whether a group's matrices lie in columns."""
        return place[1] in self._groups

    @property
    def held(self) -> Iterator[torch.Tensor]:
        """All that lies on the device."""
        yield from self._held.values()

    def use(self, ffn: TensorFile) -> bool:
        """Multiply by the base and another FFN; returns whether memory moved.

        Args:
            ffn: its file.
        """
        # Its thresholds may have changed.
        self._last = None
        if ffn is self._ffn:
            return False
        had_base, self._ffn = self._ffn is not None, None
        moved = False
        for layer in range(len(self._layers)):
            for group in self._groups:
                in_base = group in ATTENTION_GROUPS
                if not (in_base and had_base):
                    moved |= self._hold((layer, group), self._bundle.base if in_base else ffn)
        self._ffn = ffn
        return moved

    def _hold(self, place: Groups, file: TensorFile) -> bool:
        matrices = list(group_matrices(self._layers[place[0]], self._family, file, place))
        num_rows = [self._num_rows(matrix) for matrix in matrices]
        grids = [int4_grid(matrix.file, matrix.name, matrix.shape) for matrix in matrices]
        columns, end = lay_out_columns(grids, num_rows, self._device), 0
        self._rows[place] = {}
        for matrix, rows in zip(matrices, num_rows, strict=True):
            self._rows[place][matrix.path] = slice(end, end := end + rows)
        parts = {part.name: getattr(columns, part.name) for part in fields(columns)}
        moved = [hold(self._held, (place, name), part, self._device) for name, part in parts.items()]
        return any(moved)

    def _num_rows(self, matrix: StoredMatrix) -> int:
        """Outputs of a module, with the padding that it leaves."""
        pads = self._packed and matrix.role is not None and not is_down(matrix.role)
        return _whole(matrix.shape[0]) if pads else matrix.shape[0]

    def product(
        self,
        place: Groups,
        path: str,
        inputs: torch.Tensor,
        norms: torch.Tensor,
        thresholds: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Multiply one token's inputs (..., inputs) -> (..., outputs) of a module, all but one dimension being 1.

        Args:
            path: of the module, from the layer.
            norms, thresholds: see `multiply_columns`.
        """
        last = self._last
        # The same tensor, not one like it: a group's matrices share the product with all of them.
        if last is None or last.place != place or last.inputs is not inputs:
            columns = Columns(**{part.name: self._held[place, part.name] for part in fields(Columns)})
            outputs = multiply_columns(columns, inputs.reshape(-1), norms, thresholds)
            self._last = last = _Product(place=place, inputs=inputs, outputs=outputs)
        found: Any = last.outputs[self._rows[place][path]]
        found = found if bias is None else found + bias
        own: torch.Tensor = found.to(inputs.dtype).reshape(*inputs.shape[:-1], -1)
        return own
