"""Folders that are quantized already and contradict themselves: one line says what is wrong with them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coreinfer.bundles import ConfigError, UnsupportedModelError
from safetensors.torch import load_file, save_file

from .loading import load
from .model_factory import save_model
from .quantized_factory import CASES, WEIGHTS, Weights
from .quantized_folders import MODULE, change_settings, change_weights, refusal

# Tensors


@pytest.mark.parametrize("case", CASES)
def test_any_part_that_is_missing_or_renamed_is_named(case: str, quantized_copy: Callable[[str], Path]) -> None:
    folder = quantized_copy(case)
    weights = load_file(folder / WEIGHTS)
    parts = [name for name in weights if name.startswith(f"{MODULE}.")]
    needed = [name for name in parts if name.removeprefix(f"{MODULE}.") not in CASES[case].optional]
    assert len(needed) > 1
    for name in needed:
        others = {other: kept for other, kept in weights.items() if other != name}
        save_file(others, folder / WEIGHTS, metadata={"format": "pt"})
        assert f": missing {name}; give" in refusal(folder)
        save_file({**others, f"{name}_old": weights[name]}, folder / WEIGHTS, metadata={"format": "pt"})
        assert f": missing {name}; left over {name}_old; give" in refusal(folder)


@pytest.mark.parametrize("case", CASES)
def test_a_weight_with_all_its_parts_missing_is_named(case: str, quantized_copy: Callable[[str], Path]) -> None:
    folder = quantized_copy(case)
    change_weights(folder, lambda weights: [weights.pop(name) for name in list(weights) if name.startswith(MODULE)])
    assert f": missing {MODULE}.weight; give" in refusal(folder)


@pytest.mark.parametrize("case", CASES)
def test_parts_of_another_shape_or_type_are_named(case: str, quantized_copy: Callable[[str], Path]) -> None:
    folder = quantized_copy(case)
    weights = load_file(folder / WEIGHTS)
    scale = next(
        f"{MODULE}.{part}"
        for part in ("scales", "weight_scale_inv", "weight.quant_map", "SCB", "weight_scale")
        if f"{MODULE}.{part}" in weights
    )
    wrong = torch.cat([weights[scale].reshape(-1)] * 3)
    save_file({**weights, scale: wrong}, folder / WEIGHTS, metadata={"format": "pt"})
    assert f"of another shape: {scale} is {len(wrong)} and not " in refusal(folder)
    save_file({**weights, scale: weights[scale].to(torch.int64)}, folder / WEIGHTS, metadata={"format": "pt"})
    assert f"{scale} is I64, expected " in refusal(folder, UnsupportedModelError)


@pytest.mark.parametrize(
    ("case", "name", "values"),
    [
        ("gptq", f"{MODULE}.weight", torch.zeros(32, 96)),
        ("gptq", "model.layers.9.mlp.up_proj.qweight", torch.zeros(4, 4).int()),
        ("nf4", "model.norm.SCB", torch.zeros(32)),
        ("ct-packed", f"{MODULE}.weight_g_idx", torch.zeros(96).int()),
        ("ct-packed", "model.embed_tokens.weight_scale", torch.zeros(384, 1)),
        ("ct-packed", "lm_head.weight_packed", torch.zeros(384, 4).int()),
        ("fp8-whole", "model.layers.0.self_attn.k_scale", torch.zeros(1)),
    ],
)
def test_tensors_that_belong_to_nothing_are_named(
    case: str, name: str, values: torch.Tensor, quantized_copy: Callable[[str], Path]
) -> None:
    folder = quantized_copy(case)
    change_weights(folder, lambda weights: weights.update({name: values}))
    assert f": left over {name}; give" in refusal(folder)


def test_a_scale_beside_a_plain_weight_is_refused(quantized_copy: Callable[[str], Path]) -> None:
    folder = quantized_copy("fp8-blocks")
    change_weights(folder, lambda weights: weights.update({f"{MODULE}.weight": torch.zeros(32, 96)}))
    assert f"{MODULE}.weight is F32, expected F8_E4M3; give" in refusal(folder, UnsupportedModelError)


def test_whole_numbers_in_a_norm_are_refused(quantized_copy: Callable[[str], Path]) -> None:
    folder = quantized_copy("gptq")
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(32).to(torch.int8)}))
    assert "model.norm.weight is I8, expected" in refusal(folder, UnsupportedModelError)


def test_one_method_in_the_clothes_of_another(quantized_copy: Callable[[str], Path]) -> None:
    folder = quantized_copy("awq")
    change_settings(folder, quant_method="gptq", desc_act=False, sym=False)
    assert "o_proj.qweight is 32x4 and not 4x32" in refusal(folder)


def test_biases_of_zeros_that_a_quantizer_added_are_passed_over(quantized_copy: Callable[[str], Path]) -> None:
    folder, name = quantized_copy("gptq"), f"{MODULE}.bias"
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(32).half()}))
    assert load(folder).model.get_submodule(MODULE).bias is None
    change_weights(folder, lambda weights: weights[name][3].fill_(0.5))
    assert f": left over {name}; give" in refusal(folder)


# Values


def first_bits(values: torch.Tensor) -> torch.Tensor:
    values[0, 0] |= 15
    return values


@pytest.mark.parametrize(
    ("case", "part", "change", "expected"),
    [
        ("gptq-ordered", "g_idx", lambda values: values + 1, "g_idx from 1 to 3, expected 0 to 2"),
        ("gptq-ordered", "g_idx", lambda values: values - 1, "g_idx from -1 to 1, expected 0 to 2"),
        ("gptq", "qzeros", first_bits, "qzeros hold 15, which stands for a zero of 0 or of 16"),
        ("int8", "weight_format", lambda values: values + 1, "weight_format 1, expected 0"),
        ("nf4", "weight", lambda values: values[:-1], "1535 bytes and 48 scales"),
        ("nf4", "weight.absmax", lambda values: values[:-1], "1536 bytes and 47 scales"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", lambda values: values[:-1], "cannot be unpacked ("),
        ("ct-packed", "weight_shape", lambda values: values.flip(0), "its weight_shape is [96, 32], expected [32, 96]"),
    ],
)
def test_values_that_contradict_each_other(
    case: str,
    part: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    expected: str,
    quantized_copy: Callable[[str], Path],
) -> None:
    folder, name = quantized_copy(case), f"{MODULE}.{part}"
    change_weights(folder, lambda weights: weights.update({name: change(weights[name]).contiguous()}))
    message = refusal(folder)
    assert f"{MODULE} cannot be unpacked (" in message
    assert expected in message


def test_a_state_of_another_shape(quantized_copy: Callable[[str], Path]) -> None:
    folder, other = quantized_copy("nf4"), "model.layers.1.mlp.up_proj"
    part = "weight.quant_state.bitsandbytes__nf4"
    change_weights(folder, lambda weights: weights.update({f"{MODULE}.{part}": weights[f"{other}.{part}"].clone()}))
    assert "its shape is [96, 32], expected [32, 96]" in refusal(folder)


@pytest.mark.parametrize("case", ["gptq", "fp8-blocks", "nf4", "ct-packed"])
def test_scales_that_are_no_numbers_are_named(case: str, quantized_copy: Callable[[str], Path]) -> None:
    folder = quantized_copy(case)
    parts = ("scales", "weight_scale_inv", "weight.absmax", "weight_scale")

    def change(weights: Weights) -> None:
        for part in parts:
            if f"{MODULE}.{part}" in weights:
                weights[f"{MODULE}.{part}"].flatten()[0] = float("nan")

    change_weights(folder, change)
    assert f"NaN or infinite values, read as float32, in {MODULE}.weight; give" in refusal(folder)


# Settings


@pytest.mark.parametrize(
    ("case", "settings", "expected"),
    [
        ("gptq", {"bits": 3}, "bits 3 (expected 2 or 4 or 8)"),
        ("gptq", {"group_size": None}, "group_size None"),
        ("gptq", {"group_size": 0}, "group_size 0"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format True"),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic {"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ("awq", {"version": "GEMV"}, "version 'GEMV'"),
        ("awq", {"zero_point": False}, "zero_point False"),
        ("awq", {"bits": 8}, "bits 8"),
        ("fp8-blocks", {"fmt": "e5m2"}, "fmt 'e5m2'"),
        ("fp8-blocks", {"weight_block_size": [128]}, "weight_block_size [128]"),
        ("nf4", {"load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit"),
        ("nf4", {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type 'int4'"),
        ("ct-packed", {"format": "marlin-24"}, "format 'marlin-24' in group_0"),
        ("ct-packed", {"quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ("ct-packed", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ("ct-packed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ("ct-packed", {"sparsity_config": "2:4"}, "sparsity_config '2:4'"),
        ("ct-packed", {"ignore": ["re:("]}, "config_groups or ignore that"),
        ("ct-packed", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("ct-packed", {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, "config_groups or ignore that"),
        (
            "ct-packed",
            {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "attn_head"}}}},
            "strategy 'attn_head' in a",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:40],
)
def test_settings_that_cannot_be_unpacked_are_named(
    case: str, settings: dict[str, Any], expected: str, quantized_copy: Callable[[str], Path]
) -> None:
    folder = quantized_copy(case)
    change_settings(folder, **settings)
    message = refusal(folder, UnsupportedModelError)
    assert "its weights are quantized already (" in message
    assert f" with {expected}" in message or f"with a {expected}" in message
    assert message.endswith("; give the model that it was quantized from")


@pytest.mark.parametrize("case", ["gptq", "awq", "fp8-blocks", "nf4", "ct-packed"])
def test_a_config_that_says_quantized_of_plain_weights(case: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "plain", "llama")
    change_settings(folder, **CASES[case].settings)
    method = CASES[case].settings["quant_method"]
    message = refusal(folder)
    assert f"says that its weights are quantized already ({method}" in message
    assert "but none of them are; " in message


def test_a_package_that_is_missing_is_named(
    quantized_copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantized_copy("ct-packed")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    message = refusal(folder)
    assert "(compressed-tensors)" in message
    assert message.endswith("is not installed; run: pip install compressed-tensors")


@pytest.mark.parametrize("case", ["gptq", "ct-packed"])
def test_weights_that_are_unpacked_cannot_stay_in_their_file(case: str, quantized_copy: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"^--max-memory: expected plain weights.*quantized; leave out --max-memory"):
        load(quantized_copy(case), mapped=True)


def test_torch_files_are_refused(quantized_copy: Callable[[str], Path]) -> None:
    folder = quantized_copy("gptq")
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert "quantized weights are read from safetensors" in refusal(folder)
