"""gpt-oss as GGUF files: experts in MXFP4, what no file says, and there and back."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.bundles import UnsupportedModelError, open_bundle
from coreinfer.bundles.contract import expert_role
from coreinfer.bundles.errors import CoreInferError
from coreinfer.bundles.tensors import TensorFile
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.models.gguf.header import read_header
from coreinfer.compiler.models.gguf.values import read_rows, read_tensor
from coreinfer.compiler.models.load import load_model, read_config
from coreinfer.compiler.models.sources import find_source

from .bundle_factory import edit_manifest
from .gguf_experts import YARN
from .gguf_factory import Contents, contents, tiny_config, tiny_model
from .llama_cpp import load_llama_cpp
from .loading import load
from .model_factory import save_model
from .test_export import exported
from .test_gguf_mixtures import IDS, logits, save
from .test_gpt_oss import meant
from .test_mixtures import token_errors

MXFP4 = gguf.GGMLQuantizationType.MXFP4
AS_PUBLISHED: dict[str, Any] = {"swiglu_limit": 7.0, "rope_parameters": YARN}


def packed() -> Contents:
    """A file as ggml-org publishes them: experts in MXFP4, all else in floats."""
    what = contents(tiny_model(tiny_config("gpt_oss")), gguf.GGMLQuantizationType.BF16)
    what.kinds |= {name: MXFP4 for name in what.tensors if name.endswith("_exps.weight")}
    return what


def own_block(scale: int, codes: npt.NDArray[np.int64]) -> bytes:
    """A block of ggml: its scale, then the first 16 codes in low halves, the others in high ones."""
    return bytes([scale, *(int(low) | int(high) << 4 for low, high in zip(codes[:16], codes[16:], strict=True))])


def with_blocks(folder: Path, blocks: Callable[[int], bytes]) -> Path:
    """A file whose first tensor of down projections has blocks of its own."""
    path = save(packed(), folder)
    entry = read_header(path).tensors["blk.0.ffn_down_exps.weight"]
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"".join(blocks(index) for index in range(entry.num_bytes // 17)))
    return path


def test_all_numbers_of_mxfp4_are_read_exactly(tmp_path: Path) -> None:
    """Also as numbers of bfloat16, in which a compile has them."""
    random = np.random.default_rng(0)
    codes = [random.permutation(np.arange(32) % 16) for _ in range(256)]
    path = with_blocks(tmp_path, lambda index: own_block(index % 252, codes[index % 252]))
    num_blocks = read_header(path).tensors["blk.0.ffn_down_exps.weight"].num_bytes // 17
    assert num_blocks > 2 * 252
    blocks = [np.array([meant(int(code), index) for code in codes[index]]) for index in range(252)]
    expected = np.concatenate([blocks[index % 252] for index in range(num_blocks)])
    source = find_source(str(path))
    loaded = load_model(source, *read_config(source), device="cpu", dtype="bfloat16")
    tensors = loaded.mixture(0).tensors
    got = np.stack([tensors[expert_role(expert, "down")].double().numpy() for expert in range(6)])
    np.testing.assert_array_equal(got.reshape(-1), expected)


def test_it_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = save(packed(), tmp_path)
    entries = read_header(path).tensors
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == MXFP4:
            own = read_tensor(entries[tensor.name])
            np.testing.assert_array_equal(own, gguf.quants.dequantize(tensor.data, MXFP4))
            np.testing.assert_array_equal(read_rows(entries[tensor.name], slice(2, 4)), own[2:4])


@pytest.mark.parametrize("scale", [254, 255])
def test_what_is_no_number_is_named(scale: int, tmp_path: Path) -> None:
    path = with_blocks(tmp_path, lambda index: own_block(scale if index == 7 else 120, np.full(32, 7)))
    with pytest.raises(CoreInferError, match="down_proj"):
        load(path)


def test_llama_cpp_reads_the_same_from_mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(packed(), tmp_path)
    theirs = load_llama_cpp(path, monkeypatch).logits(IDS)
    # It rounds inputs to 8 bits where weights are in MXFP4; other orders of the halves make 1.3.
    assert np.median(token_errors(logits(load(path).model), theirs)) < 0.05


# Positions


def test_ramps_end_between_dimensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in all models that were published. llama.cpp rounds, but no file says so."""
    ends_between = {**YARN, "rope_theta": 1000.0}
    model = tiny_model(tiny_config("gpt_oss", rope_parameters=ends_between))
    path = save(contents(model, gguf.GGMLQuantizationType.F32), tmp_path)
    got: Any = load(path).model
    assert got.config.rope_parameters["truncate"] is False
    np.testing.assert_allclose(logits(got), logits(model), rtol=1e-4, atol=1e-4)
    rounded = tiny_model(tiny_config("gpt_oss", rope_parameters={**ends_between, "truncate": True}))
    theirs = load_llama_cpp(path, monkeypatch).logits(IDS)
    assert np.median(token_errors(logits(rounded), theirs)) < 5e-3 < np.median(token_errors(logits(model), theirs))


def test_layers_slide_as_stated(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    model = tiny_model(tiny_config("gpt_oss", layer_types=kinds, sliding_window=8))
    what = contents(model, gguf.GGMLQuantizationType.F32)
    for stated in (None, [False, True]):
        if stated is not None:
            what.metadata["gpt-oss.attention.sliding_window_pattern"] = stated
        got: Any = load(save(what, tmp_path)).model
        assert got.config.layer_types == (kinds if stated else kinds[::-1])
        close = np.allclose(logits(got), logits(model), rtol=1e-4, atol=1e-4)
        assert close == (stated is not None)


@pytest.mark.parametrize(
    ("key", "value"), [("rope.freq_base_swa", 1000.0), ("swiglu_clamp_exp", [7.0, 7.0]), ("expert_gating_func", 2)]
)
def test_what_is_not_computed_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    what = packed()
    what.metadata[f"gpt-oss.{key}"] = value
    with pytest.raises(UnsupportedModelError, match=rf"gpt-oss\.{key} = "):
        load(save(what, tmp_path))


# There and back


@pytest.fixture
def made(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> Callable[[Path, str], Path]:
    """A function (model, name) that compiles a bundle."""

    def make(model: Path, name: str) -> Path:
        config = replace(tiny_inputs("gpt_oss"), evaluate=False, controls=False, report_sentences=0)
        compile_model(replace(config, model=str(model), output=tmp_path / name, quantize="bf16"))
        return tmp_path / name

    return make


def check_same(tensors: TensorFile | None, expected: TensorFile | None) -> None:
    assert tensors is not None
    assert expected is not None
    assert set(tensors) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(tensors[name].array, expected[name].array, err_msg=name)


def test_an_export_is_compiled_to_the_same_bits(made: Callable[[Path, str], Path], tmp_path: Path) -> None:
    first = made(save_model(tmp_path / "model", "gpt_oss", **AS_PUBLISHED), "first")
    done = exported(first, tmp_path, "gguf", dense=True)
    assert "llama.cpp rounds the ends of YaRN's ramp" in (done.folder / "README.md").read_text()
    again, before = open_bundle(made(done.folder / "model.gguf", "again")), open_bundle(first)
    check_same(again.dense, before.dense)
    check_same(again.base, before.base)
    for cluster in range(len(before.manifest.clusters)):
        check_same(again.pack(cluster), before.pack(cluster))


def test_mxfp4_is_compiled_to_the_bits_that_it_has(made: Callable[[Path, str], Path], tmp_path: Path) -> None:
    path = save(packed(), tmp_path)
    stored = open_bundle(made(path, "bundle")).dense
    assert stored is not None
    entry = read_header(path).tensors["blk.1.ffn_up_exps.weight"]
    expected = read_rows(entry, slice(3, 4))[0].astype(np.float32).view(np.uint32) >> 16
    got = stored[f"layers.1.{expert_role(3, 'up')}"].array
    np.testing.assert_array_equal(got.view(np.uint16), expected)


# Refusals


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit of 5.0"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha of 1.0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings of True"),
        ({"attention_bias": False}, "attention_bias of False"),
        ({"sliding_window": None}, "no model without a sliding_window"),
        ({"rope_parameters": {**YARN, "truncate": True}}, "YaRN with parameters other"),
        ({"rope_parameters": {key: value for key, value in YARN.items() if key != "truncate"}}, "YaRN with"),
    ],
    ids=str,
)
def test_what_llama_cpp_does_not_compute_is_refused(
    changes: dict[str, Any], reason: str, tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle("gpt_oss"), tmp_path / "bundle"))
    with edit_manifest(folder) as data:
        data["model"]["config"] |= AS_PUBLISHED | changes
    with pytest.raises(UnsupportedModelError, match=rf"--to gguf: .*{reason}.*; use --to hf"):
        exported(folder, tmp_path / "out", "gguf")
