"""Decoding that reads only the wanted inputs on a GPU, with kernels that are interpreted on the CPU.

None of this ran on a GPU (docs/gpu.md).
"""

import importlib.util
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from coreinfer.bundles import Bundle, ConfigError, open_bundle
from coreinfer.runtime.engines.protocol import FfnChoice
from coreinfer.runtime.engines.torch import column_choice, column_products
from coreinfer.runtime.engines.torch.column_layout import Columns
from coreinfer.runtime.engines.torch.decoder import TorchDecoder, device_needs
from coreinfer.runtime.engines.torch.wanted_inputs import InputCounts
from coreinfer.runtime.load_options import InputSkipping, LoadOptions

from .fake_device import FakeDevice
from .half_inputs import NEXT_IDS, PROMPT_IDS, logits_of
from .interpreting import INTERPRETED, needs_interpreter

# As in test_half_inputs.py, where it is compiled too.
NO_HALVES: dict[str, Any] = {"half_inputs": False, "packs": "thin", "keep": None, "budgets": None, "evaluate": False}
SHARE = 0.6


@pytest.fixture(scope="module")
def halved_bundle(tiny_bundle: Callable[..., Path]) -> Callable[..., Bundle]:
    """A function (family) that opens a bundle whose tokens read inputs in half."""
    return lambda family="llama", **options: open_bundle(
        tiny_bundle(family, token_share=SHARE, quantize="int4", **options)
    )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many outputs each product of the kernels had."""
    seen: list[int] = []
    multiply = column_products.multiply_columns

    def counted(columns: Columns, *rest: torch.Tensor) -> torch.Tensor:
        outputs = multiply(columns, *rest)
        seen.append(len(outputs))
        return outputs

    monkeypatch.setattr(column_products, "multiply_columns", counted)
    return seen


@needs_interpreter
@pytest.mark.parametrize(
    ("family", "weights", "halves"),
    [
        ("llama", "auto", True),
        ("llama", "packed", True),
        ("llama", "auto", False),
        ("phi3", "auto", True),
        ("opt", "auto", True),
        ("opt", "packed", True),
    ],
)
def test_decoding_by_columns_is_masked_decoding(
    family: str, weights: str, halves: bool, halved_bundle: Callable[..., Bundle], launches: list[int]
) -> None:
    bundle = halved_bundle(family) if halves else halved_bundle(family, **NO_HALVES)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "weights": weights}
    used = TorchDecoder(bundle, input_skipping="on", **options)
    masked = TorchDecoder(bundle, input_skipping="masked", **options)
    num_layers = bundle.manifest.model.num_layers
    for choice in (
        FfnChoice(cluster=2, token_share=0.5),
        FfnChoice(token_share=0.7),
        FfnChoice(cluster=0, token_share=0.5),
    ):
        launches.clear()
        got = logits_of(used, choice)
        # One for each group of each layer and token.
        assert len(launches) == 4 * num_layers * len(NEXT_IDS)
        expected = logits_of(masked, choice)
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
        assert not np.allclose(expected, logits_of(masked, choice.whole), atol=1e-2)
        assert len(launches) == 4 * num_layers * len(NEXT_IDS)


@needs_interpreter
def test_what_is_not_one_token_is_masked(halved_bundle: Callable[..., Bundle], launches: list[int]) -> None:
    bundle, shared = halved_bundle(), FfnChoice(cluster=1, token_share=0.5)
    used, masked = (
        TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping=asked) for asked in ("on", "masked")
    )
    for decoder in (used, masked):
        decoder.forward(PROMPT_IDS)
        decoder.use(shared)
    assert np.array_equal(used.forward(NEXT_IDS, all_logits=True), masked.forward(NEXT_IDS, all_logits=True))
    # What is counted is masked, for the kernels' counts stay on the device.
    used.masks.counts = counts = InputCounts()
    used.forward([5])
    assert counts.num_wanted
    assert launches == []
    used.masks.counts = None
    used.forward([5])
    assert launches


@needs_interpreter
def test_recorded_steps_go_by_the_columns_in_use(halved_bundle: Callable[..., Bundle], launches: list[int]) -> None:
    bundle, device = halved_bundle(), FakeDevice()
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "gpu_memory_mb": 1000.0, "cuda_graphs": "on"}
    static = TorchDecoder(bundle, input_skipping="on", transfer=device, **options)
    columns: Any = static.masks._columns
    device.recorded_addresses = lambda: [part.data_ptr() for part in columns.held]
    masked = TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="masked")
    # Packs of the same shapes; the fake device refuses to repeat a step whose columns moved.
    for cluster, share in ((2, 0.5), (0, 0.5), (0, 0.8), (2, 0.7)):
        choice = FfnChoice(cluster=cluster, token_share=share)
        np.testing.assert_allclose(logits_of(static, choice), logits_of(masked, choice), atol=1e-4, rtol=1e-4)
    assert launches
    assert device.num_recorded == 1


# What is asked for, and what can be had


@needs_interpreter
def test_columns_have_room_on_a_device(halved_bundle: Callable[..., Bundle]) -> None:
    bundle = halved_bundle()
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    needs = device_needs(bundle, **options)
    decoder = TorchDecoder(bundle, input_skipping="on", gpu_memory_mb=1000.0, **options)
    columns: Any = decoder.masks._columns
    decoder.use(FfnChoice(token_share=0.5))
    held = sum(part.nbytes for part in columns.held)
    roomy = TorchDecoder(bundle, input_skipping="masked", gpu_memory_mb=1000.0, **options)
    assert roomy._placement.kv_room_bytes - decoder._placement.kv_room_bytes == held  # type: ignore[operator]
    for missing, said in (
        (held // 2, r"for columns [\d.]+ \(none with input_skipping 'masked'\)"),
        (0, "input_skipping 'on': there is no room for .* beside the dense FFN; use 'masked'"),
    ):
        limit_mb = (needs.least + held - missing) / 1e6
        with pytest.raises(ConfigError, match=said):
            TorchDecoder(bundle, input_skipping="on", gpu_memory_mb=limit_mb, **options)
        TorchDecoder(bundle, input_skipping="auto", gpu_memory_mb=limit_mb, **options)


def test_on_is_refused_where_it_cannot_be(
    halved_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = halved_bundle()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"input_skipping 'on': it needs the package triton.*; use 'masked'"):
            TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="on")
    if not INTERPRETED:
        return
    with monkeypatch.context() as patch:
        patch.setattr(column_choice, "column_groups", lambda *_: ())
        with pytest.raises(ConfigError, match="input_skipping 'on': no matrices of this bundle can be read input by"):
            TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="on")
    monkeypatch.setattr(column_choice, "multiply_columns", lambda columns, *rest: torch.ones(1024))
    with pytest.raises(ConfigError, match="input_skipping 'on': its product is wrong by"):
        TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="on")
    # Whatever is raised: the compiler's own errors have no common class.
    monkeypatch.setattr(column_choice, "multiply_columns", _no_compiler)
    with pytest.raises(ConfigError, match="input_skipping 'on': CalledProcessError: Command 'cc' returned"):
        TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="on")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match=r"input_skipping 'on': expected a CUDA device .*, got device 'cpu'"):
        TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="on")


def _no_compiler(*_: Any) -> torch.Tensor:
    raise subprocess.CalledProcessError(1, "cc")


def test_the_cpu_is_masked_unless_asked_and_off_reads_all(halved_bundle: Callable[..., Bundle]) -> None:
    bundle = halved_bundle()
    for asked in ("auto", "masked"):
        decoder = TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping=asked)
        assert decoder.masks._columns is None
        assert decoder.token_shares_pay
    assert not TorchDecoder(bundle, device="cpu", dtype="float32", input_skipping="off").token_shares_pay
    for asked in get_args(InputSkipping):
        assert LoadOptions(engine="torch", input_skipping=asked).input_skipping == asked


@pytest.mark.parametrize(("gain", "is_used"), [(1.04, False), (1.06, True), (None, False)])
def test_a_gpu_leaves_out_where_its_trial_gains(
    gain: float | None,
    is_used: bool,
    halved_bundle: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = halved_bundle()
    shapes: list[Any] = []

    def tried(given: Any, *_rest: Any, **_options: Any) -> float:
        shapes.append(given)
        if gain is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gain

    monkeypatch.setattr(column_choice, "gain_of_columns", tried)
    monkeypatch.setattr(column_choice, "_can_have", lambda *_: True)
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    model = bundle.manifest.model
    assert shapes[0][3] == (model.ffn_dim, model.hidden_size, True)
    assert shapes[0][2] == (model.hidden_size, 2 * model.ffn_dim, True)
    assert (decoder.masks._columns is not None) == is_used
    assert ("CUDA out of memory" in caplog.text) == (gain is None)
    TorchDecoder(bundle, device="cpu", dtype="float32", gpu_memory_mb=1000.0)
    assert len(shapes) == 1


def test_auto_says_what_keeps_a_gpu_from_it(
    halved_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    family: Any = None
    monkeypatch.setattr(column_choice, "columns_problem", lambda device: "no compiler")
    cuda = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING):
        assert not column_choice._can_have(halved_bundle().manifest, family, "auto", cuda)
    assert "unwanted inputs are read, and count as 0: no compiler" in caplog.text
