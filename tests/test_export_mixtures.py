"""Exports of mixtures of experts: dense, with fewer experts and with narrower ones, beside the bundle's own logits."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from coreinfer.bundles import UnsupportedModelError, open_bundle
from coreinfer.bundles.contract import kept_experts
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler.export.chosen import choose_model
from coreinfer.compiler.models.load import load_model, read_config
from coreinfer.compiler.models.sources import find_source
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from .bundle_factory import change_tensors, edit_manifest
from .gguf_experts import MIXTURE_SHAPES, YARN
from .model_factory import corpus_texts, save_model
from .test_export import Logits, divergence, exported, llama_cpp_logits, model_logits, own_logits, token_ids
from .test_narrow_experts import wide_settings

STORED = (
    *((family, "bf16") for family in MIXTURE_SHAPES),
    ("qwen3_moe", "int4"),
    ("granitemoe", "int4"),
    ("mixtral", "int8"),
    ("gpt_oss", "int4"),
    ("gpt_oss", "int8"),
)
# llama.cpp reads OLMoE with as many heads of keys as of queries, and has one limit for gpt-oss.
AS_LLAMA_CPP: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {"swiglu_limit": 7.0, "rope_parameters": YARN},
}
CLUSTERS = {"dense": None, "whole": 1, "narrow": 1}


@pytest.fixture
def bundle_of(tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function (family, packs, quantize) that compiles a model whose experts are narrowed unevenly by layer."""

    def make(family: str, packs: str, quantize: str = "bf16") -> Path:
        folder = tmp_path_factory.getbasetemp() / f"{family}-wide"
        if not folder.exists():
            save_model(folder, family, **wide_settings(family), **AS_LLAMA_CPP.get(family, {}))
        options: dict[str, Any] = {"model": str(folder), "quantize": quantize, "clusters": 2}
        if packs == "narrow":
            options |= {"experts": "narrow", "budgets": None, "keep": 0.6}
        return tiny_bundle(family, **options)

    return make


def token_divergences(expected: Logits, got: Logits) -> np.ndarray:
    log_p, log_q = (torch.from_numpy(logits).double().log_softmax(dim=-1) for logits in (expected, got))
    found: np.ndarray = (log_p.exp() * (log_p - log_q)).sum(dim=-1).numpy()
    return found


def text_divergences(bundle_dir: Path, cluster: int | None, model: Any) -> np.ndarray:
    """Of ten texts of six tokens, the mean divergence of the tokens of each."""
    decoder, ids, found = (
        TorchDecoder(open_bundle(bundle_dir), device="cpu", dtype="float32"),
        token_ids(bundle_dir),
        [],
    )
    decoder.use(DENSE if cluster is None else FfnChoice(cluster=cluster))
    for text in (ids[start : start + 6] for start in range(0, len(ids), 6)):
        decoder.truncate(0)
        own = np.asarray(decoder.forward(text, all_logits=True), dtype=np.float32)
        found.append(token_divergences(own, model_logits(model, text)).mean())
    return np.array(found)


@pytest.mark.parametrize("which", CLUSTERS)
@pytest.mark.parametrize(("family", "quantize"), STORED)
def test_a_gguf_file_is_what_the_bundle_holds(
    family: str, quantize: str, which: str, bundle_of: Callable[..., Path], tmp_path: Path
) -> None:
    bundle_dir = bundle_of(family, "narrow" if which == "narrow" else "whole", quantize)
    chosen = choose_model(bundle_dir, cluster=CLUSTERS[which], dense=which == "dense")
    done = exported(bundle_dir, tmp_path, "gguf", cluster=CLUSTERS[which], dense=which == "dense")
    path = done.folder / "model.gguf"
    source = find_source(str(path))
    row, config = read_config(source)
    loaded = load_model(source, row, config, device="cpu", dtype="float32")
    assert loaded.record.experts is not None
    assert loaded.record.experts.num_experts == {"dense": 6, "whole": 4, "narrow": 6}[which]
    assert loaded.record.experts.num_chosen == 2
    found = text_divergences(bundle_dir, chosen.cluster, loaded.model)
    # int4's offsets are rounded to float16, by which a token near a tie goes to another expert and changes what follows
    # it in its text; all else is as it was.
    assert np.quantile(found, 0.25) < 1e-4 if quantize == "int4" else found.max() < 1e-9
    reader = gguf.GGUFReader(path)
    kinds = {tensor.name.partition("blk.")[2].partition(".")[2]: tensor.tensor_type.name for tensor in reader.tensors}
    # llama.cpp rounds what it multiplies with, but not for float32.
    assert kinds["ffn_gate_inp.weight"] == "F32"
    assert kinds["ffn_down_exps.weight"] == {"bf16": "BF16", "int4": "Q4_1", "int8": "Q8_0"}[quantize]
    template = (bundle_dir / LAYOUT.chat_template).read_text(encoding="utf-8")
    assert reader.fields["tokenizer.chat_template"].contents() == template


def test_experts_are_filled_up_to_one_width(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    bundle_dir = bundle_of("olmoe", "narrow", "int4")
    chosen = choose_model(bundle_dir, cluster=1, dense=False)
    assert len(set(chosen.widths)) > 1
    done = exported(bundle_dir, tmp_path, "gguf", cluster=1)
    width = -(-max(chosen.widths) // 32) * 32
    # Six experts of three matrices of 32 x width in Q4_1, 20 bytes for 32 weights.
    assert done.padding_bytes == sum(6 * 3 * 20 * (width - own) for own in chosen.widths)
    assert f"{done.padding_bytes / 1e6:.1f} MB of them zeros" in (done.folder / "README.md").read_text()


@pytest.mark.parametrize("which", CLUSTERS)
@pytest.mark.parametrize(("family", "quantize"), STORED)
def test_llama_cpp_computes_the_same(
    family: str,
    quantize: str,
    which: str,
    bundle_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle_dir, cluster = bundle_of(family, "narrow" if which == "narrow" else "whole", quantize), CLUSTERS[which]
    theirs = llama_cpp_logits(bundle_dir, cluster, tmp_path, monkeypatch)
    ids = token_ids(bundle_dir)[: len(theirs)]
    native = NativeDecoder(open_bundle(bundle_dir), threads=1)
    native.use(DENSE if cluster is None else FfnChoice(cluster=cluster))
    # Both round inputs; where two experts are almost equally likely that chooses the other one.
    assert float(np.median(token_divergences(native.forward(ids, all_logits=True), theirs))) < 3e-3
    # Inputs that are not rounded choose another one more often, and a token changes all that follow it in its text.
    floats = token_divergences(own_logits(bundle_dir, cluster)[: len(ids)], theirs)
    assert float(np.quantile(floats, 0.25)) < 1e-2


@pytest.mark.parametrize("which", CLUSTERS)
@pytest.mark.parametrize("family", MIXTURE_SHAPES)
def test_a_folder_for_transformers(family: str, which: str, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    bundle_dir, cluster = bundle_of(family, "narrow" if which == "narrow" else "whole"), CLUSTERS[which]
    done = exported(bundle_dir, tmp_path, "hf", cluster=cluster, dense=cluster is None)
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    ids = token_ids(bundle_dir)
    assert divergence(own_logits(bundle_dir, cluster), model_logits(model, ids)) < 1e-9
    chosen = choose_model(bundle_dir, cluster=cluster, dense=cluster is None)
    assert chosen.experts is not None
    assert done.facts["width"] == f"{len(chosen.experts[0])} experts of {max(chosen.widths)} neurons in each layer"
    # Of each expert three matrices of 32 x width, in float32, and two biases.
    added = sum(max(chosen.widths) - width for width in chosen.widths)
    assert done.padding_bytes == 4 * 6 * (3 * 32 + 2 * chosen.bundle.manifest.model.ffn_bias) * added
    assert AutoTokenizer.from_pretrained(done.folder)(" ".join(corpus_texts()[:3])).input_ids[:60] == ids


@pytest.fixture
def copied(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """A function (family) that copies a tiny bundle, so that it may be changed."""
    return lambda family: Path(shutil.copytree(tiny_bundle(family), tmp_path / "bundle"))


@pytest.mark.parametrize("form", ["gguf", "hf"])
def test_layers_of_unlike_numbers_of_experts_are_refused(
    form: str, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied("mixtral")
    with edit_manifest(folder) as data:
        data["clusters"][1]["layer_budgets"][2] = 3 * 96

    def cut(tensors: dict[str, StoredTensor]) -> None:
        tensors["layers.2.experts"] = StoredTensor("I32", tensors["layers.2.experts"].array[:3])

    change_tensors(folder, "clusters/001.safetensors", cut)
    bundle = open_bundle(folder)
    assert [len(layer) for layer in kept_experts(bundle.pack(1), bundle.manifest)] == [4, 4, 3]
    with pytest.raises(
        UnsupportedModelError,
        match=r"--cluster 1: its layers have 3 to 4 experts, .* compile with --budgets uniform, or give --dense",
    ):
        exported(folder, tmp_path / "out", form, cluster=1)
    assert exported(folder, tmp_path / "other", form, cluster=0).num_bytes


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_weights_that_llama_cpp_would_normalize_are_refused(
    family: str, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied(family)
    with edit_manifest(folder) as data:
        data["model"]["experts"]["normalizes"] = False
    with pytest.raises(
        UnsupportedModelError, match=rf"llama\.cpp's {family} divides .* with this model it is the other"
    ):
        exported(folder, tmp_path / "out", "gguf")


def test_what_a_bundle_does_not_hold_is_named(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """Such as biases of experts and routers, which other mixtures have."""
    folder = copied("granitemoe")
    with edit_manifest(folder) as data:
        data["model"]["config"]["attention_bias"] = True
    with pytest.raises(
        UnsupportedModelError, match=r"it has no tensor model\.layers\.0\.self_attn\.k_proj\.bias, which"
    ):
        exported(folder, tmp_path / "out", "hf")


def test_an_olmoe_that_llama_cpp_does_not_load_is_refused(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="olmoe has no num_key_value_heads of 2; use --to hf"):
        exported(tiny_bundle("olmoe"), tmp_path, "gguf")
    assert exported(tiny_bundle("olmoe"), tmp_path, "hf").num_bytes
