"""Token shares of mixtures of experts: each of a token's experts leaves out inputs of its own."""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError, open_bundle
from coreinfer.bundles.contract import expert_role, kept_experts, tensor_name
from coreinfer.bundles.families import resolve
from coreinfer.bundles.formats import float_matrix
from coreinfer.bundles.inspect import describe
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.reader import find_problems
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.bundles.token_shares import token_thresholds
from coreinfer.bundles.versions import EXPERT_SHARES_VERSION, LISTED_EXPERTS_VERSION
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.checks import find_inputs
from coreinfer.compiler.estimate.machine import Machine
from coreinfer.compiler.estimate.plan import make_plan
from coreinfer.compiler.shares.gains import short_share
from coreinfer.compiler.shares.inputs import group_weights
from coreinfer.evaluation import EvaluationConfig, evaluate
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.engines.torch.mixture import Mixture
from coreinfer.runtime.generation import Generation
from torch.nn import functional

from .bundle_factory import edit_manifest
from .engine_inputs import PROMPT
from .loading import load
from .model_factory import save_model
from .skewed_mixtures import save_skewed
from .skipping import masking_decoder, skipping_engine
from .test_mixtures import IDS, token_errors

SHARE = 0.6
THIN: dict[str, Any] = {"packs": "thin", "keep": None, "budgets": None}
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
NEURONS = 96
"""Of each expert of the narrow bundles: tiny models' experts have no more than a block, which is not narrowed."""
OWN_WEIGHTS = ("narrow", "both")

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def narrow_bundle(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """A function (experts, quantize) that compiles a bundle with narrow experts, or some of them, and token shares."""

    @cache
    def written(experts: Any, quantize: Any) -> Path:
        folder = tmp_path_factory.mktemp(experts)
        save = save_model if experts == "narrow" else save_skewed
        model = save(folder / "model", "qwen3_moe", moe_intermediate_size=NEURONS)
        given = replace(tiny_inputs("qwen3_moe"), model=str(model), experts=experts, clusters=2, budgets=None)
        compile_model(
            replace(given, keep=0.6, token_share=SHARE, quantize=quantize, evaluate=False, output=folder / "b")
        )
        return folder / "b"

    return written


@pytest.fixture(scope="module")
def shared_bundle(tiny_bundle: Callable[..., Path], narrow_bundle: Callable[[str, str], Path]) -> Callable[..., Bundle]:
    """A function (family, quantize) that opens a bundle of experts with token shares; or packs, of `OWN_WEIGHTS`."""

    def opened(family: str, quantize: str = "bf16", **options: Any) -> Bundle:
        if family in OWN_WEIGHTS:
            return open_bundle(narrow_bundle(family, quantize))
        return open_bundle(tiny_bundle(family, token_share=SHARE, quantize=quantize, **options))

    return opened


def test_norms_are_those_of_each_experts_stored_weights(shared_bundle: Callable[..., Bundle]) -> None:
    for family, quantize in (("gpt_oss", "int4"), ("narrow", "int8"), ("both", "int4")):
        bundle = shared_bundle(family, quantize)
        assert find_problems(bundle.path, bundle.manifest) == []
        version = LISTED_EXPERTS_VERSION if family == "both" else EXPERT_SHARES_VERSION
        assert bundle.manifest.schema_version == version
        model, size = bundle.manifest.model, bundle.manifest.model.hidden_size
        files = [(bundle.dense, model.expert_neurons)]
        if family in OWN_WEIGHTS:
            count = len(kept_experts(bundle.pack(1), bundle.manifest)[2])
            files.append((bundle.pack(1), bundle.manifest.clusters[1].layer_budgets[2] // count))
            assert files[1][1] < NEURONS
        for file, width in files:
            assert file is not None
            root = tensor_name(2, expert_role(4, ""))
            inner = np.concatenate([float_matrix(file, root + role, (width, size)) for role in ("gate", "up")])
            for name, whole in (("gate_up", inner), ("down", float_matrix(file, root + "down", (size, width)))):
                norms = file[f"{root}{name}_norms"].array
                np.testing.assert_allclose(norms, np.linalg.norm(whole, axis=0), rtol=1e-5)


def test_older_readers_refuse_by_version(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    assert read_manifest(tiny_bundle("olmoe")).schema_version == 3
    for number, (options, named) in enumerate(
        (({}, "token_shares: those of a mixture of experts need"), (THIN, "a cluster without one needs"))
    ):
        source = tiny_bundle("mixtral", token_share=SHARE, **options)
        folder = Path(shutil.copytree(source, tmp_path / str(number)))
        with edit_manifest(folder) as data:
            data["schema_version"] = 4
        with pytest.raises(BundleCorrupt, match=re.escape(f"{named} schema_version 5")):
            open_bundle(folder)


def masked_mixture(mixture: Mixture, thresholds: Floats, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a mixture gives, token by token, with 0 for each input that its expert does not want."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    chosen, weights = mixture.router(rows, mixture._absent)
    out = torch.zeros_like(rows)
    for row, rank in itertools.product(range(len(rows)), range(chosen.shape[1])):
        expert, weight = int(chosen[row, rank]), weights[row, rank]
        own = {role: mixture.tensors[expert_role(expert, role)] for role in ("gate", "up", "down")}
        bias = {role: mixture.tensors.get(expert_role(expert, f"{role}_bias")) for role in own}
        norms = torch.cat([own["gate"], own["up"]]).norm(dim=0)
        x = torch.where(rows[row].abs() * norms * weight > thresholds[2], rows[row], 0)
        inner = mixture._combine(*(functional.linear(x, own[role], bias[role]) for role in ("gate", "up")))
        inner = torch.where(inner.abs() * own["down"].norm(dim=0) * weight > thresholds[3], inner, 0)
        out[row] += weight * functional.linear(inner, own["down"], bias["down"])
    return out.reshape(hidden.shape), weights


@contextmanager
def masked_by_hand(decoder: TorchDecoder, thresholds: Floats) -> Iterator[None]:
    """Have a decoder that reads all leave out what does not pass thresholds, by the weights that are in it."""
    names = decoder._family.experts
    handles: list[Any] = []
    assert names is not None

    def hook(weights: list[Any], threshold: float) -> Any:
        def before(_module: Any, inputs: Any) -> Any:
            norms = torch.cat([module.weight.float() for module in weights]).norm(dim=0)
            return (torch.where(inputs[0].abs() * norms > threshold, inputs[0], 0.0),)

        return before

    for layer, own in zip(decoder._layers, thresholds, strict=True):
        for place, group in enumerate(("qkv", "o")):
            modules = [resolve(layer, path) for path in decoder._family.input_groups[group]]
            before = hook(modules, float(own[place]))
            handles += [module.register_forward_pre_hook(before) for module in modules]
        mixture = resolve(layer, names.module)

        def forward(hidden: torch.Tensor, mixture: Any = mixture, own: Floats = own) -> Any:
            mixed, weights = masked_mixture(mixture, own, hidden)
            return (mixed, weights) if mixture._returns_weights else mixed

        mixture.forward = forward
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in decoder._layers:
            del resolve(layer, names.module).forward


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", *OWN_WEIGHTS])
def test_what_an_expert_does_not_want_counts_as_zero(family: str, shared_bundle: Callable[..., Bundle]) -> None:
    bundle = shared_bundle(family)
    used, plain = (TorchDecoder(bundle, device="cpu", dtype="float32") for _ in range(2))
    for choice in (FfnChoice(cluster=1, token_share=0.5), FfnChoice(token_share=0.7)):
        for decoder in (used, plain):
            decoder.truncate(0)
            decoder.use(DENSE)
            decoder.forward(IDS[:8])
        used.use(choice)
        plain.use(choice.whole)
        got = np.concatenate([used.forward([token_id]) for token_id in IDS[8:12]])
        with masked_by_hand(plain, token_thresholds(bundle, choice.cluster, choice.token_share)[..., 0]):
            expected = np.concatenate([plain.forward([token_id]) for token_id in IDS[8:12]])
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-4)
        used.truncate(8)
        together = used.forward(IDS[8:12], all_logits=True)
        np.testing.assert_allclose(together, expected, atol=2e-4, rtol=1e-3)
        used.truncate(8)
        used.use(choice.whole)
        assert not np.allclose(used.forward([IDS[8]])[0], expected[0], atol=1e-3)


def texts(decoder: NativeDecoder | TorchDecoder, choice: FfnChoice, count: int = 15) -> Floats:
    """Logits of the last 3 tokens of texts of 10, which are decoded with a choice: (texts, 3, vocabulary)."""
    logits = []
    for start in range(0, 10 * count, 10):
        ids = IDS[start : start + 10]
        decoder.truncate(0)
        decoder.use(DENSE)
        decoder.forward(ids[:7])
        decoder.use(choice)
        logits.append(np.concatenate([decoder.forward([token_id]) for token_id in ids[7:]]))
    return np.stack(logits)


@pytest.mark.parametrize("family", [*FAMILIES, *OWN_WEIGHTS])
def test_native_leaves_out_what_torch_leaves_out(family: str, shared_bundle: Callable[..., Bundle]) -> None:
    bundle = shared_bundle(family)
    decoder, torch_decoder = masking_decoder(bundle), TorchDecoder(bundle, device="cpu", dtype="float32")
    for choice in (FfnChoice(cluster=1, token_share=SHARE), FfnChoice(token_share=0.7)):
        expected, got = texts(torch_decoder, choice), texts(decoder, choice)
        errors = token_errors(got, expected)
        # An input on the threshold is wanted by one engine and not by the other, and near a tie between experts a token
        # goes to another, which changes all tokens after it: so first tokens, and most texts.
        assert np.quantile(errors[:, 0], 0.5) < 0.02
        assert np.quantile(errors.max(axis=1), 0.4) < 0.04
        assert np.median(token_errors(got, texts(decoder, choice.whole))) > 0.1


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize(
    ("family", "quantize"),
    [*((family, "int4") for family in [*FAMILIES, *OWN_WEIGHTS]), (FAMILIES[0], "int8"), (FAMILIES[0], "bf16")],
)
def test_columns_give_what_rows_give(
    family: str, quantize: str, isa: str, shared_bundle: Callable[..., Bundle]
) -> None:
    bundle = shared_bundle(family, quantize)
    rows, columns = masking_decoder(bundle, isa=isa), masking_decoder(bundle, isa=isa, columns=True)
    # The cluster's experts are some of the dense FFN's, whose columns serve both.
    sizes = []
    for choice in (FfnChoice(cluster=1, token_share=SHARE), FfnChoice(token_share=0.4), FfnChoice(cluster=1)):
        np.testing.assert_array_equal(texts(columns, choice, 3), texts(rows, choice, 3))
        sizes.append(columns._model.column_bytes)
    assert (sizes[0] == sizes[1]) == (family not in OWN_WEIGHTS)
    num_bytes = []
    for share in (0.3, 0.6, 0.9):
        columns.use(FfnChoice(token_share=share))
        columns.forward([5])
        num_bytes.append(columns.bytes_per_token(8))
    assert num_bytes == sorted(set(num_bytes))


def test_rows_of_a_batch_leave_out_what_each_leaves_out_alone(shared_bundle: Callable[..., Bundle]) -> None:
    for family in ("mixtral", "gpt_oss", "both"):
        decoder, choice = (
            masking_decoder(shared_bundle(family, "int4"), columns=True),
            FfnChoice(cluster=1, token_share=SHARE),
        )
        decoder.forward(IDS[:20])
        numbers = [decoder.fork_sequence(0, 20) for _ in range(3)]
        decoder.use(choice)
        for token_id in IDS[20:24]:
            rows = decoder.forward_rows(numbers, [token_id, 3 + token_id % 7, token_id])
            alone = decoder.forward([token_id])[0]
            assert np.array_equal(rows[0], alone)
            assert np.array_equal(rows[2], alone)
            assert not np.array_equal(rows[1], alone)
        # A row that has no neighbours is no other, and is not counted as a token alone.
        read = decoder.weight_bytes(greedy=True, alone=True)
        row, alone = decoder.forward_rows([numbers[0]], [5])[0], decoder.forward([5])[0]
        assert np.array_equal(row, alone)
        assert read is not None
        decoder.forward_rows([numbers[0]], [6])
        again = decoder.weight_bytes(greedy=True, alone=True)
        decoder.forward([6])
        assert again is not None
        assert again < 1.5 * read


def test_only_a_tokens_own_experts_are_read(shared_bundle: Callable[..., Bundle]) -> None:
    """With all read, columns are as many bytes as rows but for padding: those of two experts of six, and the router."""
    bundle = shared_bundle("mixtral", "int4")
    counted, decoder = token_bytes(bundle.manifest), masking_decoder(bundle)
    assert 0 < counted.routers < counted.attention
    decoder.use(FfnChoice(token_share=SHARE))
    decoder.forward([5])
    whole = decoder.weight_bytes(greedy=True, alone=False)
    # What is masked is read by rows.
    assert decoder.weight_bytes(greedy=True, alone=True) == whole == counted.dense
    columns = masking_decoder(bundle, columns=True)
    columns.use(FfnChoice(token_share=SHARE))
    before = columns.weight_bytes(greedy=True, alone=True)
    columns.forward([5])
    read = columns.weight_bytes(greedy=True, alone=True)
    assert before is not None
    assert read is not None
    assert columns.weight_bytes(greedy=True, alone=False) == whole
    assert counted.head + counted.routers < read < before
    # Twice as many outputs as a tile of the widest kernel has are 128 in the place of 32 here.
    assert before < 5 * counted.dense


def test_a_prompts_own_experts_are_all_read(tiny_bundle: Callable[..., Path]) -> None:
    """Also between generations that leave inputs out."""
    folder = tiny_bundle("qwen3_moe", token_share=SHARE, quantize="int4")
    engine, whole = (skipping_engine(folder, skipping) for skipping in ("on", "off"))
    for mode in ("similarity", "fused", "stability"):
        got, expected = (each.generate(PROMPT, raw=True, max_new_tokens=12, mode=mode) for each in (engine, whole))
        assert got.token_share == (SHARE if mode == "similarity" else 1)
        assert (got.token_ids == expected.token_ids) == (mode != "similarity")
    with pytest.raises(ConfigError, match=f"mode 'stability' expects 1, got {SHARE}"):
        engine.generate(PROMPT, raw=True, token_share=SHARE, mode="stability")


@pytest.mark.parametrize("options", [{}, THIN], ids=["own", "thin"])
def test_generations_and_evaluation(options: dict[str, Any], tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_bundle("qwen3_moe", token_share=SHARE, quantize="int4", **options)
    made: dict[str, Generation] = {}
    for skipping in ("on", "masked", "off"):
        engine = skipping_engine(folder, skipping)
        made[skipping] = engine.generate(PROMPT, raw=True, max_new_tokens=12, mode="similarity")
    assert made["on"].token_ids == made["masked"].token_ids
    assert made["on"].token_ids != made["off"].token_ids
    assert [made[skipping].token_share for skipping in ("on", "masked", "off")] == [SHARE, SHARE, 1]
    assert made["off"].bytes_read is None
    for skipping in ("on", "masked"):
        read = made[skipping].bytes_read
        assert read is not None
        assert read.num_tokens == len(made[skipping].token_ids) - 1
    lines = "\n".join(describe(read_manifest(folder)))
    assert f"token      reads {SHARE} of the layers' weights dense" in lines
    assert "dense, equal shares 0.6" in (folder / LAYOUT.report).read_text(encoding="utf-8")
    data = tmp_path / "completion_a.jsonl"
    data.write_text(json.dumps({"context": "The sea is wide. ", "continuation": "The ship came home."}) + "\n")
    rows = evaluate(EvaluationConfig(bundles=(folder,), data=(str(data),), modes=("dense", "similarity"))).rows
    costs = {row.mode: row.bytes_per_token for row in rows}
    counted = token_bytes(read_manifest(folder))
    layers = counted.attention - counted.routers + counted.dense_ffn
    whole, dense, pack = (costs[mode] for mode in ("dense", f"dense, share {SHARE}", f"similarity, share {SHARE}"))
    assert whole is not None
    assert dense == pack == pytest.approx(whole - (1 - SHARE) * layers, abs=1)


def test_shares_are_found_by_a_quality(tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path) -> None:
    given = replace(tiny_inputs("olmoe"), **THIN, token_share="auto", max_kl=0.2, output=tmp_path / "b", clusters=2)
    record = compile_model(given).token_shares
    assert record is not None
    assert all(0.3 <= share < 1 for share in (record.default, *record.clusters))
    planned = record.scores[0]
    assert planned.score.kl < 0.25
    assert planned.read == pytest.approx(record.default, abs=0.1)


def test_nothing_is_narrowed_of_thin_clusters(tiny_inputs: Callable[[str], CompileConfig]) -> None:
    given = replace(tiny_inputs("olmoe"), **THIN, token_share=0.5)
    with pytest.raises(ConfigError, match="--experts narrow: with --packs thin nothing is narrowed; leave it out"):
        replace(given, experts="narrow")
    machine = Machine(num_threads=1, float32_gflops=1.0, bfloat16_gflops=1.0, read_gbps=1.0)
    plain, thin, narrow = (
        make_plan(config, find_inputs(config), lambda: machine)
        for config in (
            tiny_inputs("olmoe"),
            given,
            replace(tiny_inputs("olmoe"), budgets=None, experts="narrow", token_share=0.5),
        )
    )
    assert [stage.name for stage in thin.stages][-3:] == ["shares", "evaluate", "write"]
    assert not {"profile", "reconstruct"} & {stage.name for stage in thin.stages}
    assert (thin.token_bytes_dense, thin.token_share, thin.is_thin) == (plain.token_bytes_dense, 0.5, True)
    assert narrow.token_share == 0.5


def test_weights_are_those_of_a_tokens_experts(tiny_inputs: Callable[[str], CompileConfig]) -> None:
    loaded = load(Path(tiny_inputs("gpt_oss").model))
    record = loaded.record
    inner = 2 * record.hidden_size * record.expert_neurons
    assert group_weights(loaded)[1, 2:].tolist() == [2 * inner, inner]
    assert short_share(loaded, "int4") == 1
    # Of an expert whose gate and up have 2,048 outputs together.
    wide = replace(loaded, record=replace(record, ffn_dim=6 * 1024))
    weights = group_weights(wide).sum(axis=0)
    assert short_share(wide, "int4") == pytest.approx(1 - weights[2] / weights.sum())
