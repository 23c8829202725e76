"""The same as on the fake device, on a real GPU. Skipped where there is none, and so far run on none (docs/gpu.md).

COREINFER_TEST_DEVICE=cpu runs them on the CPU, as tools/gpu-check.sh does to be tried: that tells nothing of a GPU.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.bundles import open_bundle
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.column_choice import columns_problem
from coreinfer.runtime.engines.torch.decoder import TorchDecoder, device_needs
from coreinfer.runtime.engines.torch.packed_linear import packed_problem
from coreinfer.runtime.load_options import InputSkipping

DEVICE = os.environ.get("COREINFER_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE != "cpu" and not torch.cuda.is_available(), reason="no GPU here")

# The CPU tries steps of fixed shapes under a limit only.
ROOMY: dict[str, Any] = {"gpu_memory_mb": 1000.0} if DEVICE == "cpu" else {}
TOKEN_IDS = [1, 57, 200, 300, 21, 99, 140, 7, 250, 33, 180, 77]
CHOICES = [FfnChoice(cluster=number) for number in (0, 2, 1, 3)]


def logits_of(bundle_dir: Path, dtype: str, **options: Any) -> npt.NDArray[np.float32]:
    decoder = TorchDecoder(open_bundle(bundle_dir), device=DEVICE, dtype=dtype, **options)
    logits = []
    for choice in CHOICES:
        decoder.truncate(0)
        decoder.use(DENSE)
        decoder.prepare(choice)
        logits.append(decoder.forward(TOKEN_IDS, all_logits=True))
        decoder.use(choice)
        logits += [decoder.forward([token_id]) for token_id in (9, 8, 77)]
    return np.concatenate(logits)


def least_mb(bundle_dir: Path, **options: Any) -> float:
    return device_needs(open_bundle(bundle_dir), device=DEVICE, **options).least / 1e6


def test_streamed_is_resident_to_the_bit(tiny_bundle: Callable[..., Path]) -> None:
    options: dict[str, Any] = {"dtype": "float32", "cuda_graphs": "off", "weights": "bfloat16"}
    resident = logits_of(tiny_bundle("llama"), **options)
    limit_mb = least_mb(tiny_bundle("llama"), dtype="float32", weights="bfloat16")
    np.testing.assert_array_equal(logits_of(tiny_bundle("llama"), gpu_memory_mb=limit_mb, **options), resident)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "mistral"])
def test_a_graph_gives_what_the_plain_pass_gives(family: str, tiny_bundle: Callable[..., Path]) -> None:
    plain = logits_of(tiny_bundle(family), "float32", cuda_graphs="off")
    graph = logits_of(tiny_bundle(family), "float32", cuda_graphs="on", **ROOMY)
    np.testing.assert_allclose(graph, plain, atol=2e-4, rtol=1e-3)


def test_packed_is_near_unpacked(tiny_bundle: Callable[..., Path]) -> None:
    assert packed_problem(torch.device(DEVICE), torch.bfloat16) is None
    folder = tiny_bundle("llama", quantize="int4")
    exact = logits_of(folder, "float32", weights="bfloat16", cuda_graphs="off")
    for weights in ("bfloat16", "packed"):
        logits = logits_of(folder, "bfloat16", weights=weights)
        assert np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 0.06


def test_columns_give_what_masks_give(tiny_bundle: Callable[..., Path]) -> None:
    """In float32, without and with a graph, then in bfloat16 by the int4 product, whose grid is rounded."""
    if DEVICE == "cpu" and (problem := columns_problem(torch.device(DEVICE))) is not None:
        pytest.skip(problem)
    bundle = open_bundle(tiny_bundle("llama", token_share=0.6, quantize="int4"))

    def logits(input_skipping: InputSkipping, dtype: str, **options: Any) -> npt.NDArray[np.float32]:
        decoder = TorchDecoder(bundle, device=DEVICE, dtype=dtype, input_skipping=input_skipping, **options)
        assert (decoder.masks._columns is not None) == (input_skipping == "on")
        found = []
        for share in (1.0, 0.64, 0.5):
            decoder.truncate(0)
            decoder.use(DENSE)
            decoder.forward(TOKEN_IDS)
            decoder.use(FfnChoice(token_share=share))
            found += [decoder.forward([token_id]) for token_id in (9, 8)]
        return np.concatenate(found)

    exact = logits("masked", "float32", cuda_graphs="off", weights="bfloat16")
    for options in ({"cuda_graphs": "off"}, {"cuda_graphs": "on", **ROOMY}):
        got = logits("on", "float32", weights="bfloat16", **options)
        np.testing.assert_allclose(got, exact, atol=2e-4, rtol=1e-3)
    if packed_problem(torch.device(DEVICE), torch.bfloat16) is None:
        near = logits("on", "bfloat16", weights="packed")
        # An input near a threshold may be taken otherwise in another arithmetic.
        assert np.linalg.norm(near - exact) / np.linalg.norm(exact) < 0.2
