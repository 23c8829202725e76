"""The torch engine: its cache, its weights in memory, and bases that do not fit."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import open_bundle, read_manifest
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import TensorRecord
from coreinfer.bundles.tensors import StoredTensor, TensorFile
from coreinfer.bundles.writer import finish_manifest
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch import model as torch_model
from coreinfer.runtime.engines.torch.decoder import TorchDecoder

from .bundle_factory import change_tensors, edit_manifest, flip_bit, list_again
from .model_factory import SHAPES

TOKEN_IDS = [1, 57, 200, 300, 21, 99, 140, 7, 250, 33, 180, 77, 310, 64, 205, 18, 91, 120, 260, 45, 150, 11]
OTHER_IDS = [9, 8, 77, 301, 12, 200, 5]
NEURON_IDS = tuple(np.arange(start, 96, 2, dtype=np.int32) for start in (0, 1, 0))


@pytest.fixture
def decoder(tiny_bundle: Callable[..., Path]) -> Callable[..., TorchDecoder]:
    def build(family: str = "llama", dtype: str = "float32", **options: Any) -> TorchDecoder:
        return TorchDecoder(open_bundle(tiny_bundle(family, **options)), device="cpu", dtype=dtype)

    return build


@pytest.fixture
def bundle_copy(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle("llama"), tmp_path / "copy"))


def logits_with(decoder: TorchDecoder, choice: FfnChoice) -> npt.NDArray[np.float32]:
    decoder.truncate(0)
    decoder.use(choice)
    return decoder.forward(TOKEN_IDS, all_logits=True)


# The KV cache


@pytest.mark.parametrize("kept", [0, 1, 9, 17, 21, 22])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3", "mistral"])
def test_what_follows_a_truncation_is_as_if_nothing_had_been(
    family: str, kept: int, decoder: Callable[..., TorchDecoder]
) -> None:
    used, fresh = decoder(family), decoder(family)
    used.forward(TOKEN_IDS)
    used.truncate(kept)
    assert used.num_cached == kept
    expected = fresh.forward([*TOKEN_IDS[:kept], *OTHER_IDS], all_logits=True)[kept:]
    np.testing.assert_allclose(used.forward(OTHER_IDS, all_logits=True), expected, atol=2e-4, rtol=1e-4)
    assert used.num_cached == kept + len(OTHER_IDS)


def test_truncating_to_more_than_there_is_changes_nothing(decoder: Callable[..., TorchDecoder]) -> None:
    used, fresh = decoder(), decoder()
    used.forward(TOKEN_IDS)
    used.truncate(100)
    assert used.num_cached == len(TOKEN_IDS)
    expected = fresh.forward([*TOKEN_IDS, 5])
    np.testing.assert_allclose(used.forward([5]), expected, atol=2e-4, rtol=1e-4)


def test_last_logits_are_the_last_of_all(decoder: Callable[..., TorchDecoder]) -> None:
    used = decoder()
    every = used.forward(TOKEN_IDS, all_logits=True)
    assert every.shape == (len(TOKEN_IDS), 384)
    used.truncate(0)
    last = used.forward(TOKEN_IDS)
    assert last.shape == (1, 384)
    assert last.dtype == np.float32
    np.testing.assert_allclose(last[0], every[-1], atol=1e-5)


def test_a_statistic_leaves_the_cache_and_the_logits_as_forward_does(decoder: Callable[..., TorchDecoder]) -> None:
    used, plain = decoder(), decoder()
    expected = plain.forward(TOKEN_IDS)
    logits, statistics = used.prompt_statistics(TOKEN_IDS, ("griffin",))
    statistic = statistics["griffin"]
    np.testing.assert_array_equal(logits, expected)
    assert used.num_cached == len(TOKEN_IDS)
    before = statistic.copy()
    np.testing.assert_array_equal(used.forward([4]), plain.forward([4]))
    np.testing.assert_array_equal(statistic, before)
    hooks = [module._forward_pre_hooks for module in used._model.modules()]
    assert not any(hooks)


# The FFN weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", SHAPES)
def test_weights_come_back_as_they_were(family: str, dtype: str, decoder: Callable[..., TorchDecoder]) -> None:
    used = decoder(family, dtype)
    own = FfnChoice(neuron_ids=NEURON_IDS)
    choices = [DENSE, FfnChoice(cluster=0), FfnChoice(cluster=3), own]
    first = [logits_with(used, choice) for choice in choices]
    assert all(np.abs(a - b).max() > 0.05 for n, a in enumerate(first) for b in first[:n])
    for number in (3, 1, 0, 2, 1, 3, 0, 3, 3, 2):
        np.testing.assert_array_equal(logits_with(used, choices[number]), first[number])


def test_neurons_change_to_other_neurons(decoder: Callable[..., TorchDecoder]) -> None:
    used = decoder()
    other = FfnChoice(neuron_ids=tuple(95 - ids[::-1] for ids in NEURON_IDS))
    assert [ids.tolist() for ids in other.neuron_ids or ()] != [ids.tolist() for ids in NEURON_IDS]
    expected = logits_with(decoder(), other)
    logits_with(used, FfnChoice(neuron_ids=NEURON_IDS))
    np.testing.assert_array_equal(logits_with(used, other), expected)


def test_the_dense_ffn_cannot_be_used_where_there_is_none(decoder: Callable[..., TorchDecoder]) -> None:
    used = decoder(dense=False)
    before = logits_with(used, FfnChoice(cluster=1))
    for choice in (DENSE, FfnChoice(neuron_ids=NEURON_IDS)):
        with pytest.raises(runtime.ConfigError, match=r"has no dense FFN.*--dense"):
            used.use(choice)
    np.testing.assert_array_equal(logits_with(used, FfnChoice(cluster=1)), before)


def address(stored: StoredTensor) -> int:
    start: int = stored.array.__array_interface__["data"][0]
    return start


def ffn_addresses(decoder: TorchDecoder) -> Iterator[tuple[int, str, int]]:
    for layer, module in enumerate(decoder._layers):
        for role, path in decoder._family.projections.items():
            yield layer, role, module.get_submodule(path).weight.data_ptr()  # type: ignore[operator]


@pytest.mark.parametrize("family", SHAPES)
def test_in_bfloat16_the_weights_are_the_mapped_file(family: str, decoder: Callable[..., TorchDecoder]) -> None:
    used = decoder(family, "bfloat16")
    matrices = {name: stored for name, stored in used._bundle.base.items() if stored.dtype == "BF16"}
    assert len(matrices) >= 12
    parameters = dict(used._model.named_parameters(remove_duplicate=False))
    for name, stored in matrices.items():
        assert parameters[name].data_ptr() == address(stored), name
    for choice, file in (
        (FfnChoice(cluster=2), used._bundle.packs[2]),
        (DENSE, used._bundle.dense),
        (FfnChoice(cluster=0), used._bundle.packs[0]),
    ):
        used.use(choice)
        assert file is not None
        for layer, role, start in ffn_addresses(used):
            assert start == address(file[tensor_name(layer, role)]), (layer, role)


def test_a_tied_head_is_not_held_twice(decoder: Callable[..., TorchDecoder]) -> None:
    for dtype in ("bfloat16", "float32"):
        parameters = dict(decoder("llama", dtype)._model.named_parameters(remove_duplicate=False))
        assert parameters["lm_head.weight"].data_ptr() == parameters["model.embed_tokens.weight"].data_ptr()


def test_generating_leaves_the_file_as_it_is(bundle_copy: Path) -> None:
    before = {path: path.read_bytes() for path in bundle_copy.rglob("*") if path.is_file()}
    engine = runtime.load(bundle_copy, device="cpu", dtype="bfloat16")
    modes: list[runtime.Mode] = ["similarity", "stability", "fused", "dense"]
    for mode in modes:
        engine.generate("The sea text number 3", raw=True, mode=mode, max_new_tokens=4)
    assert {path: path.read_bytes() for path in bundle_copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "choice", [DENSE, FfnChoice(cluster=1), FfnChoice(neuron_ids=NEURON_IDS)], ids=["dense", "pack", "neurons"]
)
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_dtypes_agree_up_to_rounding(family: str, choice: FfnChoice, decoder: Callable[..., TorchDecoder]) -> None:
    exact = logits_with(decoder(family, "float32"), choice)
    rounded = logits_with(decoder(family, "bfloat16"), choice)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    # bfloat16 has 8 bits: an eighth of a percent to half a percent for each of some twenty roundings.
    assert 1e-4 < error < 0.06


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_goes_by_the_processor(
    native: bool, expected: torch.dtype, decoder: Callable[..., TorchDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_model, "cpu_multiplies_bf16", lambda: native)
    assert {parameter.dtype for parameter in decoder(dtype="auto")._model.parameters()} == {expected}


# Bases that do not fit


def rewrite_base(bundle_dir: Path, change: Callable[[dict[str, StoredTensor]], object]) -> None:
    """Change the base as a compiler with a mistake would: with a manifest that knows of it."""
    change_tensors(bundle_dir, LAYOUT.base, change)
    records = {
        name: TensorRecord(dtype=stored.dtype, shape=tuple(stored.array.shape))
        for name, stored in TensorFile(bundle_dir / LAYOUT.base).items()
    }
    finish_manifest(bundle_dir, replace(read_manifest(bundle_dir), base_tensors=records, files={}))


def corruption(bundle_dir: Path) -> str:
    with pytest.raises(runtime.BundleCorrupt) as caught:
        runtime.load(bundle_dir, device="cpu", dtype="float32")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"]
)
def test_a_base_that_lacks_a_tensor(name: str, bundle_copy: Path) -> None:
    rewrite_base(bundle_copy, lambda tensors: tensors.pop(name))
    message = corruption(bundle_copy)
    assert LAYOUT.base in message
    assert f"missing ['{name}'" in message


def test_a_base_with_a_tensor_that_no_one_knows(bundle_copy: Path) -> None:
    rewrite_base(bundle_copy, lambda tensors: tensors.update(extra=tensors["model.norm.weight"]))
    assert "unknown ['extra']" in corruption(bundle_copy)


def test_a_base_with_another_shape(bundle_copy: Path) -> None:
    def widen(tensors: dict[str, StoredTensor]) -> None:
        tensors["model.norm.weight"] = StoredTensor("F32", np.ones(33, dtype=np.float32))

    rewrite_base(bundle_copy, widen)
    message = corruption(bundle_copy)
    assert LAYOUT.base in message
    assert "model.norm.weight" in message


@pytest.mark.parametrize("change", [{"model_type": "no-such-model"}, {"model_type": None}])
def test_a_config_that_no_model_has(change: dict[str, Any], bundle_copy: Path) -> None:
    with edit_manifest(bundle_copy) as data:
        data["model"]["config"].update(change)
        if change["model_type"] is None:
            del data["model"]["config"]["model_type"]
    assert "model.config" in corruption(bundle_copy)


# Whole bundles, damaged


def bundle_files(bundle_dir: Path) -> list[str]:
    return sorted(path.relative_to(bundle_dir).as_posix() for path in bundle_dir.rglob("*") if path.is_file())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def load_and_use(bundle_dir: Path) -> None:
    """Packs are hashed when they are first used."""
    engine = runtime.load(bundle_dir, device="cpu", dtype="float32")
    for cluster in range(len(engine.manifest.clusters)):
        engine.decoder.use(FfnChoice(cluster=cluster))


@pytest.mark.parametrize("damage", [Path.unlink, _cut, flip_bit], ids=["missing", "cut", "bit"])
def test_every_file_counts(damage: Callable[[Path], None], bundle_copy: Path) -> None:
    names = bundle_files(bundle_copy)
    assert len(names) == 14
    for name in names:
        path = bundle_copy / name
        whole = path.read_bytes()
        damage(path)
        expected = name if name != LAYOUT.manifest else str(bundle_copy)
        with pytest.raises(runtime.BundleError) as caught:
            load_and_use(bundle_copy)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    assert (
        runtime.load(bundle_copy, device="cpu", dtype="float32").generate("sea", raw=True, max_new_tokens=1).token_ids
    )


def test_all_damaged_files_are_named_at_once(bundle_copy: Path) -> None:
    (bundle_copy / LAYOUT.base).unlink()
    flip_bit(bundle_copy / LAYOUT.router_index)
    _cut(bundle_copy / LAYOUT.cluster(2))
    message = corruption(bundle_copy)
    for name in (LAYOUT.base, LAYOUT.router_index, LAYOUT.cluster(2)):
        assert name in message


@pytest.mark.parametrize("version", [0, 1, 99, "2", None])
def test_another_schema_version(version: Any, bundle_copy: Path) -> None:
    with edit_manifest(bundle_copy) as data:
        data["schema_version"] = version
    with pytest.raises(runtime.BundleVersionError, match="schema version"):
        runtime.load(bundle_copy)


@pytest.mark.parametrize("outside", ["../outside.bin", "/etc/hostname", "clusters/../../outside.bin"])
def test_a_manifest_that_points_outside(outside: str, bundle_copy: Path) -> None:
    (bundle_copy.parent / "outside.bin").write_bytes(b"secret")
    with edit_manifest(bundle_copy) as data:
        data["files"][outside] = {"sha256": "0" * 64, "bytes": 6}
    assert "no path inside the bundle" in corruption(bundle_copy)


@pytest.mark.parametrize("what", ["nothing", "file", "empty folder"])
def test_no_bundle(what: str, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    if what == "file":
        path.write_text("text")
    elif what == "empty folder":
        path.mkdir()
    with pytest.raises(runtime.BundleNotFound, match=str(path)):
        runtime.load(path)


@pytest.mark.parametrize(
    ("name", "garbage"),
    [
        (LAYOUT.tokenizer, b"{}"),
        (LAYOUT.tokenizer, b"\xff\xfe"),
        (LAYOUT.generation, b"not json"),
        (LAYOUT.generation, b"\xff\xfe"),
        (LAYOUT.generation, b"[]"),
        (LAYOUT.generation, b'{"eos_token_ids": [2]}'),
        (LAYOUT.generation, b'{"eos_token_ids": ["end"], "special_tokens": {}}'),
        (LAYOUT.generation, b'{"eos_token_ids": [2], "special_tokens": ["<s>"]}'),
        (LAYOUT.chat_template, b"\xff\xfe"),
    ],
)
def test_garbage_with_the_right_checksum(name: str, garbage: bytes, bundle_copy: Path) -> None:
    (bundle_copy / name).write_bytes(garbage)
    list_again(bundle_copy)
    assert name in corruption(bundle_copy)
