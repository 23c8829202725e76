"""Mixtures of experts where memory for weights is limited: the same bits as without, and no expert too many."""

import os
import random
import shutil
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

from .model_factory import MIXTURES, VOCABULARY, save_model
from .page_residency import resident_bytes
from .skewed_mixtures import save_skewed
from .test_memory_limit import KV_BYTES, least_mb, limited
from .test_narrow_experts import wide_settings

IDS = np.random.default_rng(1).integers(3, VOCABULARY, 60).tolist()
PACKS = ("whole", "narrow", "both")
STEPS = 120


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
