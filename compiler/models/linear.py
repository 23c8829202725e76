"""Products of float32 by oneDNN on AMD's CPUs.

torch multiplies float32 by MKL, which takes slower kernels on CPUs that are not Intel's. torch also has oneDNN, which
does not ask who made them: on 2 cores of a Zen 3, 4,096 tokens by 576 x 1,536 weights run at 135 GFLOP/s where MKL has
98, and 22 tokens at 79 where it has 70.
"""

import torch
from coreinfer.bundles.shared.machine import is_amd
from torch import nn

__all__ = ["multiply_fast"]


def multiply_fast(model: nn.Module) -> None:
    """Have a model's linear modules multiply float32 by oneDNN where that is faster; in place."""
    if not is_amd() or not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        # Of subclasses nothing is known.
        if type(module) is nn.Linear:
            module.__class__ = _Linear


class _Linear(nn.Linear):
    """The same module, but for what multiplies: only where nothing is differentiated, which oneDNN's product cannot."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002, for that is its name in torch
        """Map (..., inputs) to (..., outputs)."""
        plain = input.dtype == self.weight.dtype == torch.float32 and input.device.type == "cpu"
        if torch.is_grad_enabled() or not plain or input.numel() == 0:
            return super().forward(input)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return product
