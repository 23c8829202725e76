"""ReLU models whose FFN is stored neuron by neuron: what is stored, and that nothing is lost by it."""

import importlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError, open_bundle
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.formats import NEURON_FORMAT, cut_columns, cut_rows, ffn_formats, float_matrix, matrix_bytes
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.bundles.writer import finish_manifest
from coreinfer.compiler import CompileConfig, Progress, compile_model
from coreinfer.compiler.quantize.quantize import store_matrix
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from hypothesis import given, settings
from hypothesis import strategies as st

from .bundle_factory import change_tensors
from .model_factory import VOCABULARY, save_model

IDS = np.random.default_rng(1).integers(3, VOCABULARY, 70).tolist()
SCRIPTS = Path(__file__).parents[1] / "benchmarks"
SHARES = (0.1, 0.5)
# Odd everywhere: a second part of a row that is nearly empty, a last chunk, and blocks and groups that are not whole.
ODD = {
    "hidden_size": 544,
    "ffn_dim": 601,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
}


def random_matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def error(got: Any, expected: Any) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), columns=st.integers(1, 1100))
def test_rows_and_columns_are_int4_in_another_order(rows: int, columns: int) -> None:
    weight, shape = random_matrix(rows, columns), (rows, columns)
    moments = torch.rand(columns, generator=torch.Generator().manual_seed(1))
    by_rows = store_matrix("w", weight, "int4-rows", moments)
    by_columns = store_matrix("w", weight, "int4-columns", moments)
    expected = float_matrix(store_matrix("w", weight, "int4", moments), "w", shape)
    np.testing.assert_array_equal(float_matrix(by_rows, "w", shape), expected)
    turned = float_matrix(store_matrix("w", weight.T, "int4", None), "w", shape[::-1])
    np.testing.assert_array_equal(float_matrix(by_columns, "w", shape), turned.T)
    for kind, parts in {"int4-rows": by_rows, "int4-columns": by_columns}.items():
        assert sum(part.num_bytes for part in parts.values()) == matrix_bytes(kind, shape)


def test_bytes_lie_where_the_format_says() -> None:
    weight = random_matrix(3, 600)
    stored = store_matrix("w", weight, "int4-rows", None)["w.rows4"].array
    assert stored.shape == (3, 2, 304)
    codes = np.zeros((3, 1024), dtype=np.uint8)
    for column in range(1024):
        group, inner = column // 32, column % 32
        byte = stored[:, group // 16, inner // 8 * 64 + group % 16 * 4 + inner % 4]
        codes[:, column] = byte & 15 if inner % 8 < 4 else byte >> 4
    scales = np.ascontiguousarray(stored[..., 256:288]).view(np.float16).reshape(3, 32, 1).astype(np.float32)
    zeros = stored[..., 288:].reshape(3, 32, 1) / np.float32(16)
    values = (codes.reshape(3, 32, 32) - zeros) * scales
    np.testing.assert_array_equal(
        values.reshape(3, -1)[:, :600], float_matrix({"w.rows4": StoredTensor("U8", stored)}, "w", (3, 600))
    )
    assert not scales[:, 19:].any()


def test_rows_and_columns_are_cut_as_they_are_stored() -> None:
    weight, ids = random_matrix(40, 70), np.array([0, 7, 8, 31])
    rows = store_matrix("w", weight, "int4-rows", None)
    np.testing.assert_array_equal(
        float_matrix(cut_rows(rows, "w", ids), "w", (4, 70)), float_matrix(rows, "w", (40, 70))[ids]
    )
    columns = store_matrix("w", weight, "int4-columns", None)
    np.testing.assert_array_equal(
        float_matrix(cut_columns(columns, "w", ids), "w", (40, 4)), float_matrix(columns, "w", (40, 70))[:, ids]
    )


def test_what_says_which_neurons_are_zero_is_read_whole() -> None:
    assert ffn_formats(NEURON_FORMAT, gated=True) == {"gate": "int4", "up": "int4-rows", "down": "int4-columns"}
    assert ffn_formats(NEURON_FORMAT, gated=False) == {"up": "int4", "down": "int4-columns"}
    assert ffn_formats("int8", gated=True) == {"gate": "int8", "up": "int8", "down": "int8"}


# An ungated family with biases, compiled.


@pytest.fixture(params=["opt", "opt-post-norm", "gpt_neox"])
def compiled(
    request: pytest.FixtureRequest, tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    options: dict[str, Any] = {}
    if request.param == "gpt_neox":
        # Parallel blocks.
        folder = tmp_path_factory.getbasetemp() / "gpt_neox-relu"
        options["model"] = str(folder if folder.exists() else save_model(folder, request.param, hidden_act="relu"))
    return open_bundle(tiny_bundle(request.param, quantize="int4", by_neuron=True, **options))


def test_a_compiled_bundle_is_stored_by_neuron(compiled: Bundle) -> None:
    record = compiled.manifest.quantization["ffn"]
    assert (record.format, record.group_size) == (NEURON_FORMAT, 32)
    assert compiled.manifest.quantization["attention"].format == "int4"
    assert compiled.dense is not None
    for file in (compiled.dense, compiled.pack(1)):
        assert "layers.0.down.columns4" in file
        assert "layers.0.up.q4" in file
    weights = [stored for name, stored in compiled.dense.items() if name.split(".")[2] in ("up", "down")]
    assert compiled.manifest.ffn_bytes == sum(stored.num_bytes for stored in weights)


def test_an_unrepaired_pack_is_cut(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("opt", quantize="int4", by_neuron=True, reconstruct=False))
    assert bundle.dense is not None
    pack, name = bundle.pack(1), tensor_name(2, "down")
    ids = pack[tensor_name(2, "neuron_ids")].array
    whole = float_matrix(bundle.dense, name, (32, 96))
    np.testing.assert_array_equal(float_matrix(pack, name, (32, len(ids))), whole[:, ids])


def read(decoder: Decoder, choice: FfnChoice) -> tuple[Any, Any]:
    """Logits of all tokens, read in one block, then one by one."""
    decoder.use(choice)
    decoder.truncate(0)
    block = decoder.forward(IDS, all_logits=True)
    decoder.truncate(0)
    return block, np.concatenate([decoder.forward([token_id]) for token_id in IDS])


def test_both_engines_read_it(compiled: Bundle) -> None:
    """What differs is the rounding of activations, as in any int4 bundle."""
    ids = tuple(np.arange(first, 96, 3, dtype=np.int32) for first in range(3))
    reference, decoder = TorchDecoder(compiled, device="cpu", dtype="float32"), NativeDecoder(compiled, threads=2)
    for choice in (DENSE, FfnChoice(cluster=1), FfnChoice(neuron_ids=ids)):
        expected = read(reference, choice)[0]
        for got in read(decoder, choice):
            assert error(got, expected) < 0.15


def test_memory_may_be_limited(compiled: Bundle) -> None:
    whole = NativeDecoder(compiled, threads=2)
    limited = NativeDecoder(compiled, threads=2, memory_bytes=40_000_000)
    for choice in (DENSE, FfnChoice(cluster=2)):
        for got, expected in zip(read(limited, choice), read(whole, choice), strict=True):
            np.testing.assert_array_equal(got, expected)


# A gated model of odd sizes whose text activates known shares.


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The same weights in both formats."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        module = importlib.import_module("contenders.relu_bundle")
    shape, folder = module.ReluShape(name="odd", **ODD), tmp_path_factory.mktemp("relu")
    return {
        kind: open_bundle(module.relu_bundle(folder / kind, shape, SHARES, ffn_format=kind))
        for kind in ("int4", NEURON_FORMAT)
    }


def test_logits_are_those_of_the_dense_ffn(gated: dict[str, Bundle]) -> None:
    """Against the same weights in float32, as near as the int4 bundle is to its own."""
    off = {}
    for kind, bundle in gated.items():
        expected = read(TorchDecoder(bundle, device="cpu", dtype="float32"), DENSE)[0]
        off[kind] = [error(got, expected) for got in read(NativeDecoder(bundle, threads=2, isa="portable"), DENSE)]
    assert max(off[NEURON_FORMAT]) < 1.1 * max(off["int4"]) < 0.05


@pytest.mark.parametrize("isa", _native.available_isas())
def test_kernels_agree(isa: str, gated: dict[str, Bundle]) -> None:
    bundle = gated[NEURON_FORMAT]
    expected = read(NativeDecoder(bundle, threads=1, isa="portable"), DENSE)
    for threads in (1, 3):
        block, steps = read(NativeDecoder(bundle, threads=threads, isa=isa), DENSE)
        assert error(steps, expected[1]) < 1e-4
        assert error(block, expected[0]) < (0.01 if isa == "amx" else 1e-4)


def check_rows_alone(decoder: NativeDecoder) -> None:
    """Rows of a batch are to the bit what each token is alone."""
    expected = []
    for token_id in (3, 8, 40):
        decoder.truncate(0)
        expected.append(decoder.forward([token_id])[0])
    decoder.truncate(0)
    numbers = [0, decoder.add_sequence(), decoder.add_sequence()]
    np.testing.assert_array_equal(decoder.forward_rows(numbers, [3, 8, 40]), expected)


@pytest.mark.parametrize("isa", _native.available_isas())
def test_rows_are_what_single_tokens_are(isa: str, gated: dict[str, Bundle]) -> None:
    decoder = NativeDecoder(gated[NEURON_FORMAT], threads=2, isa=isa)
    decoder.use(DENSE)
    check_rows_alone(decoder)


def test_only_what_is_active_counts_as_read(gated: dict[str, Bundle]) -> None:
    decoder = NativeDecoder(gated[NEURON_FORMAT], threads=2)
    decoder.use(DENSE)
    whole = decoder.bytes_per_token(1, greedy=True)
    assert whole >= gated[NEURON_FORMAT].manifest.ffn_bytes
    skippable = sum(
        layers * matrix_bytes(kind, shape)
        for layers, kind, shape in ((2, "int4-rows", (601, 544)), (2, "int4-columns", (544, 601)))
    )
    for kind in range(len(SHARES)):
        decoder.truncate(0)
        decoder.forward([40 + kind])
        read_bytes = decoder.bytes_per_token(1, greedy=True)
        active = round(SHARES[kind] * 601 / 32) * 32 / 601
        assert read_bytes == pytest.approx(whole - (1 - active) * skippable, rel=1e-3)


def test_activations_are_seen(gated: dict[str, Bundle]) -> None:
    """What prompts are measured by holds what goes into the down projection, zeros where nothing was computed."""
    ids = list(range(1, 41))
    found = {}
    for kind, bundle in gated.items():
        decoder = NativeDecoder(bundle, threads=2, isa="portable")
        found[kind] = decoder.prompt_statistics(ids, ["output-aware"])[1]["output-aware"]
    np.testing.assert_array_equal(found[NEURON_FORMAT] > 0, found["int4"] > 0)
    assert 0.4 < (found["int4"] > 0).mean() < 0.7
    assert error(found[NEURON_FORMAT], found["int4"]) < 0.05


# What does not fit is refused by name.


def test_other_activations_and_formats_are_refused(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    config = replace(tiny_inputs("llama"), output=tmp_path / "b", quantize="int4", by_neuron=True)
    with pytest.raises(
        ConfigError, match="--by-neuron: expected a model whose activation is relu, or which cuts gates off, got silu"
    ):
        compile_model(config, Progress())
    assert not (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match="--by-neuron: expected --quantize int4, got int8"):
        replace(tiny_inputs("opt"), output=tmp_path / "b", quantize="int8", by_neuron=True)


def test_a_manifest_of_another_activation_is_refused(compiled: Bundle, tmp_path: Path) -> None:
    manifest = compiled.manifest
    wrong = replace(manifest, model=replace(manifest.model, activation="gelu"))
    (tmp_path / "x").mkdir()
    finish_manifest(tmp_path / "x", wrong)
    with pytest.raises(
        BundleCorrupt, match="format 'int4-neurons' is for activation 'relu' or gates that are cut off, got 'gelu'"
    ):
        read_manifest(tmp_path / "x")
    records = manifest.quantization | {"attention": manifest.quantization["ffn"]}
    finish_manifest(tmp_path / "x", replace(manifest, quantization=records))
    with pytest.raises(BundleCorrupt, match=r"quantization\.attention: format 'int4-neurons'"):
        read_manifest(tmp_path / "x")


def test_a_tensor_of_another_shape_is_named(gated: dict[str, Bundle], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gated[NEURON_FORMAT].path, tmp_path / "b"))
    name = "layers.0.down.columns4"

    def cut(tensors: dict[str, StoredTensor]) -> None:
        tensors[name] = StoredTensor("U8", tensors[name].array[:-1])

    change_tensors(folder, LAYOUT.dense, cut)
    with pytest.raises(BundleCorrupt, match=r"'layers.0.down.columns4': expected U8 \[601, 2, 304\], got U8 \[600"):
        NativeDecoder(open_bundle(folder), threads=1)
