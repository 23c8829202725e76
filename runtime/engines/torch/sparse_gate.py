"""Gates of which only the largest count: what is taken off all of them, and those that become negative are 0.

Gemma 3n takes off the mean of a layer's gates and a multiple of their deviation. Both are known from what the gates are
computed from, without the gates: their mean is the product with the mean row of the gate's matrix, their variance the
squared length of the product with a root of its rows' covariance. So a neuron does not depend on which others there
are, and a narrow FFN computes the same neurons as the whole one.
"""

from statistics import NormalDist
from typing import Any

import torch
from coreinfer.bundles.families import Family, resolve
from torch import nn
from torch.nn import functional

__all__ = ["GateCutoff", "SparseGateFfn", "take_sparse_gates"]


class GateCutoff(nn.Module):
    """What is taken off a token's gates.

    Attributes:
        mean: (inputs,), the mean row of the gate's matrix.
        spread: (rows, inputs), the multiple of a root of the rows' covariance: its transpose times itself is that.
    """

    def __init__(self, mean: torch.Tensor, spread: torch.Tensor) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean, requires_grad=False)
        self.spread = nn.Linear(spread.shape[1], spread.shape[0], bias=False, device="meta", dtype=spread.dtype)
        self.spread.weight = nn.Parameter(spread, requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute from (..., inputs) what is taken off: (..., 1)."""
        mean = (inputs.float() * self.mean.float()).sum(dim=-1, keepdim=True)
        deviation = self.spread(inputs).float().square().sum(dim=-1, keepdim=True).sqrt()
        taken: torch.Tensor = (mean + deviation).to(inputs.dtype)
        return taken


class SparseGateFfn(nn.Module):
    """The FFN of a layer that takes something off its gates; its modules have the names that transformers' have."""

    def __init__(self, ffn: Any, cutoff: GateCutoff) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = ffn.gate_proj, ffn.up_proj, ffn.down_proj
        self.act_fn = ffn.act_fn
        self.cutoff = cutoff

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute (..., hidden size) -> the same shape."""
        gate = functional.relu(self.gate_proj(hidden) - self.cutoff(hidden))
        output: torch.Tensor = self.down_proj(self.act_fn(gate) * self.up_proj(hidden))
        return output


def take_sparse_gates(model: Any, family: Family) -> None:
    """Put FFNs whose neurons are independent of each other in the place of those whose gates are compared.

    Args:
        model: that transformers built, with or without memory; one whose FFNs are such already stays as it is.
    """
    if family.cutoff is None:
        return
    path = family.cutoff.rpartition(".")[0]
    for layer in resolve(model, family.layers):
        ffn: Any = layer.get_submodule(path)
        share = 0.0 if isinstance(ffn, SparseGateFfn) else float(ffn.activation_sparsity)
        if share > 0:
            layer.set_submodule(path, SparseGateFfn(ffn, _cutoff(ffn.gate_proj.weight.detach(), share)))


def _cutoff(gate: torch.Tensor, share: float) -> GateCutoff:
    """What leaves `1 - share` of normally distributed gates positive; gate: (neurons, inputs)."""
    rows = min(gate.shape)
    if gate.device.type == "meta":
        return GateCutoff(gate.new_empty(gate.shape[1]), gate.new_empty(rows, gate.shape[1]))
    # Without a graph, and out of inference mode: the model may be trained later.
    with torch.inference_mode(mode=False), torch.no_grad():
        wide = gate.double()
        mean = wide.mean(dim=0)
        # The R of a QR decomposition is a root of the product of a matrix's transpose with it.
        root = torch.linalg.qr((wide - mean) / len(wide) ** 0.5, mode="r").R
        return GateCutoff(mean.to(gate.dtype), (NormalDist().inv_cdf(share) * root).to(gate.dtype))
