"""Quality is measured as a bundle's files hold the model, not as the compiler holds it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.errors import BundleError
from coreinfer.bundles.families import assign_ffn, cache_argument
from coreinfer.bundles.formats import float_matrix
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.tensors import StoredTensor, TensorFile
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.prune.narrow import NarrowModel, narrow_layer
from coreinfer.compiler.quality import stored as stored_module
from coreinfer.compiler.quality.reference import read_reference
from coreinfer.compiler.quality.score import evaluate
from coreinfer.compiler.quality.stored import StoredModel, base_in_use, store_model, stored_packs
from coreinfer.compiler.quality.tally import Tally, compare_logits
from coreinfer.compiler.quantize import pack as packing
from coreinfer.compiler.quantize.moments import ffn_moments
from coreinfer.compiler.quantize.pack import Packer
from coreinfer.compiler.quantize.quantize import QuantizeOptions, store_matrix
from coreinfer.compiler.team.alone import Alone
from transformers import DynamicCache

from .test_evaluating import load, narrow_model
from .test_pipeline import contents

LABELS = np.array([0, 1, 1, 0, 1])
FORMATS = [
    QuantizeOptions(body="int4", head="int8-planes"),
    QuantizeOptions(body="int8", head="int4"),
    QuantizeOptions(body="bf16", head="bf16"),
]


@pytest.fixture(scope="module", params=["llama", "opt", "opt-post-norm", "gemma3"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return load(request.param)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    generator = np.random.default_rng(4)
    return [generator.integers(3, 60, length).tolist() for length in (20, 9, 33, 16, 41)]


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    parts = store_matrix("weight", weight, kind, None)
    return torch.from_numpy(float_matrix(parts, "weight", (weight.shape[0], weight.shape[1])))


def twin_of(loaded: LoadedModel, formats: QuantizeOptions) -> torch.nn.Module:
    """A copy of the dense model whose matrices are rounded one by one."""
    twin = copy.deepcopy(loaded.model)
    for module in twin.modules():
        if isinstance(module, torch.nn.Linear) and module is not twin.get_output_embeddings():  # type: ignore[operator]
            module.weight.data = rounded(module.weight.data, formats.body)
        elif isinstance(module, torch.nn.Embedding):
            positions = "position" in type(module).__name__.lower()
            module.weight.data = rounded(module.weight.data, "bf16" if positions else formats.head)
    return twin


def naive(loaded: LoadedModel, texts: list[list[int]], formats: QuantizeOptions, narrow: NarrowModel | None) -> Tally:
    """Teacher forcing by whole models: the rounded one reads the first half, its narrow twin the second."""
    dense, total = twin_of(loaded, formats), Tally()
    for number, (ids, label) in enumerate(zip(texts, LABELS, strict=True)):
        decoding = copy.deepcopy(dense)
        if narrow is not None:
            for index in range(3):
                cut = narrow_layer(loaded, narrow, index, int(label))
                whole = {
                    role: rounded(tensor, formats.body) if tensor.ndim == 2 else tensor for role, tensor in cut.items()
                }
                layers = decoding.get_submodule(loaded.family.layers)
                assign_ffn(layers[index], loaded.family, whole)  # type: ignore[index]
        half, line = len(ids) // 2, torch.tensor([ids])
        with torch.inference_mode():
            cache = DynamicCache()
            dense(line[:, :half], use_cache=True, **cache_argument(dense, cache))
            logits = decoding(line[:, half:], use_cache=True, **cache_argument(decoding, cache)).logits[0, :-1]
            reference = loaded.model(line, use_cache=False).logits[0, half:-1]
        total.add(compare_logits(reference, logits, line[0, half + 1 :], number))
    return total


def store(loaded: LoadedModel, formats: QuantizeOptions, folder: Path) -> StoredModel:
    return store_model(loaded, Packer(formats=formats, moments={}), folder, folder / "bundle", Progress())


@pytest.mark.parametrize("formats", FORMATS, ids=lambda formats: formats.body)
def test_scores_are_those_of_rounded_models(
    formats: QuantizeOptions, loaded: LoadedModel, texts: list[list[int]], tmp_path: Path
) -> None:
    narrow = narrow_model([range(0, 96, 2), range(10, 74)], repaired=True)
    stored, team = store(loaded, formats, tmp_path), Alone(loaded)
    with (
        read_reference(team, texts, Progress(), stored) as reference,
        stored_packs(Alone(loaded), stored, {"clusters": narrow}, Progress()) as packs,
    ):
        models = {"clusters": (packs["clusters"].cut, LABELS)}
        quality = evaluate(team, reference, models, Progress(), stored)
        # What is read once serves every time.
        assert evaluate(team, reference, models, Progress(), stored) == quality
        # Nor does it stay mapped, which would count as memory in use.
        assert "reference-" not in Path("/proc/self/maps").read_text(encoding="utf-8")
    for score, expected in (
        (quality.dense, naive(loaded, texts, formats, None)),
        (quality.clusters, naive(loaded, texts, formats, narrow)),
    ):
        assert score.kl == pytest.approx(expected.kl / expected.num_tokens, rel=2e-3, abs=2e-5)
        assert score.num_tokens == expected.num_tokens
        assert score.perplexity == pytest.approx(expected.score("").perplexity, rel=1e-3)
    assert (quality.dense.kl > 1e-3) == (formats.body != "bf16")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_models_own_weights_come_back(error: type[BaseException], loaded: LoadedModel, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    tied = loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight  # type: ignore[operator]
    stored = store(loaded, FORMATS[0], tmp_path)

    def fail(_module: torch.nn.Module, _inputs: object) -> None:
        table = loaded.model.get_input_embeddings().weight  # type: ignore[operator]
        assert not torch.equal(table, next(v for v in before.values() if v.shape == table.shape))
        raise error

    handle = loaded.projection(2, "down").register_forward_pre_hook(fail)
    with pytest.raises(error), base_in_use(loaded, stored), torch.inference_mode():
        loaded.model(torch.tensor([[5, 6]]))
    handle.remove()
    after = loaded.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert tied == (loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight)  # type: ignore[operator]


@pytest.mark.parametrize("how", ["own", "repaired", "healed"])
@pytest.mark.parametrize("kind", ["int4", "int8", "int8-planes", "bf16"])
def test_packs_hold_what_rounding_the_narrow_matrices_gives(
    kind: str, how: str, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored already is not rounded again: gate and up that were not healed, a whole down projection."""
    generator = torch.Generator().manual_seed(1)
    moments = {
        f"{loaded.family.layers}.{layer}.{path}": torch.rand(
            loaded.projection(layer, role).weight.shape[1], generator=generator
        )
        for layer in range(3)
        for role, path in loaded.family.projections.items()
    }
    packer = Packer(formats=QuantizeOptions(body=kind, head="int8"), moments=moments)
    stored = store_model(loaded, packer, tmp_path, tmp_path / "bundle", Progress())
    narrow = narrow_model([range(1, 96, 2), range(96)], repaired=how != "own")
    inner = [role for role in loaded.family.projections if role != "down"]
    if how == "healed":
        bits = [{role: np.full((size, 32), 0x3E20 + size, dtype=np.uint16) for role in inner} for size in (48, 96)]
        narrow = replace(narrow, inner=[bits] * 3)
    made: list[str] = []

    def store_one(name: str, *args: Any) -> Any:
        made.append(name)
        return store_matrix(name, *args)

    monkeypatch.setattr(packing, "store_matrix", store_one)
    with stored_packs(Alone(loaded), stored, {"clusters": narrow}, Progress()) as packs:
        rounded_roles = {"own": ["down"], "repaired": ["down"], "healed": loaded.family.projections}[how]
        once = [tensor_name(layer, role) for layer in range(3) for role in rounded_roles]
        assert made == (once if how == "own" else 2 * once)
        for cluster, layer in np.ndindex(2, 3):
            file = TensorFile(packs["clusters"].folder / LAYOUT.cluster(cluster))
            neuron_ids = narrow.choice.neuron_ids[cluster][layer]
            for role, weight in narrow_layer(loaded, narrow, layer, cluster).items():
                name = tensor_name(layer, role)
                expected = {name: StoredTensor("F32", weight.float().numpy())}
                if weight.ndim == 2:
                    moment = ffn_moments(moments, loaded.family, layer, role, neuron_ids)
                    expected = dict(store_matrix(name, weight, kind, moment))
                for part, tensor in expected.items():
                    assert file[part].dtype == tensor.dtype
                    np.testing.assert_array_equal(file[part].array, tensor.array, err_msg=part)


def test_packs_are_gone_after_their_block(tmp_path: Path) -> None:
    loaded = load("llama")
    stored = store(loaded, FORMATS[0], tmp_path)
    before = contents(tmp_path)
    with stored_packs(Alone(loaded), stored, {"clusters": narrow_model([range(40)])}, Progress()) as packs:
        assert (packs["clusters"].folder / "clusters" / "000.safetensors").exists()
    assert contents(tmp_path) == before


def test_a_disk_that_fills_while_packs_are_stored_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load("llama")
    stored = store(loaded, FORMATS[0], tmp_path)
    before = contents(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored_module, "write_cluster", full)
    models = {"clusters": narrow_model([range(40)])}
    with (
        pytest.raises(BundleError, match=r"cannot write the bundle .*No space left"),
        stored_packs(Alone(loaded), stored, models, Progress()),
    ):
        pytest.fail("stored")
    assert contents(tmp_path) == before


def test_a_bundle_says_what_rounding_costs(tiny_bundle: Callable[..., Path]) -> None:
    kls: dict[str, Any] = {}
    for kind in ("bf16", "int8", "int4"):
        quality = read_manifest(tiny_bundle("llama", quantize=kind)).quality
        assert quality is not None
        kls[kind] = quality
    assert kls["bf16"].dense.kl < kls["int8"].dense.kl < kls["int4"].dense.kl
    assert kls["bf16"].clusters.kl < kls["int4"].clusters.kl
