"""Models in folders that are quantized already: weights are what codes and scales stand for, or they are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coreinfer.bundles import open_bundle
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.models import load as loading
from coreinfer.compiler.models.load import load_model, read_config, stop_ids
from coreinfer.compiler.models.sources import ModelSource, find_source
from coreinfer.compiler.models.unpack.methods import METHODS
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from safetensors.torch import load_file, save_file
from torch import nn

from .loading import load
from .model_factory import build_model
from .quantized_factory import CASES, WEIGHTS, Weights, save_quantized
from .quantized_folders import MODULE, change_settings, change_weights, refusal

IDS = torch.arange(5, 45)[None]


# Whole ones


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_codes_and_scales_stand_for(
    case: str, quantized: Callable[[str], tuple[Path, Weights]]
) -> None:
    folder, meant = quantized(case)
    loaded = load(folder)
    got = dict(loaded.model.named_parameters())
    assert set(got) == set(meant)
    for name, weight in meant.items():
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].detach(), weight, rtol=CASES[case].rounding, atol=1e-9)
    # A wrong order of codes or groups would be far off.
    assert meant[f"{MODULE}.weight"].std() > 0.01
    linears = [module for module in loaded.model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 3 * 7 + 1
    assert {type(module) for module in linears} == {nn.Linear}
    assert all(type(parameter) is nn.Parameter for parameter in got.values())


def test_the_model_computes_as_a_plain_one(quantized: Callable[[str], tuple[Path, Weights]]) -> None:
    folder, meant = quantized("gptq-ordered")
    plain = build_model("llama")
    plain.load_state_dict(meant, strict=False)
    loaded = load(folder)
    assert getattr(loaded.model.config, "quantization_config", None) is None
    assert "quantization_config" not in loaded.record.config
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


def test_models_with_biases_and_shards(tmp_path: Path) -> None:
    folder = tmp_path / "qwen2"
    meant = save_quantized(folder, CASES["awq"], "qwen2")
    weights = load_file(folder / WEIGHTS)
    halves = {"a.safetensors": list(weights)[::2], "b.safetensors": list(weights)[1::2]}
    for file, names in halves.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in halves.items() for name in names}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / WEIGHTS).unlink()
    got = dict(load(folder).model.named_parameters())
    assert any(name.endswith("q_proj.bias") for name in got)
    for name, weight in meant.items():
        torch.testing.assert_close(got[name].detach(), weight, rtol=2e-6, atol=1e-9)
    (folder / "b.safetensors").unlink()
    assert "b.safetensors" in refusal(folder)


def test_modules_that_are_left_plain_are_read_as_they_are(quantized_copy: Callable[[str], Path]) -> None:
    folder, plain = quantized_copy("nf4"), torch.randn(32, 96)

    def change(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith(MODULE)]:
            del weights[name]
        weights[f"{MODULE}.weight"] = plain.bfloat16()

    change_weights(folder, change)
    assert torch.equal(load(folder).model.get_parameter(f"{MODULE}.weight"), plain.bfloat16().float())


@pytest.mark.parametrize(("case", "settings"), [("ct-packed", {"ignore": None}), ("nf4", {"quant_method": None})])
def test_settings_that_are_left_out(case: str, settings: dict[str, Any], quantized_copy: Callable[[str], Path]) -> None:
    folder = quantized_copy(case)
    whole = load(folder).model.get_parameter(f"{MODULE}.weight")
    change_settings(folder, **settings)
    assert torch.equal(load(folder).model.get_parameter(f"{MODULE}.weight"), whole)


def test_generation_defaults_are_those_of_the_folder(quantized_copy: Callable[[str], Path]) -> None:
    folder = quantized_copy("int8")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert stop_ids(load(folder)) == {2, 7}


def test_values_that_the_libraries_wrote() -> None:
    """What bitsandbytes 0.50.2 made of two rows, and what gptqmodel 7.7.0 reads in a word of AWQ."""
    table: tuple[float, ...] = (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
    )
    table += (-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725)
    table += (0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1)
    state = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64], "nested_blocksize": 256, '
    state += b'"nested_dtype": "float32", "nested_offset": 1.23046875}'
    codes = "091c3e60a2d4f81b2e5f91c3e60a1d4f71b2e5f81c3e60a1d4e70b2d4f81c2e5"
    codes += "06e4e2c1a18f6e4d2c1a08f5e4d2c1a07f5e3d2b1907f5e3d2b1906f4e3c1b18"
    inner = torch.zeros(256)
    inner[0], inner[255] = -0.9929687976837158, 1
    parts = {
        "weight": torch.tensor(list(bytes.fromhex(codes)), dtype=torch.uint8)[:, None],
        "weight.absmax": torch.tensor([255, 0], dtype=torch.uint8),
        "weight.quant_map": torch.tensor(table),
        "weight.nested_absmax": torch.tensor([0.73828125]),
        "weight.nested_quant_map": inner,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    packing = METHODS["bitsandbytes"].packings(settings, nn.ModuleDict({"a": nn.Linear(64, 2)}))("a")
    assert packing is not None
    first = [[-1.9688, 0.3168, -1.3706, 0.8676, -0.7775], [-0.4974, -0.0453, 0.3596, -0.1415, 0.3596]]
    weight = packing.unpack(parts)
    torch.testing.assert_close(weight[:, :5], torch.tensor(first), rtol=0, atol=6e-5)
    torch.testing.assert_close(weight.sum(1), torch.tensor([0.0823, 0.0208]), rtol=0, atol=6e-5)
    packing = METHODS["awq"].packings({"bits": 4, "group_size": -1}, nn.ModuleDict({"a": nn.Linear(1, 8)}))("a")
    assert packing is not None
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    parts = {"qweight": word, "qzeros": torch.zeros_like(word), "scales": torch.ones(1, 8)}
    assert packing.unpack(parts).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_model_of_the_hub_is_read_from_its_download(
    quantized: Callable[[str], tuple[Path, Weights]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, meant = quantized("gptq")
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(loading, "snapshot_download", download)
    source = ModelSource(name="some/model", location="some/model")
    family, config = read_config(find_source(str(folder)))
    tokenizer = load(folder).tokenizer
    monkeypatch.setattr(loading, "load_tokenizer", lambda _: tokenizer)
    model = load_model(source, family, config, device="cpu", dtype="float32").model
    torch.testing.assert_close(model.get_parameter(f"{MODULE}.weight").detach(), meant[f"{MODULE}.weight"])
    assert asked[0][0] == "some/model"
    assert "*.safetensors" in asked[0][1]


# Groups of compressed-tensors


def test_each_module_is_read_by_its_own_group(tmp_path: Path) -> None:
    """transformers reads all of them by the first group."""
    folder, packed, rows = tmp_path / "mixed", CASES["ct-packed"], CASES["ct-int8"]
    meant = save_quantized(folder, packed)
    other_meant = save_quantized(tmp_path / "other", rows)
    others = load_file(tmp_path / "other" / WEIGHTS)
    down = "mlp.down_proj."

    def change(weights: Weights) -> None:
        for name in [name for name in weights if down in name]:
            del weights[name]
        weights.update({name: values for name, values in others.items() if down in name})

    change_weights(folder, change)
    wide = packed.settings["config_groups"]["group_0"] | {"format": "pack-quantized"}
    narrow = rows.settings["config_groups"]["group_0"] | {"format": "int-quantized", "targets": ["re:.*down_proj"]}
    change_settings(folder, format="mixed-precision", config_groups={"group_0": wide, "group_1": narrow})
    got = dict(load(folder).model.named_parameters())
    for name, weight in meant.items():
        torch.testing.assert_close(
            got[name].detach(), other_meant[name] if down in name else weight, rtol=2e-6, atol=1e-9
        )


# Bundles


@pytest.mark.parametrize("case", ["gptq", "nf4-nested", "ct-packed"])
def test_a_bundle_computes_what_the_codes_stand_for(
    case: str,
    quantized: Callable[[str], tuple[Path, Weights]],
    tiny_inputs: Callable[[str], CompileConfig],
    tmp_path: Path,
) -> None:
    folder, meant = quantized(case)
    config = replace(tiny_inputs("llama"), evaluate=False, controls=False, report_sentences=0)
    manifest = compile_model(replace(config, model=str(folder), output=tmp_path / "bundle"))
    assert "quantization_config" not in manifest.model.config
    assert manifest.provenance.model_sha256 == find_source(str(folder)).sha256({})
    plain = build_model("llama")
    plain.load_state_dict({name: weight.bfloat16().float() for name, weight in meant.items()}, strict=False)
    with torch.inference_mode():
        expected = plain(IDS).logits[0]
    got = NativeDecoder(open_bundle(tmp_path / "bundle"), threads=1).forward(IDS[0].tolist(), all_logits=True)
    assert float((torch.from_numpy(got) - expected).abs().max() / expected.abs().max()) < 5e-3
