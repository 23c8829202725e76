"""Checkpoints of models that read pictures or sounds too compile as their text models."""

import json
import logging
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer.bundles import ConfigError, UnsupportedModelError, open_bundle
from coreinfer.bundles.families import FAMILIES
from coreinfer.compiler.estimate.shapes import stated_shapes
from coreinfer.compiler.models.load import load_model, load_tokenizer, read_config, stop_ids
from coreinfer.compiler.models.multimodal.text_models import MULTIMODAL
from coreinfer.compiler.models.sources import find_source
from coreinfer.compiler.models.stated import stated_config
from coreinfer.evaluation.reference import TransformersSubject, check_original
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.prompts.chat_template import render_chat
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from .model_factory import VOCABULARY, build_tokenizer, save_model
from .multimodal_factory import TEXT_OF, build_gemma3n, save_multimodal
from .quantized_factory import CASES, save_quantized

IDS: list[int] = np.random.default_rng(3).integers(3, VOCABULARY - 1, 90).tolist()
FORMS = ("language_model.model.", "model.language_model.")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOWERS = {"vision_tower.encoder.weight": torch.zeros(3, 5), "multi_modal_projector.linear.weight": torch.zeros(7)}


def load(folder: Path, **options: Any) -> Any:
    source = find_source(str(folder))
    return load_model(source, *read_config(source), device="cpu", dtype="float32", **options)


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


def error(got: Any, expected: Any) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def wrap(folder: Path, kind: str, *, form: str = FORMS[0], towers: Mapping[str, torch.Tensor] = TOWERS) -> None:
    """Make a text model's folder that of a multimodal one, as published files have it."""
    head = "language_model.lm_head." if form == FORMS[0] else "lm_head."
    tensors = {
        name.replace("lm_head.", head) if name.startswith("lm_head.") else name.replace("model.", form, 1): value
        for name, value in load_file(folder / WEIGHTS).items()
    }
    save_file({**tensors, **towers}, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.loads((folder / CONFIG).read_text())
    outer = {field: text.pop(field) for field in ("quantization_config", "tie_word_embeddings") if field in text}
    (folder / CONFIG).write_text(json.dumps({"model_type": kind, "text_config": text, **outer}))


@pytest.mark.parametrize("mapped", [False, True], ids=["read", "mapped"])
@pytest.mark.parametrize("kind", TEXT_OF)
def test_the_text_model_computes_what_the_whole_model_does(kind: str, mapped: bool, tmp_path: Path) -> None:
    whole = save_multimodal(tmp_path, kind)
    source = find_source(str(tmp_path))
    family, config = read_config(source)
    assert config.to_dict() == AutoConfig.from_pretrained(tmp_path).text_config.to_dict()
    stated = stated_config(source)
    assert stated is not None
    assert stated["model_type"] in family.model_types
    loaded = load(tmp_path, mapped=mapped)
    np.testing.assert_array_equal(logits(loaded.model), logits(whole))
    shapes = stated_shapes(source)
    assert shapes.all_weights == sum(values.numel() for values in loaded.model.parameters() if values.ndim == 2)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "gemma3n"])
def test_a_compiled_one_answers_as_the_whole_model(
    kind: str, tmp_path: Path, tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "gemma3n":
        whole: Any = build_gemma3n(monkeypatch)
        whole.save_pretrained(tmp_path)
        build_tokenizer().save_pretrained(tmp_path)
    else:
        whole = save_multimodal(tmp_path, kind)
    family = {"gemma3": "gemma3", "mistral3": "llama", "gemma3n": "gemma3n"}[kind]
    bundle = open_bundle(tiny_bundle(family, model=str(tmp_path), evaluate=False))
    assert bundle.manifest.model.family == family
    expected = logits(whole)
    assert error(TorchDecoder(bundle, device="cpu", dtype="float32").forward(IDS, all_logits=True), expected) < 1e-3
    assert error(NativeDecoder(bundle, threads=2).forward(IDS, all_logits=True), expected) < 1e-2


def test_the_original_of_an_evaluation_is_the_text_model(tmp_path: Path) -> None:
    whole = save_multimodal(tmp_path, "smolvlm")
    check_original(str(tmp_path))
    subject = TransformersSubject(str(tmp_path), threads=1)
    subject.read(IDS[:40], "")
    subject.begin("original")
    np.testing.assert_allclose(subject.append(IDS[40:], all_logits=True), logits(whole)[40:], rtol=1e-3, atol=1e-4)


def test_what_is_left_out_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrap(save_model(tmp_path, "gemma3"), "gemma3")
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    said = [record.getMessage() for record in caplog.records if "text model alone" in record.getMessage()]
    assert said == [
        f"{tmp_path.name}: read as its text model alone; left out: multi_modal_projector (28 bytes), "
        "vision_tower (60 bytes)"
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_both_forms_of_names_and_shards_are_read(family: str, form: str, tmp_path: Path) -> None:
    save_model(tmp_path, family)
    expected = logits(load(tmp_path).model)
    wrap(tmp_path, "gemma3" if family == "gemma3" else "mistral3", form=form)
    np.testing.assert_array_equal(logits(load(tmp_path).model), expected)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    files = {name: f"{'towers' if name in TOWERS else index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for mapped in (False, True):
        np.testing.assert_array_equal(logits(load(tmp_path, mapped=mapped).model), expected)


def test_towers_are_not_read(tmp_path: Path) -> None:
    wrap(save_model(tmp_path, "gemma3"), "gemma3")
    data = (tmp_path / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    num_bytes = 3 * 10**9
    header["vision_tower.large"] = {
        "dtype": "F32",
        "shape": [num_bytes // 4],
        "data_offsets": [len(body), len(body) + num_bytes],
    }
    written = json.dumps(header).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written + body)
        # A hole: it takes no room on disk, but in memory when it is read.
        file.truncate(file.tell() + num_bytes)
    for mapped in (False, True):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        load(tmp_path, mapped=mapped)
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < num_bytes / 4


def test_what_a_published_text_config_leaves_out_has_the_defaults_of_its_class(tmp_path: Path) -> None:
    """Gemma 3 4B's, as it is published: no heads, no vocabulary; tokens that end a text are stated outside alone."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file({"language_model.model.norm.weight": torch.zeros(2560)}, tmp_path / WEIGHTS)
    source = find_source(str(tmp_path))
    family, read = read_config(source)
    assert family.name == "gemma3"
    assert (read.num_attention_heads, read.num_key_value_heads, read.head_dim, read.vocab_size) == (8, 4, 256, 262208)
    assert (read.eos_token_id, read.tie_word_embeddings, read.dtype) == ([1, 106], True, torch.bfloat16)
    assert read.rope_parameters["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert read.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}
    shapes = stated_shapes(source)
    # 262,208 embeddings, and 34 layers: 8 and 4 heads of 256 in attention, 3 of 2560 x 10240.
    num_weights = 262_208 * 2560 + 34 * 2560 * (2 * 2048 + 2 * 1024 + 3 * 10240)
    assert (shapes.tied_head, shapes.all_weights) == (True, num_weights)


def test_tokens_that_end_a_text_are_those_of_the_whole_model(tmp_path: Path) -> None:
    wrap(save_model(tmp_path, "gemma3"), "gemma3")
    (tmp_path / "generation_config.json").unlink()
    edit(tmp_path, lambda config: config.update(eos_token_id=[7, 9]))
    loaded = load(tmp_path)
    assert stop_ids(loaded) == {2, 7, 9}


@pytest.mark.parametrize(("outer", "inner"), [(None, None), (True, False), (False, True)])
def test_files_tell_whether_there_is_a_head_where_configs_do_not(
    outer: bool | None, inner: bool | None, tmp_path: Path
) -> None:
    for family, tied in (("mistral", False), ("gemma3", True)):
        folder = save_model(tmp_path / family, family)
        expected = logits(load(folder).model)
        wrap(folder, "mistral3" if family == "mistral" else "gemma3")

        def change(config: dict[str, Any]) -> None:
            stated = {"outer": outer, "inner": inner}
            for of, value in ((config, stated["outer"]), (config["text_config"], stated["inner"])):
                of.pop("tie_word_embeddings", None)
                of.update({} if value is None else {"tie_word_embeddings": value})

        edit(folder, change)
        loaded = load(folder)
        assert loaded.record.tied_head is tied
        assert stated_shapes(find_source(str(folder))).tied_head is tied
        np.testing.assert_array_equal(logits(loaded.model), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("language_model.model.norm.weight"), "missing model.norm.weight"),
        (lambda tensors: tensors.update(other=torch.zeros(3)), "left over other"),
        (
            lambda tensors: tensors.update({"language_model.model.layers.0.extra": torch.zeros(3)}),
            "left over model.layers.0.extra",
        ),
    ],
)
def test_tensors_of_the_text_model_are_all_accounted_for(change: Any, message: str, tmp_path: Path) -> None:
    wrap(save_model(tmp_path, "llama"), "llava")
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def refused(config: Mapping[str, Any], folder: Path) -> list[str]:
    """What both ways to read a config say of one."""
    (folder / CONFIG).write_text(json.dumps(config))
    messages = []
    for read in (read_config, stated_config):
        with pytest.raises((ConfigError, UnsupportedModelError)) as raised:
            read(find_source(str(folder)))
        messages.append(str(raised.value))
    return messages


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava", "text_config": {"model_type": "gemma2"}}, "a llava whose text model is a gemma2"),
        ({"model_type": "llava_next", "text_config": {"model_type": "granite"}}, "whose text model is a granite"),
        ({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}, "whose text model is a ministral3"),
        ({"model_type": "gemma3"}, "text_config: expected what the text model of this gemma3 is, got nothing"),
        ({"model_type": "gemma3", "text_config": [1]}, "got list"),
        (
            {"model_type": "gemma3", "text_config": {"final_logit_softcapping": 30.0}},
            "final_logit_softcapping 30.0 in text_config, which gemma3 models do not compute",
        ),
        (
            {
                "model_type": "llava",
                "text_config": {"model_type": "llama"},
                "quantization_config": {"quant_method": "x"},
            },
            "its weights are quantized already",
        ),
    ],
)
def test_what_computes_otherwise_is_refused_by_name(config: Any, message: str, tmp_path: Path) -> None:
    assert all(message in said for said in refused(config, tmp_path))


def test_text_models_are_of_families_that_compile() -> None:
    known = {model_type for family in FAMILIES for model_type in family.model_types}
    assert {text_type for parts in MULTIMODAL.values() for text_type in parts.text_types} <= known
    assert not MULTIMODAL.keys() & known


@pytest.mark.parametrize("case", ["gptq", "awq", "nf4", "ct-packed", "fp8-blocks"])
def test_quantized_ones_are_unpacked(case: str, tmp_path: Path) -> None:
    save_quantized(tmp_path, CASES[case], "gemma3")
    expected = logits(load(tmp_path).model)
    # A tower may be packed as well.
    towers = {**TOWERS, "vision_tower.layer.qweight": torch.zeros((4, 4), dtype=torch.int32)}
    wrap(tmp_path, "gemma3", towers=towers)
    np.testing.assert_array_equal(logits(load(tmp_path).model), expected)


IN_PARTS = {
    "parts": "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}",
    "chosen": "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}",
    "first": "{% if message['content'][0]['type'] == 'image' %}<image>{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}",
}
"""Ways in which templates write the parts of a message."""
EITHER = (
    "\n{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("way", IN_PARTS)
def test_templates_with_places_for_pictures_write_text(way: str, tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    template = (
        f"{{% for message in messages %}}{{{{ message['role'] | upper }}}}: {IN_PARTS[way]} {{% endfor %}}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(find_source(str(tmp_path)))
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The oven"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Butter"},
    ]
    expected = "SYSTEM: Be brief. USER: The oven ASSISTANT: Yes USER: Butter ASSISTANT:"
    assert render_chat(tokenizer.chat_template, turns, special_tokens={}) == expected
    # transformers' own way, by which a compile writes its texts and an exported folder is used.
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == expected
    continued = render_chat(tokenizer.chat_template, turns[:3], special_tokens={}, continue_final_message=True)
    assert continued == "SYSTEM: Be brief. USER: The oven ASSISTANT: Yes"


def test_templates_that_write_text_stay_as_they_are(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(EITHER)
    assert load_tokenizer(find_source(str(tmp_path))).chat_template == EITHER


def test_the_template_of_a_processor_counts_where_there_is_no_other(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "other"}))
    own = load_tokenizer(find_source(str(tmp_path))).chat_template
    assert own != "other"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": EITHER}))
    assert load_tokenizer(find_source(str(tmp_path))).chat_template == EITHER
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(
        ConfigError, match=r"chat_template\.json cannot be read .*expected an object with chat_template"
    ):
        load_tokenizer(find_source(str(tmp_path)))
