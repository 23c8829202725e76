"""Exports, read by gguf, transformers and, where it is installed, llama.cpp; their logits against the bundle's own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.bundles import UnsupportedModelError, open_bundle
from coreinfer.bundles.formats import float_matrix
from coreinfer.bundles.layout import LAYOUT
from coreinfer.compiler.export.chosen import ChosenModel, choose_model
from coreinfer.compiler.export.exporting import ExportedFiles, export_model
from coreinfer.compiler.export.gguf_header import architecture_for, header_fields
from coreinfer.compiler.export.gguf_rope import rope_factors
from coreinfer.compiler.export.gguf_vocabulary import vocabulary_fields
from coreinfer.compiler.models.load import load_model, load_tokenizer, read_config
from coreinfer.compiler.models.sources import find_source
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from .bundle_factory import edit_manifest
from .gguf_factory import tiny_config, tiny_model
from .llama_cpp import load_llama_cpp
from .model_factory import FAMILIES, build_tokenizer, corpus_texts

Logits = npt.NDArray[np.float32]
IN_GGUF = (
    *("llama", "mistral", "ministral", "smollm3", "granite", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "olmo3"),
    *("phi3", "stablelm", "starcoder2", "gpt_neox", "gpt2"),
)
AS_PUBLISHED = {"smollm3": 4, "gemma2": 3, "gemma3": 3}
"""Layers of models of which a file leaves something unsaid, that must be as in all that were published."""
UNEVEN = {"budgets": "sensitivity", "quantize": "int4", "keep": 0.6}
LLAMA_CPP_READS = 15
"""Tokens, fewer than the tiny windows: llama.cpp knows none for mistral."""


def exported(bundle_dir: Path, folder: Path, form: str, **options: Any) -> ExportedFiles:
    given: dict[str, Any] = {"cluster": None, "dense": "cluster" not in options, "dtype": "float32", **options}
    return export_model(bundle_dir, folder / "export", form=form, **given)


def token_ids(bundle_dir: Path) -> list[int]:
    tokenizer = Tokenizer.from_str((bundle_dir / LAYOUT.tokenizer).read_text(encoding="utf-8"))
    return list(tokenizer.encode(" ".join(corpus_texts()[:3])).ids[:60])


def own_logits(bundle_dir: Path, cluster: int | None) -> Logits:
    decoder = TorchDecoder(open_bundle(bundle_dir), device="cpu", dtype="float32")
    decoder.use(DENSE if cluster is None else FfnChoice(cluster=cluster))
    return np.asarray(decoder.forward(token_ids(bundle_dir), all_logits=True), dtype=np.float32)


def model_logits(model: Any, ids: list[int]) -> Logits:
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids])).logits[0].float().numpy(), dtype=np.float32)


def divergence(expected: Logits, got: Logits) -> float:
    log_p, log_q = (torch.from_numpy(logits).double().log_softmax(dim=-1) for logits in (expected, got))
    return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())


@pytest.fixture
def bundle_of(tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """As `tiny_bundle`, and of some families a model that is scaled, or rotates, as all that were published."""

    def make(family: str, **options: Any) -> Path:
        if family in AS_PUBLISHED:
            folder = tmp_path_factory.getbasetemp() / f"{family}-as-published"
            if not folder.exists():
                window = {} if family == "smollm3" else {"sliding_window": 16}
                config = tiny_config(family, num_hidden_layers=AS_PUBLISHED[family], **window)
                tiny_model(config).save_pretrained(folder)
                build_tokenizer().save_pretrained(folder)
            options["model"] = str(folder)
        return tiny_bundle(family, **options)

    return make


# GGUF


EACH_FORMAT = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt_neox")


@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        *((family, "bf16") for family in IN_GGUF),
        *((family, quantize) for family in EACH_FORMAT for quantize in ("int8", "int4")),
    ],
)
def test_a_dense_gguf_is_the_bundles_dense_model(
    family: str, quantize: str, bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    bundle_dir = bundle_of(family, quantize=quantize)
    done = exported(bundle_dir, tmp_path, "gguf")
    source = find_source(str(done.folder / "model.gguf"))
    row, config = read_config(source)
    loaded = load_model(source, row, config, device="cpu", dtype="float32")
    assert done.padding_bytes == 0
    # int4's offsets are rounded to float16; all else is as it was.
    bound = 3e-5 if quantize == "int4" else 1e-9
    # The file says of mistral that its context ends where its window does.
    ids = token_ids(bundle_dir)[: config.max_position_embeddings]
    assert divergence(own_logits(bundle_dir, None)[: len(ids)], model_logits(loaded.model, ids)) < bound


def test_a_pack_has_the_width_of_each_layer(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle_dir = tiny_bundle("llama", **UNEVEN)
    chosen = choose_model(bundle_dir, cluster=1, dense=False)
    assert len(set(chosen.widths)) > 1
    done = exported(bundle_dir, tmp_path, "gguf", cluster=1)
    reader = gguf.GGUFReader(done.folder / "model.gguf")
    assert reader.fields["general.architecture"].contents() == "deci"
    widths = reader.fields["deci.feed_forward_length"].contents()
    assert widths == [-(-width // 32) * 32 for width in chosen.widths]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for layer, (width, padded) in enumerate(zip(chosen.widths, widths, strict=True)):
        for role, shape in (("gate", (width, 32)), ("up", (width, 32)), ("down", (32, width))):
            tensor = tensors[f"blk.{layer}.ffn_{role}.weight"]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            expected = float_matrix(chosen.ffn, f"layers.{layer}.{role}", shape)
            assert values.shape == ((32, padded) if role == "down" else (padded, 32))
            np.testing.assert_allclose(values[: shape[0], : shape[1]], expected, atol=2e-3)
            if role != "down":
                assert not values[width:].any()


def test_families_without_widths_by_layer_are_filled_up(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle_dir = tiny_bundle("qwen3", **UNEVEN)
    chosen = choose_model(bundle_dir, cluster=0, dense=False)
    done = exported(bundle_dir, tmp_path, "gguf", cluster=0)
    source = find_source(str(done.folder / "model.gguf"))
    row, config = read_config(source)
    width = -(-max(chosen.widths) // 32) * 32
    assert config.intermediate_size == width
    # Three matrices of 32 x width in Q4_1, 20 bytes for 32 weights.
    assert done.padding_bytes == sum(3 * 20 * (width - own) for own in chosen.widths)
    assert f"{done.padding_bytes / 1e6:.1f} MB of them zeros" in (done.folder / "README.md").read_text()
    loaded = load_model(source, row, config, device="cpu", dtype="float32")
    assert divergence(own_logits(bundle_dir, 0), model_logits(loaded.model, token_ids(bundle_dir))) < 1e-5


def llama_cpp_logits(bundle_dir: Path, cluster: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Logits:
    """Export to GGUF; llama.cpp's logits of the first tokens, which its tokenizer finds too."""
    done = exported(bundle_dir, tmp_path, "gguf", cluster=cluster, dense=cluster is None)
    ids = token_ids(bundle_dir)[:LLAMA_CPP_READS]
    model = load_llama_cpp(done.folder / "model.gguf", monkeypatch)
    assert model.tokenize(" ".join(corpus_texts()[:3]))[: len(ids)] == ids
    logits: Logits = model.logits(ids)
    return logits


@pytest.mark.parametrize("cluster", [None, 1])
@pytest.mark.parametrize("family", IN_GGUF)
def test_llama_cpp_computes_the_same(
    family: str,
    cluster: int | None,
    bundle_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle_dir = bundle_of(family, **UNEVEN | {"quantize": "bf16"})
    theirs = llama_cpp_logits(bundle_dir, cluster, tmp_path, monkeypatch)
    # llama.cpp rounds inputs to bfloat16; one layer that rotates and should not makes 0.04.
    assert divergence(own_logits(bundle_dir, cluster)[: len(theirs)], theirs) < 3e-3


def phi3_tokenizer(*, strips: bool) -> PreTrainedTokenizerFast:
    """One with the control tokens of Phi 3's; with `strips` spaces after those of turns are no part of a text."""
    data = json.loads(build_tokenizer().backend_tokenizer.to_str())
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    controls = ("<unk>", "<|endoftext|>", "<|user|>")
    del merges[-len(controls) :]
    by_id = sorted(vocabulary, key=vocabulary.__getitem__)[: -len(controls)]
    data["model"]["vocab"] = {token: index for index, token in enumerate([*by_id, *controls])}
    like = data["added_tokens"][0]
    stay = {"<s>", *controls[:2]}
    data["added_tokens"] = [
        {**like, "id": index, "content": token, "rstrip": strips and token not in stay}
        for index, token in [*enumerate(("<pad>", "<s>", "</s>")), *enumerate(controls, start=len(by_id))]
    ]
    backend = Tokenizer.from_str(json.dumps(data))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize(("name", "strips"), [("phi-3-soup", True), ("soup", True), ("phi-3-soup", False)])
def test_llama_cpp_drops_spaces_after_control_tokens_where_the_model_does(
    name: str, strips: bool, tiny_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    tiny_model(tiny_config("phi3")).save_pretrained(folder)
    phi3_tokenizer(strips=strips).save_pretrained(folder)
    done = exported(tiny_bundle("phi3", model=str(folder)), tmp_path, "gguf")
    path = done.folder / "model.gguf"
    stated = gguf.GGUFReader(path).fields["general.name"].contents()
    assert ("phi-3" in stated) == strips
    text = "<|user|>\n  soup <|user|> soup</s> soup <s> soup"
    expected = phi3_tokenizer(strips=strips)(text).input_ids
    assert load_tokenizer(find_source(str(path)))(text).input_ids == expected
    assert load_llama_cpp(path, monkeypatch).tokenize(text, special=True) == expected


# transformers


# Packs of gemma3n are refused (test_gemma3n_export.py).
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3n"])
def test_a_pack_as_a_folder_for_transformers(family: str, tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle_dir = tiny_bundle(family, **UNEVEN)
    done = exported(bundle_dir, tmp_path, "hf", cluster=0)
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    assert divergence(own_logits(bundle_dir, 0), model_logits(model, token_ids(bundle_dir))) < 1e-9
    chosen = choose_model(bundle_dir, cluster=0, dense=False)
    config = json.loads((done.folder / "config.json").read_text())
    assert config[chosen.family.ffn_dim_field] == max(chosen.widths)
    assert config["architectures"] == [type(model).__name__]
    assert model.generation_config.eos_token_id == 2
    added = sum(max(chosen.widths) - width for width in chosen.widths)
    per_neuron = (3 if chosen.family.gated else 2) * 32 + (1 if chosen.bundle.manifest.model.ffn_bias else 0)
    assert done.padding_bytes == 4 * per_neuron * added


def test_tokenizer_and_template_come_along(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle_dir = tiny_bundle("llama")
    done = exported(bundle_dir, tmp_path, "hf", cluster=2)
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    ours = Tokenizer.from_str((bundle_dir / LAYOUT.tokenizer).read_text(encoding="utf-8"))
    for text in (*corpus_texts()[:5], "Größe 漢字 </s>"):
        assert tokenizer(text).input_ids == ours.encode(text).ids
    told = tokenizer.apply_chat_template([{"role": "user", "content": "soup"}], tokenize=False)
    assert told == "<|user|>soup</s>"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


# The card


def test_the_card_says_what_it_is(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle_dir = tiny_bundle("llama")
    manifest = open_bundle(bundle_dir).manifest
    done = exported(bundle_dir, tmp_path, "gguf", cluster=3)
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\ntags:\n- coreinfer\n- gguf\n---\n")
    assert all(cluster.label in card for cluster in manifest.clusters)
    assert "| 3 (here) |" in card
    assert manifest.provenance.model_sha256 in card
    assert manifest.quality is not None
    assert f"{manifest.quality.clusters.kl:.3f}" in card


# Refusals


def test_what_llama_cpp_has_no_architecture_for(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"the family opt is not written as GGUF \(it is llama, .*--to hf"):
        exported(tiny_bundle("opt"), tmp_path, "gguf")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def changed(tiny_bundle: Callable[..., Path], make_bundle: Callable[..., Path]) -> Callable[..., ChosenModel]:
    """A function (**config fields) that returns a model whose config says so."""

    def change(**fields: Any) -> ChosenModel:
        bundle_dir = make_bundle()
        with edit_manifest(bundle_dir) as data:
            known = {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
            data["model"]["config"] |= known | fields.pop("config", {})
            data["model"] |= fields
        return choose_model(bundle_dir, cluster=None, dense=True)

    return change


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "gemma2 has no query_pre_attn_scalar of 256"),
        ("gemma3", "gemma3 has its own scale of attention"),
        ("smollm3", r"smollm3 has no no_rope_layers of \[1, 0, 1\]"),
    ],
)
def test_what_a_file_cannot_say(family: str, reason: str, tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        exported(tiny_bundle(family), tmp_path, "gguf")


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "positions scaled by 'dynamic'"),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 3.0}, "YaRN with parameters other than"),
        ({"partial_rotary_factor": 0.5}, "a part of each head"),
    ],
)
def test_positions_that_are_not_exported(
    rope: dict[str, Any], reason: str, changed: Callable[..., ChosenModel]
) -> None:
    chosen = changed(config={"rope_parameters": {"rope_theta": 10000.0, **rope}})
    with pytest.raises(UnsupportedModelError, match=reason):
        header_fields(chosen, architecture_for(chosen), chosen.widths)


def test_an_activation_that_llama_cpp_does_not_have(changed: Callable[..., ChosenModel]) -> None:
    with pytest.raises(UnsupportedModelError, match="no activation 'relu'"):
        architecture_for(changed(activation="relu"))


def test_factors_of_llama_3(changed: Callable[..., ChosenModel]) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    chosen = changed(config={"rope_parameters": rope}, head_dim=128)
    factors = rope_factors(chosen)
    assert factors is not None
    # Short waves as they are, long ones slowed down by the factor.
    assert (factors[0], factors[-1]) == (1.0, 8.0)
    assert np.all(np.diff(factors) >= 0)
    assert "llama.rope.scaling.type" not in header_fields(chosen, "llama", chosen.widths)


@pytest.mark.parametrize("family", ["mistral", "ministral"])
def test_mistrals_window_bounds_the_context(family: str, tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    done = exported(tiny_bundle(family), tmp_path, "gguf")
    reader = gguf.GGUFReader(done.folder / "model.gguf")
    assert reader.fields["llama.context_length"].contents() == 16
    assert "16 tokens: llama.cpp does not slide" in done.facts["context"]


def test_a_tokenizer_that_llama_cpp_does_not_have(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    chosen = choose_model(tiny_bundle("llama"), cluster=None, dense=True)
    # What no key of a file can say.
    path = tmp_path / LAYOUT.tokenizer
    path.parent.mkdir(parents=True)
    data = json.loads((chosen.bundle.path / LAYOUT.tokenizer).read_text(encoding="utf-8"))
    data["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(data), encoding="utf-8")
    for name in (LAYOUT.generation, LAYOUT.chat_template):
        (tmp_path / name).write_bytes(chosen.bundle.read_bytes(name))
    with pytest.raises(UnsupportedModelError, match="no tokenizer that splits text as this one"):
        vocabulary_fields(replace(chosen, bundle=replace(chosen.bundle, path=tmp_path)))
