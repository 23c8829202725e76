"""Settings of config.json: what the arithmetic depends on is computed as transformers does, or refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer.bundles import UnsupportedModelError, open_bundle
from coreinfer.bundles.families import family_of_config
from coreinfer.compiler.models.load import load_model, read_config
from coreinfer.compiler.models.sources import find_source
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from .model_factory import FAMILIES, MIXTURES, save_model
from .test_checkpoint import change_json

IDS = torch.arange(5, 45)[None]
THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, **THETA}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    **THETA,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
    "partial_rotary_factor": 0.5,
    **THETA,
}
SLIDING, FULL = "sliding_attention", "full_attention"

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"rope_parameters": {**THETA, "rope_type": "spiral"}}, "rope_type 'spiral'"),
    ("gemma3", {"rope_parameters": {SLIDING: {**THETA, "rope_type": "spiral"}, FULL: THETA}}, "rope_type 'spiral'"),
    ("llama", {"hidden_act": "sine"}, "hidden_act 'sine'"),
    ("opt", {"activation_function": "sine"}, "activation_function 'sine'"),
    ("gemma3", {"hidden_activation": "sine"}, "hidden_activation 'sine'"),
    ("llama", {"sliding_window": 8}, "sliding_window 8, which llama models do not compute with"),
    ("llama", {"layer_types": [FULL, SLIDING, FULL]}, "layer_types full_attention, sliding_attention, where all"),
    ("qwen2", {"layer_types": [FULL, SLIDING, FULL]}, "layer_types with sliding_attention, and no sliding_window"),
    ("llama", {"attention_multiplier": 0.0156}, "attention_multiplier 0.0156"),
    ("llama", {"residual_multiplier": 0.22}, "residual_multiplier 0.22"),
    ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
    ("qwen3", {"logits_scaling": 8.0}, "logits_scaling 8.0"),
    ("llama", {"logit_scale": 0.0625}, "logit_scale 0.0625"),
    ("qwen2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0, which qwen2 models do not"),
    ("qwen2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
    ("llama", {"do_layer_norm_before": False}, "do_layer_norm_before False"),
    ("llama", {"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
    ("granite", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64, which granite models do not compute with"),
    ("olmo2", {"sliding_window": 8}, "sliding_window 8, which olmo2 models do not compute with"),
    ("olmo3", {"sliding_window": None}, "layer_types with sliding_attention, and no sliding_window"),
    ("smollm3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0, which smollm3 models do not"),
    ("starcoder2", {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ("gemma3n", {"intermediate_size": [96, 64, 96]}, "intermediate_size 64, 96, where all layers"),
    ("gemma3n", {"activation_sparsity_pattern": [0.3, 0.0, 0.9]}, "activation_sparsity_pattern 0.3, where layers"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0, which transformers does not compute"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers [1], layers without experts among those with"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2, layers without experts among those with"),
    ("gpt_oss", {"swiglu_limit": -1.0}, "swiglu_limit -1.0, expected above 0"),
    ("mixtral", {"swiglu_limit": 7.0}, "swiglu_limit 7.0, which mixtral models do not compute with"),
    ("gpt_oss", {"sliding_window": None}, "layer_types with sliding_attention, and no sliding_window"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act 'gelu', where gpt_oss models compute clamped_swiglu"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention true, which reads what another model puts out"),
    ("gpt2", {"use_parallel_residual": True}, "use_parallel_residual True, which gpt2 models do not compute with"),
]

COMPUTED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}}),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0}),
    ("llama", {"rope_parameters": {"rope_theta": 500.0}}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rms_norm_eps": 0.5}),
    ("llama", {"hidden_act": "relu"}),
    ("llama", {"hidden_act": "mish"}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 5}),
    ("qwen2", {"layer_types": None, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3", {"layer_types": [SLIDING, FULL, FULL], "use_sliding_window": True, "sliding_window": 8}),
    ("qwen3", {"rms_norm_eps": 0.5}),
    ("gemma3", {"layer_types": [FULL, SLIDING, FULL]}),
    ("gemma3", {"sliding_window": 7}),
    ("gemma3", {"query_pre_attn_scalar": 64}),
    ("gemma3", {"final_logit_softcapping": 2.0}),
    ("gemma3", {"hidden_activation": "silu"}),
    ("gemma3", {"rope_parameters": {SLIDING: THETA, FULL: {"rope_type": "linear", "factor": 8.0, **THETA}}}),
    ("gemma3n", {"altup_active_idx": 2}),
    ("gemma3n", {"altup_correct_scale": False}),
    ("gemma3n", {"final_logit_softcapping": 2.0}),
    ("gemma3n", {"hidden_activation": "silu"}),
    ("gemma3n", {"layer_types": [FULL, SLIDING, FULL]}),
    ("gemma3n", {"rms_norm_eps": 0.5}),
    ("gemma3n", {"sliding_window": 7}),
    ("opt", {"activation_function": "gelu"}),
    ("ministral", {"layer_types": [FULL, SLIDING, FULL]}),
    ("smollm3", {"no_rope_layers": [0, 1, 1]}),
    ("smollm3", {"layer_types": [FULL, SLIDING, FULL], "use_sliding_window": True, "sliding_window": 8}),
    ("granite", {"attention_multiplier": 0.5}),
    ("granite", {"embedding_multiplier": 2.0}),
    ("granite", {"logits_scaling": 8.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"attn_logit_softcapping": 2.0}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 64}),
    ("gemma2", {"layer_types": [FULL, FULL, SLIDING]}),
    ("olmo2", {"rope_parameters": YARN}),
    ("olmo3", {"layer_types": [FULL, SLIDING, FULL]}),
    ("olmo3", {"rope_parameters": {SLIDING: THETA, FULL: YARN}}),
    ("phi3", {"rope_parameters": {**THETA, "partial_rotary_factor": 0.25}}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    ("phi3", {"rope_parameters": {**LONGROPE, "attention_factor": 1.25}, "original_max_position_embeddings": 128}),
    ("phi3", {"sliding_window": None}),
    ("stablelm", {"rope_parameters": {**THETA, "partial_rotary_factor": 0.25}}),
    ("stablelm", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
    ("stablelm", {"layer_norm_eps": 0.5}),
    ("starcoder2", {"norm_epsilon": 0.5}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"layer_norm_eps": 0.5}),
    ("gpt_neox", {"hidden_act": "gelu_fast"}),
    ("gpt_neox", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.25}}),
    ("gpt2", {"layer_norm_epsilon": 0.5}),
    ("gpt2", {"activation_function": "relu"}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False}),
    ("starcoder2", {"sliding_window": None}),
    ("mixtral", {"sliding_window": None}),
    ("qwen3_moe", {"use_sliding_window": False}),
    ("olmoe", {"clip_qkv": 0.5}),
    ("granitemoe", {"residual_multiplier": 1.0}),
    ("gpt_oss", {"layer_types": [FULL, SLIDING, FULL]}),
    ("gpt_oss", {"sliding_window": 7}),
    ("gpt_oss", {"swiglu_alpha": 1.0}),
    ("gpt_oss", {"swiglu_limit": 0.4}),
    ("gpt_oss", {"rope_parameters": YARN}),
    ("gpt_oss", {"rope_parameters": THETA}),
]
"""Each of these changes what transformers computes."""

HARMLESS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_interleaved": False, "is_llama_config": True, "pretraining_tp": 1, "sliding_window": None}),
    ("llama", {"attention_multiplier": None, "logits_scaling": 1.0, "layer_types": [FULL] * 3, "use_qk_norm": False}),
    ("qwen2", {"use_mrope": False, "sliding_window": 4096, "max_window_layers": 1}),
    ("gemma3", {"final_logit_softcapping": None, "attn_logit_softcapping": None, "cache_implementation": "hybrid"}),
    ("gemma3n", {"query_pre_attn_scalar": 256, "altup_coef_clip": 5.0}),
    ("opt", {"prefix": "</s>", "rope_theta": 10000.0}),
    ("gpt_oss", {"experts_per_token": 2, "initial_context_length": 4096, "router_aux_loss_coef": 0.5}),
]


def named(cases: list[Any]) -> list[Any]:
    return [pytest.param(*case, id=f"{case[0]}-{'-'.join(case[1])}") for case in cases]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function (family, **settings) that gives the folder of a tiny model with other settings, good for one use."""
    folder = tmp_path_factory.mktemp("settings")
    configs: dict[str, str] = {}

    def save(family: str, **settings: Any) -> Path:
        path = folder / family / "config.json"
        if family not in configs:
            save_model(folder / family, family)
            configs[family] = path.read_text(encoding="utf-8")
        path.write_text(configs[family], encoding="utf-8")
        change_json(path, **settings)
        return folder / family

    return save


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize(("family", "settings", "expected"), named(REFUSED))
def test_what_nobody_honours_is_refused_by_name(
    family: str, settings: dict[str, Any], expected: str, saved: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read_config(find_source(str(saved(family, **settings))))
    assert f"--model {family}: config.json has {expected}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_such_settings_are_named_at_once(saved: Callable[..., Path]) -> None:
    folder = saved("llama", logit_scale=2.0, scale_emb=12.0)
    with pytest.raises(UnsupportedModelError, match=r"2 problems: .*logit_scale 2\.0.*scale_emb 12\.0"):
        read_config(find_source(str(folder)))


@pytest.mark.parametrize(("family", "settings"), named(COMPUTED + HARMLESS))
def test_a_model_is_loaded_as_transformers_computes_it(
    family: str, settings: dict[str, Any], saved: Callable[..., Path]
) -> None:
    plain = logits(AutoModelForCausalLM.from_pretrained(saved(family)))
    folder = saved(family, **settings)
    source = find_source(str(folder))
    row, config = read_config(source)
    loaded = load_model(source, row, config, device="cpu", dtype="float32")
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(expected, plain) == ((family, settings) in HARMLESS)
    # transformers adds the outputs of experts in an order of its own, and compares gates that gemma3n cuts off.
    tolerance = 1e-4 if family in MIXTURES or family == "gemma3n" else 0.0
    torch.testing.assert_close(logits(loaded.model), expected, rtol=tolerance, atol=tolerance)
    with torch.inference_mode():
        states = loaded.states(IDS, DynamicCache(config=config))
        torch.testing.assert_close(loaded.head(states), expected)


NATIVE_REFUSES = {"mish", "clip_qkv", "scale_attn_by_inverse_layer_idx", "scale_attn_weights"}


def as_saved(folder: Path) -> dict[str, Any]:
    """A config as a compile puts it into the manifest."""
    config: dict[str, Any] = json.loads(json.dumps(AutoConfig.from_pretrained(folder).to_dict(), default=str))
    return {key: value for key, value in config.items() if key != "transformers_version"}


@pytest.mark.parametrize(("family", "settings"), named(COMPUTED + HARMLESS))
def test_engines_compute_a_setting_alike_or_the_native_one_refuses_it(
    family: str, settings: dict[str, Any], saved: Callable[..., Path], tiny_bundle: Callable[..., Path]
) -> None:
    bundle = open_bundle(tiny_bundle(family))
    config = as_saved(saved(family, **settings))
    row = family_of_config(config, family)
    activation = row.activation or config[row.activation_field]
    record = replace(bundle.manifest.model, config=config, activation=activation)
    record = replace(
        record, max_positions=min(record.max_positions, config.get("original_max_position_embeddings", 256))
    )
    bundle = replace(bundle, manifest=replace(bundle.manifest, model=record))
    ids = IDS[0].tolist()
    expected = TorchDecoder(bundle, device="cpu", dtype="float32").forward(ids, all_logits=True)
    if (refused := NATIVE_REFUSES.intersection(str(settings).split("'"))) and (family, settings) in COMPUTED:
        with pytest.raises(UnsupportedModelError, match=refused.pop()):
            NativeDecoder(bundle, threads=1)
        return
    got = NativeDecoder(bundle, threads=1).forward(ids, all_logits=True)
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.02 * np.abs(expected).max())


PARALLEL: list[tuple[str, dict[str, Any]]] = [
    # One norm for attention and FFN.
    ("stablelm", {"use_parallel_residual": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
]


@pytest.mark.parametrize(("family", "settings"), named(PARALLEL))
@pytest.mark.parametrize("quantize", ["bf16", "int4"])
def test_models_whose_blocks_are_the_other_way(
    family: str, settings: dict[str, Any], quantize: str, tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    model = save_model(tmp_path, family, **settings)
    bundle = open_bundle(tiny_bundle(family, model=str(model), quantize=quantize, evaluate=False))
    ids = IDS[0].tolist()
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    expected = torch_decoder.forward(ids, all_logits=True)
    if quantize == "bf16":
        reference = logits(AutoModelForCausalLM.from_pretrained(model))[0].numpy()
        np.testing.assert_allclose(expected, reference, rtol=1e-4, atol=2e-4)
    for choice in (DENSE, FfnChoice(cluster=1)):
        decoder = NativeDecoder(bundle, threads=2)
        for each in (decoder, torch_decoder):
            each.truncate(0)
            each.use(choice)
        expected = torch_decoder.forward(ids, all_logits=True)
        got = decoder.forward(ids, all_logits=True)
        decoder.truncate(30)
        steps = np.concatenate([decoder.forward([token_id]) for token_id in ids[30:]])
        for found, wanted in ((got, expected), (steps, expected[30:])):
            # With int4 activations are rounded to int8.
            error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            assert error < (0.15 if quantize == "int4" else 0.01)
        decoder.truncate(30)
        np.testing.assert_array_equal(decoder.forward_rows([0] * len(ids[30:]), ids[30:]), steps)


def test_rotary_factors_of_their_own_bound_the_texts(
    saved: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A text's first keys stay as they were rotated, so that it cannot change its factors on the way."""
    source = find_source(str(saved("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=128)))
    row, config = read_config(source)
    assert load_model(source, row, config, device="cpu", dtype="float32").record.max_positions == 128
    assert "rotary factors of their own for texts beyond 128 tokens" in caplog.text


def test_the_native_engine_names_what_it_does_not_compute(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("stablelm"))
    record = bundle.manifest.model
    record = replace(record, config={**record.config, "qk_layernorm": True})
    with pytest.raises(UnsupportedModelError, match="the native engine has no qk_layernorm"):
        NativeDecoder(replace(bundle, manifest=replace(bundle.manifest, model=record)), threads=1)


FOREIGN: dict[str, Any] = {
    "query_pre_attn_scalar": 3,
    "sliding_window": 4,
    "layer_types": [SLIDING] * 3,
    "do_layer_norm_before": False,
    "word_embed_proj_dim": 16,
    "rope_parameters": {"rope_theta": 3.0},
    "rms_norm_eps": 0.5,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_engine_reads_no_setting_that_transformers_leaves_alone(
    family: str, tiny_bundle: Callable[..., Path]
) -> None:
    """Of bundles that an earlier compiler wrote: this one refuses such models."""
    bundle = open_bundle(tiny_bundle(family))
    record = bundle.manifest.model
    foreign = {key: value for key, value in FOREIGN.items() if key not in record.config}
    assert len(foreign) >= 2
    changed = replace(bundle, manifest=replace(bundle.manifest, model=replace(record, config=record.config | foreign)))
    ids = IDS[0].tolist()
    expected, got = (NativeDecoder(each, threads=1).forward(ids, all_logits=True) for each in (bundle, changed))
    np.testing.assert_array_equal(got, expected)
