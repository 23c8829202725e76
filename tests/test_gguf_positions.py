"""How a GGUF file says that positions are scaled is what the model computes, or is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer.bundles.errors import ConfigError, UnsupportedModelError

from .gguf_factory import tiny_config
from .loading import load
from .test_gguf_property import FAMILIES, IDS, _model, _with, logits, save, written


def rope_of(family: str, parameters: dict[str, Any]) -> dict[str, Any]:
    parameters = {"rope_theta": 10_000.0, **parameters}
    if family in ("stablelm", "gpt_neox"):
        parameters["partial_rotary_factor"] = 0.5
    if family == "gpt_oss" and parameters.get("rope_type") == "yarn":
        parameters["truncate"] = False
    if family not in ("gemma3", "gemma3n", "olmo3"):
        return {"rope_parameters": parameters}
    # Layers of Gemma 3 and 3n that slide have a base of their own.
    theta = parameters["rope_theta"] if family == "olmo3" else 10_000.0
    sliding = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": {"full_attention": parameters, "sliding_attention": sliding}}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({"rope.freq_base": 500_000.0}, {"rope_type": "default", "rope_theta": 500_000.0}),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
    "linear": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "factor alone": ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "deprecated": ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "finetuned": ({"rope.scaling.finetuned": True}, {"rope_type": "default"}),
    "yarn": (YARN_KEYS, YARN),
    "yarn, factor": (
        {**YARN_KEYS, "rope.scaling.attn_factor": 1.25},
        {**YARN, "attention_factor": 1.25},
    ),
    "yarn, all": (
        {
            **YARN_KEYS,
            "rope.scaling.yarn_attn_factor": 1.5,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.yarn_ext_factor": 1.0,
        },
        {**YARN, "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
}


@pytest.mark.parametrize("case", ROPES)
# Phi 3 has factors of its own, and GPT-2 learned positions.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("phi3", "gpt2")])
def test_positions_are_scaled_as_stated(family: str, case: str, tmp_path: Path) -> None:
    keys, parameters = ROPES[case]
    what = written(family)
    # Those of gpt-oss are scaled.
    what.metadata = {key: value for key, value in what.metadata.items() if ".rope.scaling." not in key}
    what.metadata |= {f"{what.architecture}.rope.freq_base": 10_000.0}
    what.metadata |= {f"{what.architecture}.{key}": value for key, value in keys.items()}
    config = tiny_config(family, **rope_of(family, parameters))
    expected = logits(_with(_model(family), config))
    torch.testing.assert_close(logits(load(save(what, tmp_path)).model), expected, rtol=1e-5, atol=1e-5)
    if case not in ("none", "finetuned"):
        assert not torch.allclose(expected, logits(_with(_model(family), tiny_config(family, **rope_of(family, {})))))


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope.scaling.yarn_ext_factor", 0.5), ("rope.scaling.yarn_log_multiplier", 0.1), ("rope.scaling.alpha", 2.0)],
)
def test_what_yarn_has_beside_is_refused(key: str, value: float, tmp_path: Path) -> None:
    what = written("llama")
    what.metadata |= {f"llama.{name}": stated for name, stated in YARN_KEYS.items()} | {f"llama.{key}": value}
    with pytest.raises(UnsupportedModelError, match=rf"llama\.{key} = "):
        load(save(what, tmp_path))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_scaling_without_its_factor_is_refused(kind: str, tmp_path: Path) -> None:
    what = written("gemma3")
    what.metadata["gemma3.rope.scaling.type"] = kind
    with pytest.raises(ConfigError, match=rf"gemma3\.rope\.scaling\.factor: expected a number for {kind} scaling"):
        load(save(what, tmp_path))


def test_yarn_without_its_first_length_is_refused(tmp_path: Path) -> None:
    what = written("qwen2")
    what.metadata |= {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    with pytest.raises(ConfigError, match=r"qwen2\.rope\.scaling\.original_context_length: expected a number for yarn"):
        load(save(what, tmp_path))


def llama3_factors(parameters: dict[str, Any], head_dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What llama.cpp's converter writes for Llama 3.1: by how much each frequency is divided."""
    frequencies = 1.0 / parameters["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length = parameters["original_max_position_embeddings"]
    factors = []
    for wave in 2 * np.pi / frequencies:
        smooth = (length / wave - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if wave < length / high else factor if wave > length / low else middle)
    return np.array(factors, dtype=np.float32)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_factors_of_frequencies_are_those_of_llama_3(tmp_path: Path) -> None:
    what = written("llama")
    what.tensors["rope_freqs.weight"] = llama3_factors(LLAMA3, 8)
    assert set(what.tensors["rope_freqs.weight"]) > {1.0, 8.0}
    expected = logits(_with(_model("llama"), tiny_config("llama", rope_parameters=LLAMA3)))
    torch.testing.assert_close(logits(load(save(what, tmp_path)).model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(_model("llama")))


@pytest.mark.parametrize("factors", [[1.0, 2.0], [1.0, 0.5, 2.0, 2.0], [1.0, 1.0, 1.0, float("nan")]])
def test_factors_that_cannot_be_are_refused(factors: list[float], tmp_path: Path) -> None:
    what = written("llama")
    what.tensors["rope_freqs.weight"] = np.array(factors, dtype=np.float32)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight: expected 4 factors of at least 1"):
        load(save(what, tmp_path))


def test_factors_beside_another_scaling_are_refused(tmp_path: Path) -> None:
    what = written("llama")
    what.tensors["rope_freqs.weight"] = llama3_factors(LLAMA3, 8)
    what.metadata |= {f"llama.{key}": value for key, value in YARN_KEYS.items()}
    with pytest.raises(UnsupportedModelError, match=r"llama\.rope\.scaling\.type = 'yarn' is not supported"):
        load(save(what, tmp_path))


def test_factors_of_long_and_short_texts_are_carried_over(tmp_path: Path) -> None:
    what = written("phi3")
    factors = {"short": [1.0, 1.25], "long": [1.5, 4.0]}
    what.metadata |= {"phi3.rope.scaling.original_context_length": 16, "phi3.rope.scaling.attn_factor": 1.25}
    for name, values in factors.items():
        what.tensors[f"rope_factors_{name}.weight"] = np.array(values, dtype=np.float32)
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "factor": 16.0}
    rope |= {"attention_factor": 1.25, "original_max_position_embeddings": 16}
    rope |= {f"{name}_factor": values for name, values in factors.items()}
    config = tiny_config("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    # 30 tokens are a long text; 16 are not.
    for count in (30, 16):
        with torch.inference_mode():
            got = load(save(what, tmp_path)).model(IDS[:, :count]).logits
            assert torch.equal(got, _with(_model("phi3"), config)(IDS[:, :count]).logits)
    del what.tensors["rope_factors_short.weight"]
    with pytest.raises(
        UnsupportedModelError, match=r"rope_factors_short\.weight: expected 2 factors above 0, got none"
    ):
        load(save(what, tmp_path))
    del what.metadata["phi3.rope.scaling.original_context_length"]
    with pytest.raises(
        ConfigError, match=r"original_context_length: expected a number, as there are factors, got none"
    ):
        load(save(what, tmp_path))
