"""Where and in which arithmetic torch runs a model."""

import torch
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.machine import bf16_products_are_faster
from coreinfer.compiler.config import DType

__all__ = ["pick_device", "pick_dtype"]


def pick_device(name: str) -> torch.device:
    """Find a torch device by name and prove that it works.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"--device {name}: torch cannot use it here ({reason}); try cpu") from error
    return device


def pick_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """Resolve "auto": bfloat16 on accelerators and on CPUs that multiply it faster, else float32."""
    if dtype != "auto":
        resolved = getattr(torch, dtype)
        assert isinstance(resolved, torch.dtype)
        return resolved
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if bf16_products_are_faster() else torch.float32
