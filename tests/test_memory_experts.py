"""Mixtures of experts where memory for weights is limited: the same bits as without, and no expert too many."""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from coreinfer import runtime
from coreinfer.bundles import ConfigError, CoreInferError, open_bundle
from coreinfer.runtime.commands.run import main as run_main
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.native.memory_plan import ffn_sizes
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice

from .forks import refusal_in_fork
from .model_factory import MIXTURES, VOCABULARY, save_model
from .page_residency import resident_bytes
from .skewed_mixtures import save_skewed
from .test_memory_limit import KV_BYTES, least_mb, limited
from .test_narrow_experts import wide_settings

IDS = np.random.default_rng(1).integers(3, VOCABULARY, 60).tolist()
PACKS = ("whole", "narrow", "both")
STEPS = 120
MODES: tuple[Any, ...] = ("similarity", "dense", "lossless", "auto")
GATHERING: tuple[Any, ...] = ("stability", "fused")


@pytest.fixture(scope="module")
def mixture(tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function (family, packs, **CompileConfig fields) that gives a tiny bundle with two clusters."""
    root = tmp_path_factory.mktemp("models")

    def written(family: str, packs: str = "whole", **options: Any) -> Path:
        save = save_skewed if packs == "both" else save_model
        folder = root / f"{family}-{save.__name__}"
        if not folder.exists():
            save(folder, family, **wide_settings(family))
        narrow = {"experts": packs, "budgets": None, "keep": 0.5} if packs != "whole" else {}
        return tiny_bundle(family, model=str(folder), cache_dir=root / "cache", clusters=2, **narrow, **options)

    return written


def least_bytes(bundle_dir: Path) -> int:
    """The smallest limit that a bundle can be loaded with, to a kilobyte."""
    bundle, most = open_bundle(bundle_dir), round(1e6 * least_mb(bundle_dir) + 60_000)
    too_few = most - 120_000
    while most - too_few > 1000:
        middle = (most + too_few) // 2
        try:
            NativeDecoder(bundle, threads=1, memory_bytes=middle, kv_cache_bytes=KV_BYTES)
        except ConfigError:
            too_few = middle
        else:
            most = middle
    return most


def choices_of(decoder: NativeDecoder) -> list[FfnChoice]:
    dense = [DENSE] if decoder._bundle.dense else []
    return [*dense, *(FfnChoice(cluster=cluster) for cluster in range(len(decoder._bundle.manifest.clusters)))]


def all_logits(decoder: NativeDecoder) -> list[Any]:
    """Logits of blocks, single tokens, rows of two sequences and rows beside a block, with each FFN in turn."""
    rows = []
    for choice in [*choices_of(decoder), *choices_of(decoder)[::-1]]:
        decoder.use(choice)
        decoder.truncate(0)
        rows.append(decoder.forward(IDS[:40], all_logits=True))
        rows += [decoder.forward([token_id], greedy=greedy) for token_id in IDS[40:44] for greedy in (False, True)]
        other = decoder.add_sequence()
        rows.append(decoder.forward_rows([0, other, 0], IDS[:3]))
        rows.append(decoder.forward_beside(IDS[:7], [other], IDS[:1], last_logits=True))
        decoder.drop_sequence(other)
    decoder.truncate(0)
    return rows


def check_limits(bundle_dir: Path) -> None:
    """Compare logits under limits from the least to one that holds all with those of no limit."""
    expected = all_logits(NativeDecoder(open_bundle(bundle_dir), threads=2))
    least = least_bytes(bundle_dir) / 1e6
    reads = []
    for mb in (least, least + 0.06, least + 0.12, 100.0):
        decoder = limited(open_bundle(bundle_dir), mb)
        assert decoder._residency is not None
        for _ in range(2):
            for got, wanted in zip(all_logits(decoder), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)
            assert 0 < decoder._model.layer_bytes_used <= decoder._residency.plan.layers
        assert decoder.disk_reads is not None
        reads.append(decoder.disk_reads)
    assert reads[0].num_bytes > reads[-1].num_bytes > 0
    assert reads[-1].num_hits > reads[0].num_hits
    assert reads[0].num_misses > reads[-1].num_misses > 0


@pytest.mark.parametrize(
    ("family", "quantize"), [*((family, "int4") for family in MIXTURES), ("gpt_oss", "bf16"), ("qwen3_moe", "int8")]
)
def test_logits_are_those_without_a_limit(family: str, quantize: str, mixture: Callable[..., Path]) -> None:
    check_limits(mixture(family, quantize=quantize))


@pytest.mark.parametrize("packs", ["narrow", "both"])
@pytest.mark.parametrize(("family", "quantize"), [("mixtral", "int4"), ("gpt_oss", "int4"), ("gpt_oss", "bf16")])
def test_packs_of_narrow_experts_too(packs: str, family: str, quantize: str, mixture: Callable[..., Path]) -> None:
    check_limits(mixture(family, packs, quantize=quantize))


def test_without_the_dense_ffn(mixture: Callable[..., Path]) -> None:
    check_limits(mixture("mixtral", "narrow", quantize="int4", dense=False))


@pytest.mark.parametrize("packs", PACKS)
@pytest.mark.parametrize("room_mb", [0.0, 0.1, 0.2, 0.4])
def test_any_order_of_passes_is_the_same(room_mb: float, packs: str, mixture: Callable[..., Path]) -> None:
    bundle_dir = mixture("gpt_oss", packs, quantize="bf16")
    free = NativeDecoder(open_bundle(bundle_dir), threads=2)
    bound = limited(open_bundle(bundle_dir), least_bytes(bundle_dir) / 1e6 + room_mb)
    assert bound._residency is not None
    chance = random.Random(round(1000 * room_mb))
    for _ in range(STEPS):
        if chance.random() < 0.3:
            bound.prepare(chance.choice(choices_of(bound)))
        if bound.num_cached > 40:
            free.truncate(0)
            bound.truncate(0)
        ids = [chance.randrange(3, VOCABULARY) for _ in range(chance.choice((1, 1, 1, 2, 9, 30)))]
        choice, as_rows = chance.choice(choices_of(bound)), chance.random() < 0.3
        results = []
        for decoder in (free, bound):
            decoder.use(choice)
            results.append(decoder.forward_rows([0] * len(ids), ids) if as_rows else decoder.forward(ids))
        np.testing.assert_array_equal(results[1], results[0])
        assert bound._model.layer_bytes_used <= bound._residency.plan.layers


@pytest.mark.parametrize("packs", PACKS)
def test_an_ffn_that_fits_is_read_once(packs: str, mixture: Callable[..., Path]) -> None:
    """Announced, it is read before any token wants it."""
    decoder = limited(open_bundle(mixture("gpt_oss", packs, quantize="int4")), 100.0)
    pack = FfnChoice(cluster=1)
    decoder.use(pack)
    assert not decoder._model.holds(decoder._ffn(1))
    decoder.prepare(pack)
    for _ in range(500):
        if decoder._model.holds(decoder._ffn(1)):
            break
        time.sleep(0.01)
    assert decoder._model.holds(decoder._ffn(1))
    before = decoder.disk_reads
    decoder.forward(IDS)
    for token_id in IDS:
        decoder.forward([token_id], greedy=True)
    assert before is not None
    assert decoder.disk_reads is not None
    reads = decoder.disk_reads.since(before)
    assert (reads.num_bytes, reads.num_misses) == (0, 0)
    assert reads.num_hits > 0


def test_what_decodes_is_kept_before_what_a_prompt_reads(mixture: Callable[..., Path]) -> None:
    bundle = open_bundle(mixture("gpt_oss", "narrow", quantize="bf16"))
    (pack,) = ffn_sizes(bundle.manifest, [bundle.manifest.clusters[0].layer_budgets])
    (dense,) = ffn_sizes(bundle.manifest, [(bundle.manifest.model.ffn_dim,) * 3])
    room = pack.total + 5 * dense.largest
    assert room < dense.total
    # Tables may take a sixteenth of the limit.
    decoder = limited(bundle, (least_bytes(bundle.path) + room) / 1e6 * 17 / 16)
    assert decoder._residency is not None
    assert room <= decoder._residency.plan.layers < pack.total + dense.total
    decoder.use(FfnChoice(cluster=0))
    for token_id in IDS:
        decoder.forward([token_id])
    decoder.use(DENSE)
    for _ in range(2):
        decoder.forward(IDS)
    decoder.use(FfnChoice(cluster=0))
    before = decoder.disk_reads
    decoder.forward([IDS[0]])
    assert before is not None
    assert decoder.disk_reads is not None
    assert decoder.disk_reads.since(before).num_misses <= 4


@pytest.mark.parametrize("packs", PACKS)
def test_pages_of_packs_and_of_the_dense_ffn_do_not_stay(
    packs: str, mixture: Callable[..., Path], tmp_path: Path
) -> None:
    # Of a copy: pages that another decoder has mapped stay with it. With biases, which are read with the weights.
    folder = mixture("gpt_oss", packs, quantize="bf16")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    bundle = open_bundle(copy, lazy_packs=True, spare_memory=True)
    decoder = limited(bundle, least_bytes(folder) / 1e6 + 0.1)
    all_logits(decoder)
    assert bundle.dense is not None
    narrow = bundle.packs if packs != "whole" else []
    for file in (bundle.dense, *narrow):
        assert resident_bytes(file) == 0, file.path.name
    assert resident_bytes(bundle.base) > 0


@pytest.mark.parametrize("num_tokens", [1, 30])
def test_an_expert_that_cannot_be_read_fails_the_pass(
    num_tokens: int, mixture: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(mixture("gpt_oss", quantize="bf16"), tmp_path / "copy"))
    decoder = limited(open_bundle(folder), least_bytes(folder) / 1e6)
    decoder.use(DENSE)
    decoder.forward(IDS[:30])
    num_cached = decoder.num_cached
    whole = (folder / "dense.safetensors").read_bytes()
    os.truncate(folder / "dense.safetensors", 8192)
    for _ in range(3):
        with pytest.raises(CoreInferError, match="memory_mb: an expert could not be read from the bundle's file"):
            decoder.forward(IDS[:num_tokens])
        assert decoder.num_cached == num_cached
    # Nothing is left of what failed.
    with (folder / "dense.safetensors").open("r+b") as file:
        file.write(whole)
    expected = NativeDecoder(open_bundle(folder), threads=2)
    expected.use(DENSE)
    expected.forward(IDS[:30])
    np.testing.assert_array_equal(decoder.forward(IDS[:num_tokens]), expected.forward(IDS[:num_tokens]))


def test_a_damaged_pack_is_named(mixture: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixture("mixtral", "narrow", quantize="int4"), tmp_path / "copy"))
    os.truncate(folder / "clusters" / "001.safetensors", 4096)
    with pytest.raises(CoreInferError, match=r"001\.safetensors"):
        limited(open_bundle(folder), 100.0).use(FfnChoice(cluster=1))


@pytest.mark.parametrize("packs", PACKS)
def test_texts_are_those_without_a_limit(packs: str, mixture: Callable[..., Path]) -> None:
    """Of several clusters at once, and of all modes that mixtures have."""
    folder = mixture("gpt_oss", packs, quantize="int4")
    prompts = ["court judge clause", "The kitchen text number 3 speaks of", "salt and lemon", "court judge"]
    answers = []
    for mb in (None, least_bytes(folder) / 1e6 + 0.05):
        engine = runtime.load(folder, engine="native", threads=1, memory_mb=mb, kv_cache_mb=KV_BYTES / 1e6)
        texts = [answer.token_ids for answer in engine.generate(prompts, max_new_tokens=8)]
        for mode in MODES:
            texts.append(engine.generate(prompts[0], mode=mode, max_new_tokens=8).token_ids)
        answers.append(texts)
    assert answers[0] == answers[1]
    ids = tuple(np.arange(5, dtype=np.int32) for _ in range(3))
    with pytest.raises(ConfigError, match="memory_mb: a prompt's own neurons"):
        engine.decoder.use(FfnChoice(neuron_ids=ids))
    for mode in GATHERING:
        with pytest.raises(ConfigError, match=rf"mode '{mode}' gathers from the whole dense FFN, which memory_mb"):
            engine.generate(prompts[0], mode=mode)


def test_thin_clusters_decode_with_all_experts(tiny_bundle: Callable[..., Path]) -> None:
    """Their token shares leave nothing out under a limit, as with other models."""
    folder = tiny_bundle("qwen3_moe", quantize="int4", token_share=0.6, packs="thin", keep=None, budgets=None)
    dense = runtime.load(folder, engine="native", threads=1, input_skipping="off")
    bound = runtime.load(
        folder, engine="native", threads=1, memory_mb=least_bytes(folder) / 1e6, kv_cache_mb=KV_BYTES / 1e6
    )
    prompt = "The kitchen text number 3 speaks of"
    expected, got = (made.generate(prompt, max_new_tokens=12) for made in (dense, bound))
    assert got.token_ids == expected.token_ids
    assert got.disk_reads is not None
    assert got.disk_reads.num_misses > 0


def test_too_little_memory_is_one_line_and_figures_are_printed(mixture: Callable[..., Path]) -> None:
    folder = str(mixture("mixtral", quantize="int4"))
    done = CliRunner().invoke(run_main, [folder, "Hello", "--engine", "native", "--memory-mb", "0.01"])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "for the experts of a token (2);" in done.stderr
    done = CliRunner().invoke(run_main, [folder, "Hello", "--memory-mb", "100", "--max-new-tokens", "4"])
    assert done.exit_code == 0
    assert " MB read from disk, " in done.stderr


def test_a_forked_process_is_told_to_load_again(mixture: Callable[..., Path]) -> None:
    decoder = limited(open_bundle(mixture("mixtral", quantize="int4")), 100.0)
    decoder.use(DENSE)
    decoder.forward([5])
    said = refusal_in_fork(lambda: decoder.forward([6]))
    assert "forked after a bundle was loaded with memory_mb" in said
    decoder.forward([6])
