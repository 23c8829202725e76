"""The dense model of a Gemma 3n bundle as a folder for transformers and as a GGUF file; packs are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from coreinfer.bundles import UnsupportedModelError
from coreinfer.compiler.export.exporting import ExportedFiles, export_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from .bundle_factory import edit_manifest
from .gguf_factory import Contents, tiny_config, tiny_model, write
from .llama_cpp import load_llama_cpp
from .loading import load
from .model_factory import VOCABULARY, build_tokenizer
from .test_export import divergence, model_logits, own_logits, token_ids

NUM_LAYERS, NUM_ROWS = 22, 300
AS_PUBLISHED: dict[str, Any] = {
    "num_hidden_layers": NUM_LAYERS,
    "num_kv_shared_layers": 2,
    "layer_types": ["full_attention" if (layer + 1) % 5 == 0 else "sliding_attention" for layer in range(NUM_LAYERS)],
    "sliding_window": 16,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (NUM_LAYERS - 10),
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 256,
    "laurel_rank": 64,
    "altup_active_idx": 0,
    "vocab_size_per_layer_input": NUM_ROWS,
}
"""What llama.cpp has for all models of the architecture, and fewer layers, of which two share keys and values."""


def published_model() -> PreTrainedModel:
    """One whose logits do not hang on the last bit: 22 layers of large random matrices are chaos."""
    model = tiny_model(tiny_config("gemma3n", **AS_PUBLISHED))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter / 6 if parameter.ndim > 1 else parameter).bfloat16().float())
    return model


@pytest.fixture(scope="module")
def published(tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A bundle of a model that llama.cpp computes."""
    folder = tmp_path_factory.mktemp("gemma3n")
    published_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return lambda quantize: tiny_bundle("gemma3n", model=str(folder), quantize=quantize, evaluate=False)


def exported(bundle_dir: Path, folder: Path, form: str) -> ExportedFiles:
    return export_model(bundle_dir, folder / "export", form=form, cluster=None, dense=True, dtype="float32")


@pytest.mark.parametrize("quantize", ["bf16", "int8", "int4"])
def test_a_folder_for_transformers(quantize: str, tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle_dir = tiny_bundle("gemma3n", quantize=quantize)
    done = exported(bundle_dir, tmp_path, "hf")
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    assert model.config.activation_sparsity_pattern == [0.6, 0.0, 0.75]
    # What is taken off the gates is rounded in a bundle.
    assert divergence(own_logits(bundle_dir, None), model_logits(model, token_ids(bundle_dir))) < 1e-4


@pytest.mark.parametrize("quantize", ["bf16", "int8", "int4"])
def test_a_gguf_file_is_the_same_model(quantize: str, published: Callable[..., Path], tmp_path: Path) -> None:
    bundle_dir = published(quantize)
    done = exported(bundle_dir, tmp_path / "gguf", "gguf")
    expected = AutoModelForCausalLM.from_pretrained(exported(bundle_dir, tmp_path, "hf").folder, dtype=torch.float32)
    loaded = load(done.folder / "model.gguf")
    # Of tokens beyond the layers' table each has the row of token 0; int4's offsets are rounded to float16.
    ids = [*token_ids(bundle_dir), *range(NUM_ROWS - 5, VOCABULARY, 7)]
    bound = 5e-3 if quantize == "int4" else 1e-9
    assert divergence(model_logits(expected, ids), model_logits(loaded.model, ids)) < bound
    assert done.padding_bytes == 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(done.folder / "model.gguf").tensors}
    assert tensors["altup_proj.weight"].shape.tolist() == [64, 64, 3]
    for layer in (NUM_LAYERS - 2, NUM_LAYERS - 1):
        assert not np.asarray(tensors[f"blk.{layer}.attn_k.weight"].data).any()
    assert "llama.cpp takes their deviation over one gate less" in (done.folder / "README.md").read_text()


def in_float32(path: Path) -> Path:
    """The same file with all tensors in float32: of others llama.cpp rounds what they are multiplied with."""
    reader = gguf.GGUFReader(path)
    what = Contents(
        architecture="gemma3n",
        metadata={key: field.contents() for key, field in reader.fields.items() if key not in _HEADER},
        tensors={
            tensor.name: np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(
                tensor.shape.tolist()[::-1]
            )
            for tensor in reader.tensors
        },
    )
    return write(path.with_name("float32.gguf"), what)[0]


_HEADER = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")


@pytest.mark.parametrize("quantize", ["bf16", "int8", "int4"])
def test_llama_cpp_computes_the_same(
    quantize: str, published: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_dir = published(quantize)
    path = exported(bundle_dir, tmp_path, "gguf").folder / "model.gguf"
    ids = [*token_ids(bundle_dir)[:35], *range(NUM_ROWS - 5, NUM_ROWS + 5)]
    rounding, exact = (load_llama_cpp(file, monkeypatch).logits(ids) for file in (path, in_float32(path)))
    model = AutoModelForCausalLM.from_pretrained(exported(bundle_dir, tmp_path / "hf", "hf").folder)
    as_trained = model_logits(model.float(), ids)
    deviation = torch.std

    def over_one_less(*values: Any, **options: Any) -> torch.Tensor:
        return deviation(*values, **{**options, "unbiased": True})

    # Of 96 gates that makes 0.5%, and of the published models' 8192 a hundredth of it.
    monkeypatch.setattr(torch, "std", over_one_less)
    as_llama_cpp = model_logits(model, ids)
    assert divergence(as_llama_cpp, exact) < (5e-3 if quantize == "int4" else 1e-3)
    assert divergence(as_trained, as_llama_cpp) > 5e-3
    assert divergence(as_llama_cpp, rounding) < 0.1


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_packs_are_refused(form: str, tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"packs of the family gemma3n are not exported.*give --dense"):
        export_model(tiny_bundle("gemma3n"), tmp_path / "export", form=form, cluster=0, dense=False, dtype="bfloat16")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("altup_num_inputs", 3),
        ("altup_active_idx", 1),
        ("altup_correct_scale", False),
        ("hidden_size_per_layer_input", 128),
        ("laurel_rank", 32),
        ("final_logit_softcapping", 20.0),
        ("num_kv_shared_layers", 3),
        ("activation_sparsity_pattern", [0.95] * 9 + [0.0] * 13),
        ("layer_types", ["full_attention"] * NUM_LAYERS),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    field: str, value: Any, published: Callable[..., Path], tmp_path: Path
) -> None:
    bundle_dir = Path(shutil.copytree(published("int8"), tmp_path / "bundle"))
    with edit_manifest(bundle_dir) as data:
        data["model"]["config"][field] = value
    with pytest.raises(UnsupportedModelError, match=rf"gemma3n (has no {field}|slides in all layers but every fifth)"):
        exported(bundle_dir, tmp_path, "gguf")
