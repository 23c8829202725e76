"""Token shares: what a compile writes, what a decoded token leaves out, and what is refused."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import BundleCorrupt, ConfigError, open_bundle
from coreinfer.bundles.contract import INPUT_GROUPS, norms_role, tensor_name
from coreinfer.bundles.families import resolve
from coreinfer.bundles.formats import float_matrix
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.reader import find_problems
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.bundles.token_shares import shares_at, token_thresholds
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.options import GenerationOptions
from coreinfer.runtime.prompts.requests import read_request
from coreinfer.runtime.scheduling import prepare

from .bundle_factory import change_tensors, edit_manifest
from .engine_inputs import PROMPT

SHARE = 0.6
PROMPT_IDS, NEXT_IDS = [1, 57, 200, 300, 21, 99, 140, 7], [9, 8, 77, 301]


@pytest.fixture(scope="module")
def shared_bundle(tiny_bundle: Callable[..., Path]) -> Callable[..., Path]:
    return lambda family="llama", **options: tiny_bundle(family, token_share=SHARE, **options)


def test_norms_are_those_of_stored_weights(shared_bundle: Callable[..., Path]) -> None:
    for family, options in (("llama", {"quantize": "int4"}), ("phi3", {}), ("opt", {"quantize": "int8"})):
        bundle = open_bundle(shared_bundle(family, **options))
        assert find_problems(bundle.path, bundle.manifest) == []
        model, budget = bundle.manifest.model, bundle.manifest.clusters[1].layer_budgets[1]
        roles = ("gate", "up") if model.gated else ("up",)
        for file, width in ((bundle.dense, model.ffn_dim), (bundle.pack(1), budget)):
            assert file is not None
            inner = [float_matrix(file, tensor_name(1, role), (width, model.hidden_size)) for role in roles]
            down = float_matrix(file, tensor_name(1, "down"), (model.hidden_size, width))
            for group, whole in (("gate_up", np.concatenate(inner)), ("down", down)):
                norms = file[tensor_name(1, norms_role(group))].array
                np.testing.assert_allclose(norms, np.linalg.norm(whole, axis=0), rtol=1e-5)
        sizes = {"qkv": model.hidden_size, "o": model.num_heads * model.head_dim}
        for group, size in sizes.items():
            assert bundle.base[tensor_name(0, norms_role(group))].array.shape == (size,)


def test_a_plan_meets_its_targets(shared_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(shared_bundle())
    file, model = bundle.token_shares, bundle.manifest.model
    assert file is not None
    head = model.num_heads * model.head_dim
    kv = 2 * model.num_kv_heads * model.head_dim
    weights = np.array([model.hidden_size * (head + kv), model.hidden_size * head, 0, 0])
    weights[2:] = 2 * model.hidden_size * model.ffn_dim, model.hidden_size * model.ffn_dim
    for target in file["targets"].array:
        shares = shares_at(file["targets"].array, file["plan"].array, float(target))
        assert float((shares * weights).sum() / (weights.sum() * model.num_layers)) == pytest.approx(target, abs=2e-3)
    for name in ("thresholds.dense", "thresholds.0", "thresholds.3"):
        known = file[name].array
        assert (np.diff(known, axis=-1) <= 0).all()
        assert (known[..., -1] == 0).all()
        assert (known[..., 0] > 0).all()
    assert (token_thresholds(bundle, 0, 1.0) == -1).all()
    lower, higher = (token_thresholds(bundle, None, share) for share in (0.4, 0.8))
    assert (lower >= higher).all()


@contextmanager
def masked_by_hand(decoder: TorchDecoder, thresholds: npt.NDArray[np.float32], kept: list[float]) -> Iterator[None]:
    """Mask a decoder's inputs by the weights that are in it."""
    handles = []

    def hook(weights: list[Any], threshold: float) -> Any:
        def before(_module: Any, inputs: Any) -> Any:
            norms = torch.cat([module.weight.float() for module in weights]).norm(dim=0)
            wanted = inputs[0].abs() * norms > threshold
            kept.append(float(wanted.float().mean()))
            return (torch.where(wanted, inputs[0], 0.0),)

        return before

    for number, layer in enumerate(decoder._layers):
        for place, group in enumerate(INPUT_GROUPS):
            modules = [resolve(layer, path) for path in decoder._family.input_groups[group]]
            for module in modules:
                before = hook(modules, float(thresholds[number, place, 0]))
                handles.append(module.register_forward_pre_hook(before))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gemma2"])
def test_what_is_not_wanted_counts_as_zero(family: str, shared_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(shared_bundle(family))
    for choice in (FfnChoice(cluster=2, token_share=0.5), FfnChoice(token_share=0.7)):
        used, plain = (TorchDecoder(bundle, device="cpu", dtype="float32") for _ in range(2))
        for decoder in (used, plain):
            decoder.use(DENSE)
            decoder.forward(PROMPT_IDS)
        used.use(choice)
        plain.use(choice.whole)
        got = [used.forward([token_id])[0] for token_id in NEXT_IDS]
        kept: list[float] = []
        with masked_by_hand(plain, token_thresholds(bundle, choice.cluster, choice.token_share), kept):
            expected = [plain.forward([token_id])[0] for token_id in NEXT_IDS]
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-4)
        assert 0.2 < np.mean(kept) < 0.95
        used.truncate(len(PROMPT_IDS))
        together = used.forward(NEXT_IDS, all_logits=True)
        np.testing.assert_allclose(together, expected, atol=2e-4, rtol=1e-3)
        used.truncate(len(PROMPT_IDS))
        used.use(choice.whole)
        whole = used.forward([NEXT_IDS[0]])[0]
        assert not np.allclose(whole, expected[0], atol=1e-3)


@pytest.fixture(scope="module")
def engine(shared_bundle: Callable[..., Path]) -> runtime.Engine:
    return runtime.load(shared_bundle(), engine="torch", device="cpu", dtype="float32")


def choices_used(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[FfnChoice, int]]:
    """Each call's choice and number of tokens."""
    calls: list[tuple[FfnChoice, int]] = []
    decoder: Any = engine.decoder
    forward = decoder.forward

    def record(token_ids: Any, **options: Any) -> Any:
        calls.append((decoder._choice, len(token_ids)))
        return forward(token_ids, **options)

    monkeypatch.setattr(decoder, "forward", record)
    return calls


@pytest.mark.parametrize(("asked", "expected"), [(None, SHARE), (0.8, 0.8), (1, 1)])
def test_prompts_are_read_whole_and_answers_by_shares(
    asked: float | None, expected: float, engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = choices_used(engine, monkeypatch)
    for mode in ("similarity", "dense"):
        calls.clear()
        got = engine.generate(PROMPT, raw=True, max_new_tokens=6, mode=mode, token_share=asked)
        assert got.token_share == expected
        assert calls[0][0].is_same(DENSE)
        assert len(calls) == len(got.token_ids)
        assert {choice.token_share for choice, _ in calls[1:]} == {expected}


def test_lossless_answers_are_those_of_all_weights(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine.generate(PROMPT, raw=True, max_new_tokens=24, mode="dense", token_share=1)
    calls = choices_used(engine, monkeypatch)
    got = engine.generate(PROMPT, raw=True, max_new_tokens=24, mode="lossless", token_share=0.5, seed=1)
    assert got.token_ids == whole.token_ids
    assert {choice.token_share for choice, _ in calls if choice.cluster is None} == {1.0}
    assert {choice.token_share for choice, _ in calls if choice.cluster is not None} == {0.5}


def test_shares_do_not_meet_in_a_batch_nor_in_a_cache(engine: runtime.Engine) -> None:
    shares = (0.4, 1, 0.4)
    alone = [engine.generate(PROMPT, raw=True, max_new_tokens=12, token_share=share).token_ids for share in shares]
    runs = []
    for share in shares:
        options = GenerationOptions(raw=True, max_new_tokens=12, token_share=share)
        runs.append(prepare(engine.loaded, read_request(engine.loaded, PROMPT, options), options))
    together = [tuple(token.token_id for token in tokens) for tokens in engine.driver.finish(runs)]
    assert together == alone
    assert alone[0] != alone[1]
    # What shares have decoded is no beginning of another prompt.
    longer = [*engine.loaded.prompts.encode(PROMPT), *alone[0]]
    decoder, exact = engine.decoder, []
    for number in engine.driver.scheduler.pool._idle:
        decoder.select(number)
        exact.append(decoder.cached.num_exact(longer, DENSE, decoder.block_tokens, alike=True))
    decoder.select(0)
    assert max(exact) <= len(longer) - len(alone[0])


def test_what_cannot_be_left_out_is_refused(engine: runtime.Engine, tiny_bundle: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"token_share: expected 0.3 to 1 with this bundle, got 0.2"):
        engine.generate(PROMPT, raw=True, token_share=0.2)
    with pytest.raises(ConfigError, match=r"token_share: expected a number in \(0, 1\], got 0"):
        engine.generate(PROMPT, raw=True, token_share=0)
    with pytest.raises(ConfigError, match=r"mode 'stability' expects 1, got 0.5"):
        engine.generate(PROMPT, raw=True, token_share=0.5, mode="stability")
    plain = runtime.load(tiny_bundle("llama"), engine="torch", device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match=r"token_share: this bundle has no token shares, got 0.5"):
        plain.generate(PROMPT, raw=True, token_share=0.5)
    assert plain.generate(PROMPT, raw=True, max_new_tokens=2, token_share=1).token_share == 1
    with pytest.raises(ConfigError, match="no token shares"):
        plain.decoder.use(FfnChoice(token_share=0.5))


def test_bundles_without_say_nothing_of_it(tiny_bundle: Callable[..., Path]) -> None:
    text = (tiny_bundle("llama") / LAYOUT.manifest).read_text(encoding="utf-8")
    assert "token_share" not in text
    assert "token_share" in repr(read_manifest(tiny_bundle("llama")))


def test_damage_is_named(shared_bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shared_bundle(), tmp_path / "bundle"))

    def change(name: str, place: int, value: float) -> Callable[[dict[str, StoredTensor]], object]:
        return lambda tensors: tensors[name].array.reshape(-1).__setitem__(place, value)

    for name, value, said in (
        ("levels", 2.0, "levels: expected ascending shares that end at 1"),
        ("plan", 1.5, "plan: expected shares from 0 to 1"),
        ("thresholds.1", float("nan"), "thresholds.1: expected finite numbers"),
    ):
        before = open_bundle(folder).token_shares
        assert before is not None
        kept = float(before[name].array.reshape(-1)[3])
        change_tensors(folder, LAYOUT.token_shares, change(name, 3, value))
        with pytest.raises(BundleCorrupt, match=re.escape(said)):
            open_bundle(folder)
        change_tensors(folder, LAYOUT.token_shares, change(name, 3, kept))
    with edit_manifest(folder) as data:
        data["token_shares"]["clusters"][0] = 0.1
    with pytest.raises(BundleCorrupt, match=r"expected a default from 0.3 to 1 of each cluster"):
        open_bundle(folder)
