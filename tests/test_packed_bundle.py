"""Bundles whose matrices are packed: what is stored how, and what the torch engine reads."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import Bundle, open_bundle
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.families import family_by_name
from coreinfer.bundles.formats import GROUP_SIZE, float_matrix
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import TensorRecord, read_manifest
from coreinfer.bundles.tensors import StoredTensor, TensorFile
from coreinfer.bundles.writer import finish_manifest
from coreinfer.compiler import CompileConfig, Progress, compile_model
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.engines.torch.joined import take_apart

from .bundle_factory import change_tensors
from .model_factory import SHAPES, build_model

CODES = {"int4": ".q4", "int8": ".q8", "int8-planes": ".high", "bf16": ""}
ERRORS = {"int4": 0.16, "int8": 0.015, "bf16": 0.0}
"""Norm of what rounding does to a random matrix, relative to the matrix's norm."""


def formats(bundle: Bundle) -> dict[str, str]:
    return {group: record.format for group, record in bundle.manifest.quantization.items()}


@pytest.mark.parametrize(
    ("options", "body", "head"),
    [
        ({"quantize": "int4"}, "int4", "int8-planes"),
        ({"quantize": "int8"}, "int8", "int8-planes"),
        ({"quantize": "bf16"}, "bf16", "bf16"),
        ({"quantize": "int4", "head_quantize": "int4"}, "int4", "int4"),
        ({"quantize": "int8", "head_quantize": "bf16"}, "int8", "bf16"),
        ({"quantize": "bf16", "head_quantize": "int8"}, "bf16", "int8-planes"),
    ],
)
def test_options_say_how_each_group_is_stored(
    options: dict[str, str], body: str, head: str, tiny_bundle: Callable[..., Path]
) -> None:
    bundle = open_bundle(tiny_bundle("qwen3", **options))
    assert formats(bundle) == {"embedding": head, "attention": body, "norm": "f32", "head": head, "ffn": body}
    sizes = {group: record.group_size for group, record in bundle.manifest.quantization.items()}
    packed = {group: GROUP_SIZE if kind.startswith("int") else None for group, kind in formats(bundle).items()}
    assert sizes == packed
    for name, kind in [("model.embed_tokens", head), ("lm_head", head), ("model.layers.1.self_attn.q_proj", body)]:
        assert f"{name}.weight{CODES[kind]}" in bundle.base
    assert bundle.base["model.layers.1.self_attn.q_norm.weight"].dtype == "F32"
    assert bundle.dense is not None
    for file in (bundle.dense, bundle.pack(3)):
        assert all(tensor_name(2, role) + CODES[body] in file for role in ("gate", "up", "down"))


def test_what_is_no_linear_layer_stays_bf16(tiny_bundle: Callable[..., Path]) -> None:
    base = open_bundle(tiny_bundle("opt-post-norm", quantize="int4")).base
    assert base["model.decoder.embed_positions.weight"].dtype == "BF16"
    assert "model.decoder.project_in.weight.q4" in base
    assert "model.decoder.project_out.weight.q4" in base
    assert base["model.decoder.layers.0.self_attn.q_proj.bias"].dtype == "F32"


def test_a_tied_head_is_stored_once(tiny_bundle: Callable[..., Path]) -> None:
    base = open_bundle(tiny_bundle("llama", quantize="int4")).base
    assert "model.embed_tokens.weight.high" in base
    assert not any(name.startswith("lm_head") for name in base)


def weight_bytes(file: TensorFile) -> int:
    matrices = ("gate", "up", "down")
    return sum(stored.num_bytes for name, stored in file.items() if name.split(".")[2] in matrices)


@pytest.mark.parametrize("kind", ["int4", "int8", "bf16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_manifest_counts_packed_bytes(family: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle(family, quantize=kind))
    assert bundle.dense is not None
    assert bundle.manifest.ffn_bytes == weight_bytes(bundle.dense)
    for number, cluster in enumerate(bundle.manifest.clusters):
        assert cluster.ffn_bytes == weight_bytes(bundle.pack(number))


def relative_error(got: Any, expected: Any) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("family", SHAPES)
def test_torch_reads_what_is_stored(family: str, kind: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle(family, quantize=kind))
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    model = build_model(family)
    take_apart(model, family_by_name(bundle.manifest.model.family))
    original = dict(model.named_parameters())
    parameters = dict(decoder._model.named_parameters())
    assert set(parameters) == set(original)
    for name, parameter in parameters.items():
        # The FFN is that of `DENSE`, which is in use from the start.
        got, expected = parameter.detach().numpy(), original[name].detach().numpy()
        assert got.shape == expected.shape
        assert relative_error(got, expected) <= (ERRORS[kind] if expected.ndim == 2 else 1e-6), name


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_torch_decodes_with_a_packs_weights(kind: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle, exact = (open_bundle(tiny_bundle("llama", quantize=name)) for name in (kind, "bf16"))
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    decoder.use(FfnChoice(cluster=2))
    for layer, module in enumerate(decoder._layers):
        width = bundle.manifest.plan.layer_budgets[layer]
        for role, shape in {"gate": (width, 32), "up": (width, 32), "down": (32, width)}.items():
            name = tensor_name(layer, role)
            weight = module.get_submodule(decoder._family.projections[role]).weight.numpy()  # type: ignore[operator]
            np.testing.assert_array_equal(weight, float_matrix(bundle.pack(2), name, shape))
            assert relative_error(weight, float_matrix(exact.pack(2), name, shape)) < ERRORS[kind]


def test_torch_gathers_neurons_of_unpacked_weights(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("opt", quantize="int4"))
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    modules: list[Any] = [layer.get_submodule(decoder._family.down) for layer in decoder._layers]
    whole = [module.weight.clone() for module in modules]
    ids = np.arange(1, 96, 3, dtype=np.int32)
    decoder.use(FfnChoice(neuron_ids=(ids, ids, ids)))
    for module, dense in zip(modules, whole, strict=True):
        np.testing.assert_array_equal(module.weight.numpy(), dense[:, ids].numpy())


def test_packed_bundles_generate(tiny_bundle: Callable[..., Path]) -> None:
    modes: list[runtime.Mode] = ["similarity", "stability", "fused", "dense"]
    engine = runtime.load(tiny_bundle("qwen2", quantize="int4"), engine="torch", device="cpu", dtype="bfloat16")
    for mode in modes:
        assert engine.generate("The sea text number 3", raw=True, mode=mode, max_new_tokens=4).token_ids


def test_the_same_options_give_the_same_packed_bytes(
    tiny_inputs: Callable[[str], CompileConfig], tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Also when the moments come from the cache."""
    config = replace(tiny_inputs("llama"), quantize="int4", cache_dir=tmp_path / "cache")
    first = read_manifest(tiny_bundle("llama", quantize="int4")).files
    for name in ("cold", "warm"):
        progress = Progress()
        assert compile_model(replace(config, output=tmp_path / name), progress).files == first
        assert ("moments" in progress.stage_seconds) == (name == "cold")


def test_bf16_needs_no_moments(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    progress = Progress()
    compile_model(replace(tiny_inputs("llama"), output=tmp_path / "bundle", evaluate=False), progress)
    assert "moments" not in progress.stage_seconds


def rewrite_base(bundle_dir: Path, change: Callable[[dict[str, StoredTensor]], object]) -> None:
    """Change the base as a compiler with a mistake would: with a manifest that knows of it."""
    change_tensors(bundle_dir, LAYOUT.base, change)
    file = TensorFile(bundle_dir / LAYOUT.base)
    shapes = {name: file.shape_of(name) for name in file}
    records = {name: TensorRecord(dtype=dtype, shape=shape) for name, (dtype, shape) in shapes.items()}
    finish_manifest(bundle_dir, replace(read_manifest(bundle_dir), base_tensors=records, files={}))


NAME = "model.layers.1.self_attn.o_proj.weight"


def _cut(tensors: dict[str, StoredTensor]) -> None:
    tensors[f"{NAME}.scale"] = StoredTensor("F16", tensors[f"{NAME}.scale"].array[:, :, :8].copy())


def _misfit(engine: str, bundle_dir: Path, change: Callable[[dict[str, StoredTensor]], object]) -> str:
    rewrite_base(bundle_dir, change)
    dtype = "float32" if engine == "torch" else "auto"
    with pytest.raises(runtime.BundleCorrupt) as caught:
        runtime.load(bundle_dir, engine=engine, device="cpu", dtype=dtype)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def packed_copy(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle("llama", quantize="int4"), tmp_path / "copy"))


@pytest.mark.parametrize("part", ["q4", "scale", "zero"])
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_packed_base_that_lacks_a_part(engine: str, part: str, packed_copy: Path) -> None:
    message = _misfit(engine, packed_copy, lambda tensors: tensors.pop(f"{NAME}.{part}"))
    assert "o_proj.weight" in message


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_packed_base_with_a_part_of_another_shape(engine: str, packed_copy: Path) -> None:
    message = _misfit(engine, packed_copy, _cut)
    if engine == "torch":
        assert "o_proj.weight.scale': expected F16 [2, 1, 16], got F16 [2, 1, 8]" in message


def test_a_packed_base_with_a_matrix_that_no_one_knows(packed_copy: Path) -> None:
    message = _misfit("torch", packed_copy, lambda tensors: tensors.update({"stranger.q4": tensors[f"{NAME}.q4"]}))
    assert "unknown ['stranger']" in message


def test_dense_is_used_from_the_start(tiny_bundle: Callable[..., Path]) -> None:
    decoder = TorchDecoder(open_bundle(tiny_bundle("llama", quantize="int4")), device="cpu", dtype="float32")
    before = decoder.forward([1, 2, 3])
    decoder.truncate(0)
    decoder.use(DENSE)
    np.testing.assert_array_equal(decoder.forward([1, 2, 3]), before)
