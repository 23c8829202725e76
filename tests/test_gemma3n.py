"""Gemma 3n beside what all families are tested with: other settings of its parts, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import ConfigError, open_bundle
from coreinfer.bundles.families import family_by_name
from coreinfer.compiler import compile_model
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import load_model, read_config
from coreinfer.compiler.models.sources import find_source
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.engines.torch.sparse_gate import take_sparse_gates
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from .model_factory import VOCABULARY, build_model, build_tokenizer, save_model

SLIDING, FULL = "sliding_attention", "full_attention"
IDS: list[int] = np.random.default_rng(3).integers(3, VOCABULARY, 90).tolist()
VARIANTS: dict[str, dict[str, Any]] = {
    # Both kinds of layers share, and the last that has keys and values of its own is not the last of its kind.
    "shared": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 3,
        "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
        "activation_sparsity_pattern": [0.95, 0.6, 0.0, 0.0, 0.7, 0.0],
        "intermediate_size": [96] * 6,
    },
    "apart": {
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 3,
        "altup_active_idx": 1,
        "altup_correct_scale": False,
        "activation_sparsity_pattern": [0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 20,
        "laurel_rank": 5,
        "vocab_size_per_layer_input": VOCABULARY,
    },
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tiny_bundle: Callable[..., Path], tmp_path_factory: Any) -> Any:
    """A bundle of a model with other settings, and its logits by transformers."""
    folder = save_model(tmp_path_factory.mktemp("gemma3n") / request.param, "gemma3n", **VARIANTS[request.param])
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([IDS])).logits[0]
    return tiny_bundle("gemma3n", model=str(folder), evaluate=False), expected.numpy()


def error(got: Any, expected: Any) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_parts_are_computed_as_by_transformers(variant: Any) -> None:
    path, expected = variant
    bundle = open_bundle(path)
    torch_logits = TorchDecoder(bundle, device="cpu", dtype="float32").forward(IDS, all_logits=True)
    assert error(torch_logits, expected) < 1e-3
    decoder = NativeDecoder(bundle, threads=2)
    assert error(decoder.forward(IDS, all_logits=True), expected) < 1e-2
    decoder.truncate(40)
    steps = np.concatenate([decoder.forward([token_id]) for token_id in IDS[40:]])
    assert error(steps, expected[40:]) < 1e-2
    decoder.truncate(40)
    np.testing.assert_array_equal(decoder.forward_rows([0] * len(IDS[40:]), IDS[40:]), steps)
    fork = decoder.fork_sequence(0, 50)
    decoder.select(fork)
    assert error(decoder.forward(IDS[50:], all_logits=True), expected[50:]) < 1e-2


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize("isa", _native.available_isas())
def test_kernels_compute_its_parts_alike(isa: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("gemma3n", quantize=kind))
    expected = NativeDecoder(bundle, threads=1, isa="portable").forward(IDS, all_logits=True)
    decoder = NativeDecoder(bundle, threads=2, isa=isa)
    decoder.forward(IDS[:40])
    steps = np.concatenate([decoder.forward([token_id]) for token_id in IDS[40:]])
    assert error(steps, expected[40:]) < (0.05 if kind == "int4" else 2e-3)


def test_layers_that_share_keys_have_none_in_the_cache(tiny_bundle: Callable[..., Path], variant: Any) -> None:
    manifest = open_bundle(variant[0]).manifest
    config = manifest.model.config
    num_own = manifest.model.num_layers - config["num_kv_shared_layers"]
    names = [name for name in manifest.base_tensors if "k_proj" in name or "v_proj" in name]
    assert len({name.split(".")[2] for name in names}) == num_own
    decoder = NativeDecoder(open_bundle(variant[0]), threads=1)
    # Keys of 8 numbers, values padded to 16, 2 heads, fp16, pages of 64 tokens.
    assert decoder.page_bytes == 64 * num_own * 2 * (8 + 16) * 2


def test_with_little_memory_the_answers_are_the_same(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("gemma3n", quantize="int4"))
    expected = NativeDecoder(bundle, threads=2)
    limited = NativeDecoder(bundle, threads=2, memory_bytes=30_000_000)
    for choice in (FfnChoice(cluster=0), FfnChoice(cluster=1)):
        for decoder in (expected, limited):
            decoder.truncate(0)
            decoder.use(choice)
        np.testing.assert_array_equal(limited.forward(IDS[:30]), expected.forward(IDS[:30]))
        np.testing.assert_array_equal(limited.forward(IDS[30:31]), expected.forward(IDS[30:31]))


def test_a_neuron_does_not_depend_on_which_others_there_are() -> None:
    model = build_model("gemma3n")
    take_sparse_gates(model, family_by_name("gemma3n"))
    ffn: Any = model.get_submodule("model.layers.0.mlp")
    hidden, neurons = torch.randn((5, 32), generator=torch.Generator().manual_seed(0)), []
    ffn.down_proj.register_forward_pre_hook(lambda _, inputs: neurons.append(inputs[0]))
    with torch.inference_mode():
        ffn(hidden)
        kept = torch.arange(0, 96, 3)
        for module in (ffn.gate_proj, ffn.up_proj):
            module.weight = torch.nn.Parameter(module.weight[kept])
        ffn.down_proj.weight = torch.nn.Parameter(ffn.down_proj.weight[:, kept])
        ffn(hidden)
    # More than a half of them are zero, and others not.
    assert 0.5 < float((neurons[0] == 0).float().mean()) < 0.7
    torch.testing.assert_close(neurons[1], neurons[0][:, kept])


def test_keys_that_published_files_have_of_sharing_layers_are_passed_over(tmp_path: Path) -> None:
    model = build_model("gemma3n")
    tensors = {name.replace("model.", "model.language_model.", 1): value for name, value in model.state_dict().items()}
    tensors.pop("lm_head.weight")
    tensors["model.language_model.layers.2.self_attn.k_proj.weight"] = torch.zeros(16, 32)
    tensors["model.vision_tower.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "gemma3n", "text_config": model.config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    build_tokenizer().save_pretrained(tmp_path)
    source = find_source(str(tmp_path))
    family, found = read_config(source)
    loaded = load_model(source, family, found, device="cpu", dtype="float32")
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"token_share": 0.5}, "is a gemma3n, for which some options do not apply: --token-share"),
        ({"max_memory": 4.0, "heal_steps": 0}, "is a gemma3n, for which some options do not apply: --max-memory"),
    ],
    ids=["token-share", "max-memory"],
)
def test_options_that_do_not_apply_are_named(
    options: dict[str, Any], expected: str, tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        compile_model(replace(tiny_inputs("gemma3n"), output=tmp_path / "bundle", **options))


def test_recorded_steps_are_refused(tiny_bundle: Callable[..., Path]) -> None:
    bundle = tiny_bundle("gemma3n")
    with pytest.raises(ConfigError, match="layers attend to keys and values of others"):
        runtime.load(bundle, engine="torch", device="cpu", gpu_memory_mb=100, cuda_graphs="on")
