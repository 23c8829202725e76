"""Whether one token's unwanted inputs are left out by the column kernels: what was asked, what works, what gains."""

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from coreinfer.bundles import Bundle, ConfigError
from coreinfer.bundles.families import Family
from coreinfer.bundles.formats import GROUP_SIZE, LOW_MEAN
from coreinfer.bundles.manifest import Manifest
from coreinfer.runtime.load_options import InputSkipping
from torch import nn

from .column_layout import lay_out_columns
from .column_products import column_groups, multiply_columns
from .column_trial import TRIAL_SHARE, gain_of_columns
from .low_halves import group_matrices

__all__ = ["columns_problem", "pick_columns"]

_log = logging.getLogger(__name__)

_TOLERANCE = 0.01
_LEAST_GAIN = 1.05
"""Of the time of all weights over that of the wanted ones, as in the native engine."""


def columns_problem(device: torch.device) -> str | None:
    """Say why the kernels cannot be used, after trying them on small matrices; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton, which is not installed"
    from triton import knobs

    if device.type != "cuda" and not (device.type == "cpu" and knobs.runtime.interpret):
        return f"expected a CUDA device (or the CPU with TRITON_INTERPRET=1, for tests), got device {str(device)!r}"
    try:
        off = max(_error(device, num_inputs, num_outputs) for num_inputs, num_outputs in ((70, 33), (256, 1024)))
    except Exception as error:
        # Of Triton, of the driver, or of the C compiler that Triton calls.
        return f"{type(error).__name__}: {_first_line(error)}"
    return None if off < _TOLERANCE else f"its product is wrong by {off:.0%}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _error(device: torch.device, num_inputs: int, num_outputs: int) -> float:
    """The relative error of a product with inputs that are read whole, in half and not at all."""
    rng = np.random.default_rng(0)
    groups = -(-num_inputs // GROUP_SIZE)
    codes = rng.integers(0, 16, (num_outputs, groups * GROUP_SIZE), dtype=np.uint8)
    scales = rng.random((num_outputs, groups)).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 241, (num_outputs, groups)).astype(np.float32) / 16
    values, norms = rng.standard_normal(num_inputs).astype(np.float32), rng.random(num_inputs).astype(np.float32)
    limits = np.array([0.2, 0.4], dtype=np.float32)
    scores = np.abs(values) * norms
    expected = np.zeros(num_outputs, dtype=np.float32)
    parts: list[tuple[Any, Any]] = [(scores > limits[1], codes)]
    parts.append(((scores > limits[0]) & (scores <= limits[1]), (codes & 12) + LOW_MEAN))
    for wanted, read in parts:
        weights = (read - zeros.repeat(GROUP_SIZE, axis=1)) * scales.repeat(GROUP_SIZE, axis=1)
        expected += weights[:, :num_inputs] @ np.where(wanted, values, 0)
    columns = lay_out_columns([(codes, scales, zeros)], [num_outputs], device)
    moved = (torch.from_numpy(part).to(device) for part in (values, norms, limits))
    got = multiply_columns(columns, *moved)[:num_outputs].cpu().numpy()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def _can_have(manifest: Manifest, family: Family, asked: InputSkipping, device: torch.device) -> bool:
    """Say whether weights are to lie in columns as far as the options and the device go.

    Raises:
        ConfigError: leaving out is asked for and cannot be had.
    """
    if manifest.token_shares is None or asked in ("masked", "off") or (asked == "auto" and device.type != "cuda"):
        return False
    problem = columns_problem(device)
    if problem is None and not column_groups(manifest, family):
        problem = "no matrices of this bundle can be read input by input: expected int4, and no mixture of experts"
    if problem is None:
        return True
    if asked == "on":
        raise ConfigError(f"input_skipping 'on': {problem}; use 'masked'")
    _log.warning("input_skipping: unwanted inputs are read, and count as 0: %s", problem)
    return False


def pick_columns(
    bundle: Bundle,
    family: Family,
    layers: Sequence[nn.Module],
    asked: InputSkipping,
    *,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool,
    limited: bool,
) -> bool:
    """Decide whether weights lie in columns too.

    Args:
        layers: of the model, without memory yet.
        packed: whether the FFN's int4 weights are multiplied as they are.
        limited: whether the device's memory is limited; then `auto` does without.
    Raises:
        ConfigError: leaving out is asked for and cannot be had.
    """
    if (limited and asked == "auto") or not _can_have(bundle.manifest, family, asked, device):
        return False
    if asked == "on":
        return True
    shapes = _shapes(bundle, family, layers)
    try:
        gain = gain_of_columns(shapes, device, dtype, packed=packed)
    except Exception as error:
        _log.warning(
            "input_skipping: unwanted inputs are read, and count as 0: the trial failed: %s", _first_line(error)
        )
        return False
    finally:
        if device.type == "cuda":
            # Else what the trial had would not count as free.
            torch.cuda.empty_cache()
    pays = gain >= _LEAST_GAIN
    _log.info(
        "input_skipping: where tokens read %.2f of the weights, products are %.2f times as fast; the others are %s",
        TRIAL_SHARE,
        gain,
        "left out" if pays else "read, and count as 0",
    )
    return pays


def _shapes(bundle: Bundle, family: Family, layers: Sequence[nn.Module]) -> list[tuple[int, int, bool]]:
    """(inputs, outputs, whether of the FFN) of the first layer's groups that can lie in columns."""
    ffn = bundle.dense if bundle.dense is not None else bundle.pack(0)
    found = []
    for group in column_groups(bundle.manifest, family):
        in_ffn = group in ("gate_up", "down")
        matrices = list(group_matrices(layers[0], family, ffn if in_ffn else bundle.base, (0, group)))
        found.append((matrices[0].shape[1], sum(matrix.shape[0] for matrix in matrices), in_ffn))
    return found
