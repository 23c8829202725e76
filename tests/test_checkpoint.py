"""Models in folders: every parameter comes from the files, or the model is refused and what is wrong is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coreinfer.bundles import ConfigError, CoreInferError, UnsupportedModelError
from coreinfer.compiler.clusters.embed import load_encoder
from coreinfer.compiler.models.load import load_model, read_config
from coreinfer.compiler.models.sources import find_source
from safetensors.torch import load_file, save_file

from .loading import load
from .model_factory import SHAPES, build_model, save_encoder, save_model

IDS = torch.arange(5, 45)[None]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function (family) that saves a tiny model once and gives its folder."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def save(family: str) -> Path:
        return folder / family if (folder / family).exists() else save_model(folder / family, family)

    return save


@pytest.fixture
def copy(saved: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A function (family, sharded=False) that gives a folder which a test may change."""

    def make(family: str = "llama", *, sharded: bool = False) -> Path:
        folder = Path(shutil.copytree(saved(family), tmp_path / family))
        if sharded:
            (folder / WEIGHTS).unlink()
            build_model(family).save_pretrained(folder, max_shard_size="20KB")
        return folder

    return make


def refusal(folder: Path, *, mapped: bool = False) -> str:
    with pytest.raises(CoreInferError) as caught:
        load(folder, mapped=mapped)
    message = str(caught.value)
    assert "\n" not in message
    assert f"--model {folder.name}: " in message
    return message


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits
    return result


# Whole ones


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", SHAPES)
def test_a_whole_checkpoint_computes_what_was_saved(
    family: str, sharded: bool, mapped: bool, copy: Callable[..., Path]
) -> None:
    folder = copy(family, sharded=sharded)
    assert len(list(folder.glob("*.safetensors"))) == 1 or sharded
    assert torch.equal(logits(load(folder, mapped=mapped).model), logits(build_model(family)))


def test_names_of_exaones_makers_are_read(saved: Callable[[str], Path], copy: Callable[..., Path]) -> None:
    names = {
        "model.layers.": "transformer.h.",
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.attention.out_proj",
        "self_attn.": "attn.attention.",
        "gate_proj": "c_fc_0",
        "up_proj": "c_fc_1",
        "down_proj": "c_proj",
    }

    def renamed(name: str) -> str:
        for known, theirs in names.items():
            name = name.replace(known, theirs)
        return name

    folder = copy("exaone")
    tensors = load_file(folder / WEIGHTS)
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for known, theirs in {"num_hidden_layers": "num_layers", "rms_norm_eps": "layer_norm_epsilon"}.items():
        config[theirs] = config.pop(known)
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(folder).model), logits(load(saved("exaone")).model))


def test_what_older_checkpoints_hold_besides_is_passed_over(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_weights(
        folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": IDS.float()})
    )
    assert torch.equal(logits(load(folder).model), logits(build_model("llama")))


def test_a_head_that_repeats_the_tied_embedding_is_fine(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_weights(
        folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    )
    assert torch.equal(logits(load(folder).model), logits(build_model("llama")))


def test_torch_files_of_tensors_are_read(copy: Callable[..., Path]) -> None:
    folder = copy()
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert torch.equal(logits(load(folder).model), logits(build_model("llama")))


# Tensors


@pytest.mark.parametrize("family", SHAPES)
def test_any_one_tensor_that_is_missing_or_renamed_is_named(family: str, copy: Callable[..., Path]) -> None:
    folder = copy(family)
    weights = load_file(folder / WEIGHTS)
    assert len(weights) >= 21
    for name, values in weights.items():
        # Without its embedding, a model with a tied head has none either.
        missing = name
        if name.endswith("embed_tokens.weight") and "lm_head.weight" not in weights:
            missing = f"lm_head.weight, {name}"
        others = {other: kept for other, kept in weights.items() if other != name}
        save_file(others, folder / WEIGHTS, metadata={"format": "pt"})
        assert f": missing {missing}; give" in refusal(folder)
        if any(f"layers.{layer}." in name for layer in (0, 2)):
            continue
        save_file({**others, f"{name}_old": values}, folder / WEIGHTS, metadata={"format": "pt"})
        assert f": missing {missing}; left over {name}_old; give" in refusal(folder)


@pytest.mark.parametrize("mapped", [False, True])
def test_tensors_of_another_shape_or_left_over_are_named(mapped: bool, copy: Callable[..., Path]) -> None:
    folder = copy()

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[DOWN] = weights[DOWN][:, :-1].contiguous()
        weights["model.layers.3.mlp.down_proj.weight"] = weights[DOWN].clone()
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)

    change_weights(folder, change)
    message = refusal(folder, mapped=mapped)
    assert f"of another shape: {DOWN} is 32x95 and not 32x96; left over " in message
    assert "model.layers.0.self_attn.q_proj.bias, model.layers.3.mlp.down_proj.weight; give" in message


def test_many_missing_tensors_are_counted(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_json(folder / "config.json", num_hidden_layers=5)
    assert "missing model.layers.3.input_layernorm.weight, " in refusal(folder)
    assert " and 13 more; give" in refusal(folder)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_shard_that_lacks_a_tensor(mapped: bool, copy: Callable[..., Path]) -> None:
    folder = copy(sharded=True)
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][DOWN]
    weights = load_file(shard)
    del weights[DOWN]
    save_file(weights, shard, metadata={"format": "pt"})
    assert f": missing {DOWN}; give" in refusal(folder, mapped=mapped)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_shard_that_is_not_there(mapped: bool, copy: Callable[..., Path]) -> None:
    folder = copy(sharded=True)
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][DOWN]
    shard.unlink()
    assert shard.name in refusal(folder, mapped=mapped)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {"a": 7}}'])
def test_an_index_that_is_none(index: str, copy: Callable[..., Path]) -> None:
    folder = copy(sharded=True)
    (folder / INDEX).write_text(index)
    assert f"{INDEX} cannot be read (" in refusal(folder)


# The head


def test_an_untied_head_that_is_missing(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_json(folder / "config.json", tie_word_embeddings=False)
    assert ": missing lm_head.weight; give" in refusal(folder)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_tied_head_that_differs_from_the_embedding(mapped: bool, copy: Callable[..., Path]) -> None:
    folder = copy("qwen2")
    change_json(folder / "config.json", tie_word_embeddings=True)
    assert "tie_word_embeddings true, but its weights hold a head" in refusal(folder, mapped=mapped)


# Numbers


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(value: float, mapped: bool, copy: Callable[..., Path]) -> None:
    folder = copy()
    change_weights(folder, lambda weights: weights[DOWN][3, 4].fill_(value))
    message = refusal(folder, mapped=mapped)
    assert f"NaN or infinite values, read as float32, in {DOWN}; give" in message


def test_weights_that_the_dtype_cannot_hold_are_named(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_weights(folder, lambda weights: weights[DOWN][3, 4].fill_(1e30))
    source = find_source(str(folder))
    family, config = read_config(source)
    with pytest.raises(ConfigError, match="read as float16, in model"):
        load_model(source, family, config, device="cpu", dtype="float16")  # type: ignore[arg-type]


def test_whole_numbers_are_no_weights(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_weights(folder, lambda weights: weights.update({DOWN: weights[DOWN].to(torch.int8)}))
    assert f"got {DOWN} (I8); give" in refusal(folder)


# Files that are none


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("1/0",)


@pytest.mark.parametrize("content", ["evil", "cut", "text", "none"])
def test_torch_files_of_anything_else_are_refused_unread(content: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    path = folder / "pytorch_model.bin"
    torch.save(
        {**load_file(folder / WEIGHTS), "evil": Evil()} if content == "evil" else load_file(folder / WEIGHTS), path
    )
    (folder / WEIGHTS).unlink()
    if content in ("cut", "none"):
        path.write_bytes(path.read_bytes()[: 1000 if content == "cut" else 0])
    if content == "text":
        path.write_text("no weights")
    assert "its weights cannot be loaded (" in refusal(folder)


def test_torch_files_cannot_stay_in_their_file(copy: Callable[..., Path]) -> None:
    folder = copy()
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="--max-memory needs safetensors"):
        load(folder, mapped=True)


# Quantized checkpoints


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 3, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {}},
        {"quant_method": "fp8", "fmt": "e5m2"},
        {"quant_method": "aqlm"},
        {"quant_method": "hqq"},
        {"quant_method": "quanto"},
        {"quant_method": "torchao"},
        {"quant_method": 7},
        {"quant_method": "a method of tomorrow"},
    ],
    ids=lambda settings: str(settings["quant_method"]),
)
def test_quantized_checkpoints_are_refused_by_name(settings: dict[str, Any], copy: Callable[..., Path]) -> None:
    folder = copy()
    change_json(folder / "config.json", quantization_config=settings)
    with pytest.raises(UnsupportedModelError) as caught:
        load(folder)
    assert f"quantized already ({settings['quant_method']}" in str(caught.value)
    assert "or what awq, bitsandbytes, compressed-tensors, fp8, gptq, mxfp4 wrote; " in str(caught.value)
    assert str(caught.value).endswith("; give the model that it was quantized from")


@pytest.mark.parametrize("field", ["quantization", "compression_config"])
def test_quantized_checkpoints_that_say_so_elsewhere_are_refused(field: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    change_json(folder / "config.json", **{field: {"bits": 4}})
    with pytest.raises(
        UnsupportedModelError, match=rf"quantized already \(an unknown method, 4 bits; {field} in config"
    ):
        load(folder)


# The sentence encoder


ENCODER_LAYER = "encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda weights: weights.pop(ENCODER_LAYER), f"missing {ENCODER_LAYER}; give"),
        (lambda weights: weights.update({"encoder.layer.1.a": IDS.float()}), "left over encoder.layer.1.a;"),
        (lambda weights: weights[ENCODER_LAYER].fill_(float("nan")), "NaN or infinite values, read as float32, in 0."),
    ],
)
def test_a_sentence_encoder_is_whole_or_refused(
    change: Callable[[dict[str, torch.Tensor]], object], expected: str, tmp_path: Path
) -> None:
    folder = save_encoder(tmp_path)
    change_weights(folder, change)
    with pytest.raises(ConfigError) as caught:
        load_encoder(find_source(str(folder), option="--encoder"), "cpu")
    assert f"--encoder {folder.name}: " in str(caught.value)
    assert expected in str(caught.value)


def test_what_a_sentence_encoder_does_not_need_is_passed_over(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path)
    change_weights(
        folder, lambda weights: (weights.pop("pooler.dense.weight"), weights.update({"cls.a": torch.ones(2)}))
    )
    assert load_encoder(find_source(str(folder), option="--encoder"), "cpu") is not None


def test_a_quantized_sentence_encoder_is_refused(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path)
    change_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    with pytest.raises(UnsupportedModelError, match="--encoder encoder: its weights are quantized already; expected"):
        load_encoder(find_source(str(folder), option="--encoder"), "cpu")


def test_a_field_of_another_type_is_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "gpt_oss")
    change_json(folder / "config.json", swiglu_limit="seven")
    with pytest.raises(ConfigError, match=r"no model can be read there \(.*swiglu_limit.* expected float, got str"):
        read_config(find_source(str(folder)))
