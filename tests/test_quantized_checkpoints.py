"""Models in folders that are quantized already: weights are what codes and scales stand for, or they are refused."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coreinfer.bundles import ConfigError, CoreInferError, UnsupportedModelError, open_bundle
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.models import load as loading
from coreinfer.compiler.models.load import LoadedModel, load_model, read_config, stop_ids
from coreinfer.compiler.models.sources import ModelSource, find_source
from coreinfer.compiler.models.unpack.methods import METHODS
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from safetensors.torch import load_file, save_file
from torch import nn

from .model_factory import build_model, save_model
from .quantized_factory import CASES, WEIGHTS, save_quantized

MODULE = "model.layers.1.mlp.down_proj"
IDS = torch.arange(5, 45)[None]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Weights]]:
    """A function (case) that writes a model once and gives its folder and the weights that it stands for."""
    root = tmp_path_factory.mktemp("quantized")
    written: dict[str, tuple[Path, Weights]] = {}

    def save(case: str) -> tuple[Path, Weights]:
        if case not in written:
            written[case] = root / case, save_quantized(root / case, CASES[case])
        return written[case]

    return save


@pytest.fixture
def copy(saved: Callable[[str], tuple[Path, Weights]], tmp_path: Path) -> Callable[[str], Path]:
    """A function (case) that gives a folder which a test may change."""
    return lambda case: Path(shutil.copytree(saved(case)[0], tmp_path / case))


def load(folder: Path, *, mapped: bool = False, source: ModelSource | None = None) -> LoadedModel:
    source = source or find_source(str(folder))
    family, config = read_config(source)
    return load_model(source, family, config, device="cpu", dtype="float32", mapped=mapped)


def refusal(folder: Path, kind: type[CoreInferError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert f"--model {folder.name}: " in message
    return message


def change_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def change_settings(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {**config.get("quantization_config", {}), **settings}
    path.write_text(json.dumps(config), encoding="utf-8")


# Whole ones


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_codes_and_scales_stand_for(case: str, saved: Callable[[str], tuple[Path, Weights]]) -> None:
    folder, meant = saved(case)
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


def test_the_model_computes_as_a_plain_one(saved: Callable[[str], tuple[Path, Weights]]) -> None:
    folder, meant = saved("gptq-ordered")
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


def test_modules_that_are_left_plain_are_read_as_they_are(copy: Callable[[str], Path]) -> None:
    folder, plain = copy("nf4"), torch.randn(32, 96)

    def change(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith(MODULE)]:
            del weights[name]
        weights[f"{MODULE}.weight"] = plain.bfloat16()

    change_weights(folder, change)
    assert torch.equal(load(folder).model.get_parameter(f"{MODULE}.weight"), plain.bfloat16().float())


@pytest.mark.parametrize(("case", "settings"), [("ct-packed", {"ignore": None}), ("nf4", {"quant_method": None})])
def test_settings_that_are_left_out(case: str, settings: dict[str, Any], copy: Callable[[str], Path]) -> None:
    folder = copy(case)
    whole = load(folder).model.get_parameter(f"{MODULE}.weight")
    change_settings(folder, **settings)
    assert torch.equal(load(folder).model.get_parameter(f"{MODULE}.weight"), whole)


def test_generation_defaults_are_those_of_the_folder(copy: Callable[[str], Path]) -> None:
    folder = copy("int8")
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


# Tensors


@pytest.mark.parametrize("case", CASES)
def test_any_part_that_is_missing_or_renamed_is_named(case: str, copy: Callable[[str], Path]) -> None:
    folder = copy(case)
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
def test_a_weight_with_all_its_parts_missing_is_named(case: str, copy: Callable[[str], Path]) -> None:
    folder = copy(case)
    change_weights(folder, lambda weights: [weights.pop(name) for name in list(weights) if name.startswith(MODULE)])
    assert f": missing {MODULE}.weight; give" in refusal(folder)


@pytest.mark.parametrize("case", CASES)
def test_parts_of_another_shape_or_type_are_named(case: str, copy: Callable[[str], Path]) -> None:
    folder = copy(case)
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
    case: str, name: str, values: torch.Tensor, copy: Callable[[str], Path]
) -> None:
    folder = copy(case)
    change_weights(folder, lambda weights: weights.update({name: values}))
    assert f": left over {name}; give" in refusal(folder)


def test_a_scale_beside_a_plain_weight_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("fp8-blocks")
    change_weights(folder, lambda weights: weights.update({f"{MODULE}.weight": torch.zeros(32, 96)}))
    assert f"{MODULE}.weight is F32, expected F8_E4M3; give" in refusal(folder, UnsupportedModelError)


def test_whole_numbers_in_a_norm_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(32).to(torch.int8)}))
    assert "model.norm.weight is I8, expected" in refusal(folder, UnsupportedModelError)


def test_one_method_in_the_clothes_of_another(copy: Callable[[str], Path]) -> None:
    folder = copy("awq")
    change_settings(folder, quant_method="gptq", desc_act=False, sym=False)
    assert "o_proj.qweight is 32x4 and not 4x32" in refusal(folder)


def test_biases_of_zeros_that_a_quantizer_added_are_passed_over(copy: Callable[[str], Path]) -> None:
    folder, name = copy("gptq"), f"{MODULE}.bias"
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
    copy: Callable[[str], Path],
) -> None:
    folder, name = copy(case), f"{MODULE}.{part}"
    change_weights(folder, lambda weights: weights.update({name: change(weights[name]).contiguous()}))
    message = refusal(folder)
    assert f"{MODULE} cannot be unpacked (" in message
    assert expected in message


def test_a_state_of_another_shape(copy: Callable[[str], Path]) -> None:
    folder, other = copy("nf4"), "model.layers.1.mlp.up_proj"
    part = "weight.quant_state.bitsandbytes__nf4"
    change_weights(folder, lambda weights: weights.update({f"{MODULE}.{part}": weights[f"{other}.{part}"].clone()}))
    assert "its shape is [96, 32], expected [32, 96]" in refusal(folder)


@pytest.mark.parametrize("case", ["gptq", "fp8-blocks", "nf4", "ct-packed"])
def test_scales_that_are_no_numbers_are_named(case: str, copy: Callable[[str], Path]) -> None:
    folder = copy(case)
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
    case: str, settings: dict[str, Any], expected: str, copy: Callable[[str], Path]
) -> None:
    folder = copy(case)
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


def test_a_package_that_is_missing_is_named(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("ct-packed")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    message = refusal(folder)
    assert "(compressed-tensors)" in message
    assert message.endswith("is not installed; run: pip install compressed-tensors")


@pytest.mark.parametrize("case", ["gptq", "ct-packed"])
def test_weights_that_are_unpacked_cannot_stay_in_their_file(case: str, copy: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"^--max-memory: expected plain weights.*quantized; leave out --max-memory"):
        load(copy(case), mapped=True)


def test_torch_files_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert "quantized weights are read from safetensors" in refusal(folder)


def test_a_model_of_the_hub_is_read_from_its_download(
    saved: Callable[[str], tuple[Path, Weights]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, meant = saved("gptq")
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
    saved: Callable[[str], tuple[Path, Weights]],
    tiny_inputs: Callable[[str], CompileConfig],
    tmp_path: Path,
) -> None:
    folder, meant = saved(case)
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
