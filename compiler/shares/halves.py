"""Inputs that are read in half: where there are any, and what the low bits of stored codes are worth."""

import logging

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.contract import ATTENTION_GROUPS, INPUT_GROUPS
from coreinfer.bundles.tensors import TensorFile
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.runtime.engines.torch.low_halves import group_matrices
from coreinfer.runtime.engines.torch.wanted_inputs import Groups

from .inputs import Norms, groups_of

__all__ = ["low_energies", "low_weights", "reads_halves", "warn_of_no_halves"]

_log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float32]


def reads_halves(config: CompileConfig, loaded: LoadedModel) -> bool:
    """Whether a compile lets tokens read inputs in half."""
    return config.allows_halves and loaded.record.experts is None


def warn_of_no_halves(config: CompileConfig, loaded: LoadedModel) -> None:
    """Say where halves were asked for, and there are none."""
    if config.half_inputs and not reads_halves(config, loaded):
        why = f"--quantize {config.quantize}" if config.quantize != "int4" else "a mixture of experts"
        _log.warning("--half-inputs: expected int4 and no experts, got %s; no input is read in half", why)


def low_energies(loaded: LoadedModel, base: TensorFile, ffn: TensorFile, norms: Norms) -> Floats:
    """Return what share of the squares of each group's weights is in the low bits of their codes: (layers, 4) float32.

    Args:
        ffn: file of the dense FFN.
        norms: of `read_norms`.
    """
    shares = [_low_energy(loaded, base, ffn, place, norms[place]) for place in groups_of(loaded)]
    return np.array(shares, dtype=np.float32).reshape(-1, len(INPUT_GROUPS))


def _low_energy(loaded: LoadedModel, base: TensorFile, ffn: TensorFile, place: Groups, norms: torch.Tensor) -> float:
    matrices = group_matrices(
        loaded.layers[place[0]], loaded.family, base if place[1] in ATTENTION_GROUPS else ffn, place
    )
    lost = sum(float(matrix.low_halves().square().sum(dtype=torch.float64)) for matrix in matrices)
    return lost / max(float(norms.double().square().sum()), 1e-30)


def low_weights(
    loaded: LoadedModel, file: TensorFile, ratios: Floats, groups: tuple[str, ...]
) -> dict[tuple[int, str], torch.Tensor]:
    """Read what the low bits add to the matrices of some groups, of those whose inputs are read in half.

    Args:
        file: in which the matrices are: the base, or the FFN in use.
        ratios: (layers, 4), 1 where nothing is read in half.
        groups: `ATTENTION_GROUPS` or `FFN_GROUPS`.
    Returns:
        (layer, path of the module) -> (outputs, inputs), in the model's dtype.
    """
    return {
        (place[0], matrix.path): matrix.low_halves().to(loaded.device, loaded.dtype)
        for place, ratio in zip(groups_of(loaded), ratios.flatten().tolist(), strict=True)
        if place[1] in groups and ratio > 1
        for matrix in group_matrices(loaded.layers[place[0]], loaded.family, file, place)
    }
