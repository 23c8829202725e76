"""Whatever a GGUF file says is what the model computes, or is refused by name.

Every family that has an architecture in GGUF is written both ways. OPT has none: llama.cpp does not read it.
"""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from coreinfer.bundles.errors import ConfigError, CoreInferError, UnsupportedModelError
from coreinfer.compiler.models.gguf.config import config_fields
from coreinfer.compiler.models.gguf.names import layout_of
from coreinfer.compiler.models.gguf.parts import read_parts
from transformers import PreTrainedModel

from .gguf_experts import MIXTURE_SHAPES
from .gguf_factory import EPSILONS, Contents, contents, tiny_config, tiny_model, write
from .loading import load
from .model_factory import build_tokenizer

FAMILIES = (
    *("llama", "mistral", "smollm3", "granite", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3n", "olmo2", "olmo3"),
    *("phi3", "stablelm", "starcoder2", "gpt_neox", "gpt2"),
    *MIXTURE_SHAPES,
)
# Mistral and OLMo 3 are Llama and OLMo 2 with a window, and of their architectures.
ARCHITECTURES = tuple(family for family in FAMILIES if family not in ("mistral", "olmo3"))
IDS = torch.arange(3, 33)[None]
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


@lru_cache(maxsize=16)
def _model(family: str) -> PreTrainedModel:
    return tiny_model(tiny_config(family))


@lru_cache(maxsize=16)
def _contents(family: str) -> Contents:
    return contents(_model(family))


def written(family: str) -> Contents:
    """What the family's file is to hold; the caller may change it."""
    return deepcopy(_contents(family))


def save(what: Contents, folder: Path) -> Path:
    return write(folder / "model.gguf", what)[0]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_halves_are_the_model_exactly(family: str, parts: int, tmp_path: Path) -> None:
    model = _model(family)
    model.save_pretrained(tmp_path / "safetensors")
    build_tokenizer().save_pretrained(tmp_path / "safetensors")
    reference = load(tmp_path / "safetensors")
    for part in write(tmp_path / "model.gguf", written(family), parts=parts):
        loaded = load(part)
        assert torch.equal(logits(loaded.model), logits(reference.model))
        assert loaded.family == reference.family
        assert loaded.tokenizer("The soup of 12").input_ids == build_tokenizer()("The soup of 12").input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_tensors_are_what_they_unpack_to(family: str, tmp_path: Path) -> None:
    model = deepcopy(_model(family))
    loaded = load(save(contents(model, Q8_0), tmp_path))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            exact = name.endswith((".gate.weight", ".router.weight", "_bias", "_coefs.weight"))
            if parameter.ndim > 1 and not exact:
                # Blocks lie within rows, so that their order does not matter; some have columns for rows.
                is_turned = (family, True) in (("gpt2", ".h." in name), ("gpt_oss", ".experts." in name))
                parameter.copy_(_rounded(parameter.mT).mT if is_turned else _rounded(parameter))
    check_equal(loaded.model, model)
    assert not torch.allclose(logits(loaded.model), logits(_model(family)), atol=1e-3)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    blocks = gguf.quants.quantize(np.ascontiguousarray(values.numpy()), Q8_0)
    return torch.from_numpy(gguf.quants.dequantize(blocks, Q8_0))


def check_equal(loaded: Any, expected: Any) -> None:
    """Compare logits to the bit; GPTs' linear modules, and experts, are multiplied otherwise where taken apart.

    Of Gemma 3n's gates another sum is taken off.
    """
    tolerance = 1e-4 if expected.config.model_type in ("gpt_neox", "gpt2", "gemma3n_text", *MIXTURE_SHAPES) else 0.0
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=tolerance, atol=tolerance)


# A layer's tensors are read as those of the layer before it.
TENSORS = [
    (family, tensor)
    for family in ARCHITECTURES
    for tensor in _contents(family).tensors
    # Those of keys and values that nobody reads are not needed.
    if not tensor.startswith(("blk.1.", "blk.2.attn_k", "blk.3.attn_k", "blk.2.attn_v", "blk.3.attn_v"))
]


@pytest.mark.parametrize(("family", "tensor"), TENSORS)
def test_each_tensor_is_needed_in_its_shape(family: str, tensor: str, tmp_path: Path) -> None:
    what = written(family)
    values = what.tensors[tensor]
    what.tensors[tensor] = np.concatenate([values, values])
    with pytest.raises(CoreInferError, match=rf"of another shape .*\b{tensor} is"):
        load(save(what, tmp_path))
    what.tensors[f"blk.0.renamed.{tensor}"] = values
    del what.tensors[tensor]
    # A file without a head of its own has the embedding for one: the format has no other sign of that.
    missing = "" if tensor == "output.weight" else rf"missing {tensor}; "
    with pytest.raises(ConfigError, match=rf": {missing}left over blk\.0\.renamed\.{tensor}; download") as caught:
        load(save(what, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_missing_layer_contradicts_the_header(tmp_path: Path) -> None:
    what = written("llama")
    what.tensors = {name: values for name, values in what.tensors.items() if not name.startswith("blk.1.")}
    with pytest.raises(ConfigError, match=r"llama\.block_count: it says 2 layers, the tensors are of layers 0$"):
        load(save(what, tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tensor", ["blk.0.attn_q.bias", "blk.1.attn_rot_embd.weight", "rope_factors_long.weight"])
def test_tensors_that_the_model_lacks_are_named(family: str, tensor: str, tmp_path: Path) -> None:
    what = written(family)
    if tensor in what.tensors or tensor in layout_of(what.architecture, has_experts=family in MIXTURE_SHAPES).factors:
        pytest.skip("the family has it")
    what.tensors[tensor] = np.ones(32, dtype=np.float32)
    with pytest.raises(ConfigError, match=rf"left over {tensor}"):
        load(save(what, tmp_path))


def test_biases_of_all_projections_are_carried_over(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama", attention_bias=True, mlp_bias=True))
    assert torch.equal(logits(load(save(contents(model), tmp_path)).model), logits(model))


KEYS = [
    (family, key)
    for family in FAMILIES
    for key in _contents(family).metadata
    if key.startswith(f"{_contents(family).architecture}.")
]
# Another key, or the tensors, say otherwise.
CONTRADICTED = (
    r"of another shape|(key|value)_length = 8 is not|sliding_window_pattern = \[True, False\], which is not"
    # Experts of another number, or some without a number.
    r"|expert_used_count: expected|expert_used_count = 2, which is not carried over|expert_count: expected"
)
# Without them a file still says what it is; with other families the key has to be there.
DEFAULTS: dict[str, dict[str, Any]] = {
    # Worked out from the tensors' shapes and the vocabulary, which say the same here.
    "vocab_size": {},
    "attention.value_length": {},
    "rope.dimension_count": {},
    # In these families heads are as wide as the hidden size says.
    **{f"{family}.attention.key_length": {} for family in ("phi3", "stablelm", "starcoder2", "olmoe")},
    # Counts where there are factors.
    "phi3.rope.scaling.original_context_length": {},
    # As llama.cpp has it; the tiny models' own.
    **{f"{family}.rope.freq_base": {} for family in ("phi3", "stablelm", "starcoder2")},
    "llama.rope.freq_base": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    **{
        f"{family}.rope.freq_base": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
        for family in ("granite", "granitemoe", "olmoe")
    },
    "gemma2.rope.freq_base": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    **{f"{family}.attention.scale": {"attention_multiplier": 8**-0.5} for family in ("granite", "granitemoe")},
    **{f"{family}.embedding_scale": {"embedding_multiplier": 1.0} for family in ("granite", "granitemoe")},
    **{f"{family}.residual_scale": {"residual_multiplier": 1.0} for family in ("granite", "granitemoe")},
    # A file without a window has none.
    "llama.attention.sliding_window": {"sliding_window": None},
    "phi3.attention.sliding_window": {"sliding_window": None},
    "gemma3.attention.sliding_window_pattern": {"layer_types": ["sliding_attention"] * 2},
    "gemma3n.attention.sliding_window_pattern": {"layer_types": ["sliding_attention"] * 4},
    "gemma3n.final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "olmo2.attention.sliding_window_pattern": {"layer_types": ["sliding_attention"] * 2},
    # As factors were before there were kinds.
    "gpt-oss.rope.scaling.type": {"rope_parameters": {"rope_theta": 10780.0, "rope_type": "linear", "factor": 4.0}},
    # But for Gemma 2's own.
    "gemma2.attention.sliding_window": {"sliding_window": 4096},
    "gemma2.attn_logit_softcapping": {"attn_logit_softcapping": 50.0},
    "gemma2.final_logit_softcapping": {"final_logit_softcapping": 30.0},
}


@pytest.mark.parametrize(("family", "key"), KEYS)
def test_no_size_is_assumed(family: str, key: str, tmp_path: Path) -> None:
    what = written(family)
    del what.metadata[key]
    path = save(what, tmp_path)
    default = DEFAULTS.get(key, DEFAULTS.get(key.partition(".")[2]))
    if key in tuple(f"{name}.rope.dimension_count" for name in ("phi3", "stablelm", "gptneox")):
        # There it says more than the shapes.
        default = None
    if default is None:
        with pytest.raises(
            CoreInferError, match=rf"{key}: expected a (size|number|flag)( for .*)?, got|{CONTRADICTED}"
        ):
            load(path)
        return
    expected = deepcopy(_model(family).config)
    for field, value in default.items():
        setattr(expected, field, value)
    check_equal(load(path).model, _with(_model(family), expected))


def _with(model: PreTrainedModel, config: transformers.PreTrainedConfig) -> PreTrainedModel:
    """The same weights in a model of another config."""
    built: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    built.load_state_dict(model.state_dict())
    built.eval()
    return built


CHANGES: list[tuple[str, Any]] = [
    ("block_count", 3),
    ("embedding_length", 32),
    ("feed_forward_length", 64),
    ("feed_forward_length", [96, 64]),
    ("attention.head_count", 2),
    ("attention.head_count_kv", 4),
    ("attention.key_length", 16),
    ("attention.value_length", 16),
    ("rope.dimension_count", 4),
    ("vocab_size", 400),
    ("vocab_size", 100),
    ("attention.causal", False),
    ("attention.scale", 0.5),
    ("attention.clamp_kqv", 8.0),
    ("attention.max_alibi_bias", 8.0),
    ("attn_logit_softcapping", 50.0),
    ("logit_scale", 0.5),
    ("residual_scale", 0.5),
    ("embedding_scale", 12.0),
    ("expert_count", 8),
    ("expert_used_count", 2),
    ("use_parallel_residual", True),
    ("rope.dimension_sections", [1, 1, 2, 0]),
    ("rope.scaling.type", "longrope"),
    ("rope.scaling.attn_factor", 1.2),
    ("rope.scaling.yarn_log_multiplier", 0.1),
    ("something.new", 1),
]


CARRIED_OVER = {
    "granite": ("attention.scale", "embedding_scale", "logit_scale", "residual_scale"),
    "gemma2": ("attn_logit_softcapping",),
    # Half of a head, as it is.
    "phi3": ("rope.dimension_count",),
    "stablelm": ("rope.dimension_count", "use_parallel_residual"),
    # The shapes of their tensors do not depend on it.
    "gpt_neox": ("rope.dimension_count", "use_parallel_residual", "attention.head_count"),
    "gpt2": ("attention.head_count",),
    "mixtral": ("expert_used_count",),
    # No layer has an FFN of that width.
    "qwen3_moe": ("expert_used_count", "feed_forward_length"),
    "olmoe": ("expert_used_count",),
    "gpt_oss": ("expert_used_count", "feed_forward_length", "rope.scaling.attn_factor"),
    "granitemoe": ("expert_used_count", "attention.scale", "embedding_scale", "logit_scale", "residual_scale"),
}


@pytest.mark.parametrize(("key", "value"), CHANGES, ids=str)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_is_not_carried_over_is_refused(family: str, key: str, value: Any, tmp_path: Path) -> None:
    what = written(family)
    what.metadata[f"{what.architecture}.{key}"] = value
    if key in CARRIED_OVER.get(family, ()) and not isinstance(value, list):
        assert config_fields(read_parts(save(what, tmp_path)), family)
        return
    with pytest.raises(CoreInferError, match=rf"{what.architecture}\.{key}|missing|{CONTRADICTED}") as caught:
        load(save(what, tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_of_unknown_layers_is_refused(family: str, tmp_path: Path) -> None:
    what = written(family)
    what.metadata[f"{family}.attention.sliding_window"] = 8
    with pytest.raises(UnsupportedModelError, match=rf"{family}\.attention\.sliding_window = 8 is not supported"):
        load(save(what, tmp_path))


@pytest.mark.parametrize(
    ("family", "keys", "changes"),
    [
        ("granite", {"attention.scale": 0.5}, {"attention_multiplier": 0.5}),
        ("granite", {"embedding_scale": 2.0}, {"embedding_multiplier": 2.0}),
        ("granite", {"logit_scale": 4.0}, {"logits_scaling": 4.0}),
        ("granite", {"residual_scale": 0.75}, {"residual_multiplier": 0.75}),
        (
            "granitemoe",
            {"logit_scale": 4.0, "embedding_scale": 2.0},
            {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
        ),
        ("mixtral", {"expert_used_count": 3}, {"num_experts_per_tok": 3}),
        ("mixtral", {"attention.sliding_window": 0}, {"sliding_window": None}),
        ("olmoe", {"expert_used_count": 1, "expert_weights_norm": False}, {"num_experts_per_tok": 1}),
        ("qwen3_moe", {"expert_used_count": 6, "expert_gating_func": 1}, {"num_experts_per_tok": 6}),
        ("gemma2", {"attn_logit_softcapping": 0.5}, {"attn_logit_softcapping": 0.5}),
        ("gemma2", {"attn_logit_softcapping": 0.0}, {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": 0.0}, {"final_logit_softcapping": None}),
        ("gemma2", {"attention.sliding_window": 8}, {"sliding_window": 8}),
        ("olmo3", {"attention.sliding_window_pattern": 1}, {"layer_types": ["full_attention"] * 2}),
        ("olmo3", {"attention.sliding_window": 8}, {"sliding_window": 8}),
        ("gemma3", {"final_logit_softcapping": 0.5}, {"final_logit_softcapping": 0.5}),
        ("gemma3", {"attention.sliding_window": 8}, {"sliding_window": 8}),
        (
            "gemma3",
            {"attention.sliding_window_pattern": [False, True]},
            {"layer_types": ["full_attention", "sliding_attention"]},
        ),
        ("gemma3", {"attention.sliding_window_pattern": 2}, {"layer_types": ["sliding_attention", "full_attention"]}),
        ("gemma3", {"attention.layer_norm_rms_epsilon": 0.5}, {"rms_norm_eps": 0.5}),
        ("gemma3n", {"final_logit_softcapping": 0.5}, {"final_logit_softcapping": 0.5}),
        ("gemma3n", {"attention.sliding_window": 8}, {"sliding_window": 8}),
        ("gemma3n", {"altup.active_idx": 0}, {"altup_active_idx": 0}),
        (
            "gemma3n",
            {"activation_sparsity_scale": [-np.inf, 0.6744897, 1.2815515, 0.1]},
            {"activation_sparsity_pattern": [0.0, 0.75, 0.9, 0.539828]},
        ),
        ("gpt_neox", {"use_parallel_residual": False}, {"use_parallel_residual": False}),
        # Blocks with two norms are not parallel in llama.cpp, whatever the key says.
        ("stablelm", {"use_parallel_residual": True}, {}),
        ("gpt2", {"attention.head_count_kv": 8, "vocab_size": 384}, {}),
        (
            "gemma3",
            {"rope.freq_base_swa": 50.0},
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                }
            },
        ),
    ],
    ids=str,
)
def test_families_follow_their_keys(family: str, keys: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    what = written(family)
    what.metadata |= {f"{what.architecture}.{key}": value for key, value in keys.items()}
    check_equal(load(save(what, tmp_path)).model, _with(_model(family), tiny_config(family, **changes)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_epsilon_of_norms_is_carried_over(family: str, tmp_path: Path) -> None:
    what = written(family)
    field = EPSILONS.get(what.architecture, "rms_norm_eps")
    kind = "layer_norm_rms_epsilon" if field == "rms_norm_eps" else "layer_norm_epsilon"
    what.metadata[f"{what.architecture}.attention.{kind}"] = 0.25
    check_equal(load(save(what, tmp_path)).model, _with(_model(family), tiny_config(family, **{field: 0.25})))


def test_granite_without_rotary_embeddings_is_refused(tmp_path: Path) -> None:
    what = written("granite")
    what.metadata["granite.rope.scaling.finetuned"] = False
    with pytest.raises(UnsupportedModelError, match=r"granite\.rope\.scaling\.finetuned = False is not supported"):
        load(save(what, tmp_path))


@pytest.mark.parametrize("stated", ["opt", "mixtral", "llama4", "qwen2moe", "", None])
def test_other_architectures_are_refused(stated: str | None, tmp_path: Path) -> None:
    what = written("llama")
    what.architecture = stated or ""
    with pytest.raises(UnsupportedModelError, match=r"architecture.* is not supported in GGUF; supported: llama, "):
        load(save(what, tmp_path))
