"""Norms of the columns of the dense FFN's down projections: how much each neuron's activation changes what is put out.

Bundles store them for an FFN that is one, and for experts where tokens leave inputs out. Other mixtures have them
computed from their stored weights, once.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from .contract import expert_role, norms_role, tensor_name
from .formats import float_matrix
from .manifest import Manifest
from .tensors import TensorFile

__all__ = ["Floats", "down_norms"]

Floats = npt.NDArray[np.float32]


def down_norms(dense: TensorFile, manifest: Manifest) -> Floats:
    """Return the L2 norms of all columns: (layers, ffn_dim) float32, those of a layer's experts one after another."""
    num_layers, experts = manifest.model.num_layers, manifest.model.experts
    if experts is None:
        return np.stack([dense[tensor_name(layer, "column_norms")].array for layer in range(num_layers)])
    names = [
        tensor_name(layer, expert_role(number, ""))
        for layer in range(num_layers)
        for number in range(experts.num_experts)
    ]
    if manifest.token_shares is not None:
        norms = [dense[name + norms_role("down")].array for name in names]
    else:
        shape = (manifest.model.hidden_size, manifest.model.expert_neurons)
        with ThreadPoolExecutor() as pool:
            norms = list(pool.map(partial(_norms_of, dense, shape), names))
    return np.concatenate(norms).reshape(num_layers, manifest.model.ffn_dim)


def _norms_of(dense: TensorFile, shape: tuple[int, int], name: str) -> Floats:
    down = float_matrix(dense, name + "down", shape)
    norms: Floats = np.sqrt(np.einsum("ij,ij->j", down, down))
    return norms
