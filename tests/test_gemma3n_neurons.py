"""Gemma 3n whose layers that cut gates off are stored neuron by neuron: what their gates make zero is not read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError, open_bundle
from coreinfer.bundles.families import resolve
from coreinfer.bundles.formats import NEURON_FORMAT, ffn_layer_bytes, matrix_bytes
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.reader import find_problems
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.bundles.writer import finish_manifest
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder

from .engine_inputs import PROMPT
from .model_factory import save_model
from .test_by_neuron import IDS, check_rows_alone, error, read

CHOICES = (DENSE, FfnChoice(cluster=1))
CUT = (0, 2)
"""Layers whose gates are cut off; the one between them is stored as ever."""


@pytest.fixture
def bundles(tiny_bundle: Callable[..., Path]) -> dict[str, Bundle]:
    """The same model in both formats, by the FFN's."""
    made = {
        kind: tiny_bundle("gemma3n", quantize="int4", by_neuron=kind == NEURON_FORMAT)
        for kind in ("int4", NEURON_FORMAT)
    }
    return {kind: open_bundle(folder) for kind, folder in made.items()}


def test_only_layers_that_cut_gates_off_are_stored_so(bundles: dict[str, Bundle]) -> None:
    bundle = bundles[NEURON_FORMAT]
    assert find_problems(bundle.path, bundle.manifest) == []
    assert bundle.dense is not None
    for file in (bundle.dense, bundle.pack(0)):
        for layer in range(3):
            assert (f"layers.{layer}.down.columns4" in file) == (f"layers.{layer}.up.rows4" in file) == (layer in CUT)
            assert f"layers.{layer}.gate.q4" in file


@pytest.mark.parametrize("isa", _native.available_isas())
def test_logits_are_those_of_all_neurons(isa: str, bundles: dict[str, Bundle]) -> None:
    """As near to the stored weights in float32 as if all are read; in a block, and token by token; with a pack too."""
    ids = tuple(np.arange(first, 96, 3, dtype=np.int32) for first in range(3))
    for choice in (*CHOICES, FfnChoice(neuron_ids=ids)):
        off = {}
        for kind, bundle in bundles.items():
            expected = read(TorchDecoder(bundle, device="cpu", dtype="float32"), choice)[0]
            off[kind] = [error(got, expected) for got in read(NativeDecoder(bundle, threads=2, isa=isa), choice)]
        assert max(off[NEURON_FORMAT]) < 1.3 * max(off["int4"]) < 0.1


@pytest.mark.parametrize("isa", _native.available_isas())
def test_rows_are_what_single_tokens_are(isa: str, bundles: dict[str, Bundle]) -> None:
    """To the bit, each with what its own gates take off; and a block is what its tokens are, but for AMX's rounding."""
    decoder = NativeDecoder(bundles[NEURON_FORMAT], threads=2, isa=isa)
    decoder.use(CHOICES[1])
    block, steps = read(decoder, CHOICES[1])
    assert error(block, steps) < (0.1 if isa == "amx" else 1e-4)
    check_rows_alone(decoder)
    other = read(NativeDecoder(bundles[NEURON_FORMAT], threads=3, isa=isa), CHOICES[1])[1]
    assert error(other, steps) < 1e-4


def active_neurons(bundle: Bundle, choice: FfnChoice, token_id: int) -> list[int]:
    """How many neurons of each layer that cuts gates off are not zero for a first token, by the torch engine."""
    decoder, counts = TorchDecoder(bundle, device="cpu", dtype="float32"), []
    decoder.use(choice)
    hooks = [
        resolve(decoder._layers[layer], "mlp.down_proj").register_forward_pre_hook(
            lambda _, inputs: counts.append(int((inputs[0] != 0).sum()))
        )
        for layer in CUT
    ]
    decoder.forward([token_id])
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("choice", CHOICES, ids=["dense", "pack"])
def test_only_what_is_active_counts_as_read(choice: FfnChoice, bundles: dict[str, Bundle]) -> None:
    bundle = bundles[NEURON_FORMAT]
    manifest, decoder = bundle.manifest, NativeDecoder(bundle, threads=2)
    decoder.use(choice)
    counted = token_bytes(manifest)
    cluster = choice.cluster
    ffn_bytes = counted.dense_ffn if cluster is None else manifest.clusters[cluster].ffn_bytes
    whole = decoder.bytes_per_token(0, greedy=True)
    assert whole == counted.dense - counted.dense_ffn + ffn_bytes
    widths = (manifest.model.ffn_dim,) * 3 if cluster is None else manifest.clusters[cluster].layer_budgets
    hidden = manifest.model.hidden_size
    sizes = [
        matrix_bytes("int4-rows", (widths[layer], hidden)) + matrix_bytes("int4-columns", (hidden, widths[layer]))
        for layer in CUT
    ]
    own = ffn_layer_bytes("int4", hidden, widths[1], gated=True)
    assert ffn_bytes == own + sum(sizes) + sum(matrix_bytes("int4", (widths[layer], hidden)) for layer in CUT)
    for token_id in (5, 77):
        decoder.truncate(0)
        decoder.forward([token_id])
        num_active = sum(active_neurons(bundle, choice, token_id))
        share = num_active / sum(widths[layer] for layer in CUT)
        assert 0.1 < share < 0.7
        # A gate near what is taken off may be positive in one engine alone.
        assert decoder.bytes_per_token(0, greedy=True) == pytest.approx(
            whole - (1 - share) * sum(sizes), abs=sum(sizes) / 30
        )
        assert decoder.weight_bytes(greedy=True, alone=False) == whole


def test_generations_say_what_their_tokens_read(bundles: dict[str, Bundle]) -> None:
    made = {kind: runtime.load(bundle.path, engine="native", threads=1) for kind, bundle in bundles.items()}
    options: dict[str, Any] = {"raw": True, "max_new_tokens": 8}
    for mode in ("dense", "similarity"):
        got = made[NEURON_FORMAT].generate(PROMPT, mode=mode, **options)
        read_bytes = got.bytes_read
        assert got.token_share == 1
        assert read_bytes is not None
        assert read_bytes.num_tokens == len(got.token_ids) - 1
        whole = made[NEURON_FORMAT].decoder.weight_bytes(greedy=True, alone=False)
        assert whole is not None
        assert 0 < read_bytes.mean <= read_bytes.p95 < whole
        assert made["int4"].generate(PROMPT, mode=mode, **options).bytes_read is None
    together = made[NEURON_FORMAT].generate([PROMPT, PROMPT], mode="dense", **options)
    made[NEURON_FORMAT].decoder.use(DENSE)
    whole = made[NEURON_FORMAT].decoder.weight_bytes(greedy=True, alone=False)
    assert [one.bytes_read and one.bytes_read.p95 for one in together] == [whole] * 2
    assert made[NEURON_FORMAT].generate(PROMPT, mode="lossless", **options).bytes_read is None


def test_memory_may_be_limited(bundles: dict[str, Bundle]) -> None:
    whole = NativeDecoder(bundles[NEURON_FORMAT], threads=2)
    limited = NativeDecoder(bundles[NEURON_FORMAT], threads=2, memory_bytes=40_000_000)
    for choice in CHOICES:
        for got, expected in zip(read(limited, choice), read(whole, choice), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_activations_are_seen(bundles: dict[str, Bundle]) -> None:
    """What goes into the down projection, with zeros where nothing was computed."""
    found = {}
    for kind, bundle in bundles.items():
        decoder = NativeDecoder(bundle, threads=2, isa="portable")
        found[kind] = decoder.prompt_statistics(IDS, ["output-aware"])[1]["output-aware"]
    assert error(found[NEURON_FORMAT], found["int4"]) < 0.05


def test_repairs_may_go_through_its_rounding(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    config = replace(tiny_inputs("gemma3n"), output=tmp_path / "b", quantize="int4", by_neuron=True, clusters=2)
    compile_model(replace(config, repair_rounding=True, carry=True, evaluate=False))
    bundle = open_bundle(tmp_path / "b")
    assert "layers.2.down.columns4" in bundle.pack(1)
    assert "layers.1.down.q4" in bundle.pack(1)


def test_a_model_that_cuts_no_gates_off_is_refused(
    tiny_inputs: Callable[[str], CompileConfig], bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", "gemma3n", activation_sparsity_pattern=[0.0] * 3)
    config = replace(tiny_inputs("gemma3n"), model=str(folder), output=tmp_path / "b", quantize="int4", by_neuron=True)
    with pytest.raises(ConfigError, match=r"--by-neuron: .* cuts gates off, got gelu_pytorch_tanh"):
        compile_model(config)
    manifest = bundles[NEURON_FORMAT].manifest
    settings = {**manifest.model.config, "activation_sparsity_pattern": [0.0] * 3}
    (tmp_path / "x").mkdir()
    finish_manifest(tmp_path / "x", replace(manifest, model=replace(manifest.model, config=settings)))
    with pytest.raises(
        BundleCorrupt, match="is for activation 'relu' or gates that are cut off, got 'gelu_pytorch_tanh'"
    ):
        read_manifest(tmp_path / "x")
