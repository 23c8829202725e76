"""Token shares by a quality: the search holds it on stored files, and what it cannot do is refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import ConfigError
from coreinfer.bundles.manifest import read_manifest
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.progress import Progress
from coreinfer.compiler.quality.search import least_keeps
from coreinfer.compiler.shares import search
from coreinfer.compiler.shares.search import Shares, fit_shares

from .engine_inputs import PROMPT


@pytest.fixture(scope="module")
def thin_inputs(tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory) -> CompileConfig:
    """Options of a compile of thin clusters; what compiles have in common comes from a cache."""
    cache = tmp_path_factory.mktemp("shares-cache")
    given = replace(tiny_inputs("llama"), keep=None, budgets=None, token_share="auto", packs="thin")
    return replace(given, cache_dir=cache, clusters=2)


def test_the_search_holds_the_quality(
    thin_inputs: CompileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LEAST_TOKENS", 8)
    limit = 2e-3
    compile_model(replace(thin_inputs, output=tmp_path / "b", max_kl=limit))
    manifest = read_manifest(tmp_path / "b")
    record, quality = manifest.token_shares, manifest.quality
    assert record is not None
    assert quality is not None
    for entry in quality.per_cluster:
        assert entry.score.kl <= limit
        # What is left of it is little, unless the least share holds as well.
        assert entry.score.kl > 0.5 * limit or record.clusters[entry.cluster] <= 0.31
    dense = record.scores[0]
    assert dense.score.kl <= limit
    assert dense.asked == record.default
    engine = runtime.load(tmp_path / "b", engine="torch", device="cpu", dtype="float32")
    got = engine.generate(PROMPT, raw=True, max_new_tokens=2, mode="similarity")
    assert got.token_share == record.clusters[got.cluster] < 1


def test_clusters_with_little_text_are_judged_together(
    thin_inputs: CompileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LEAST_TOKENS", 10_000)
    limits = (1e-3, 1e-2)
    found = []
    for limit in limits:
        compile_model(replace(thin_inputs, output=tmp_path / f"{limit}", max_kl=limit))
        manifest = read_manifest(tmp_path / f"{limit}")
        assert manifest.token_shares is not None
        assert manifest.quality is not None
        assert len(set(manifest.token_shares.clusters)) == 1
        assert manifest.quality.clusters.kl <= limit
        found.append(manifest.token_shares.clusters[0])
    assert found[0] > found[1]


def test_packs_of_own_weights_have_their_shares_searched(
    thin_inputs: CompileConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LEAST_TOKENS", 8)
    own = replace(thin_inputs, packs="own", keep=0.9, budgets="uniform", controls=False)
    compile_model(replace(own, output=tmp_path / "b", min_top1=0.6))
    record = read_manifest(tmp_path / "b").token_shares
    assert record is not None
    (planned,) = (found for found in record.scores if (found.weights, found.shares) == ("clusters", "planned"))
    assert planned.score.top1 >= 0.6
    with pytest.raises(ConfigError, match=r"--token-share auto: .* loses more than asked for .* with all weights read"):
        compile_model(replace(own, output=tmp_path / "c", keep=0.4, max_kl=1e-5))


def test_without_held_out_text_or_too_much_rounding_it_is_refused(thin_inputs: CompileConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rounding to int4 alone costs KL"):
        compile_model(replace(thin_inputs, output=tmp_path / "b", quantize="int4", max_kl=1e-7))
    # At once: no thresholds are found for it, and no packs made.
    own = replace(thin_inputs, packs="own", keep=0.9, output=tmp_path / "c", quantize="int4", max_kl=1e-7)
    for config in (own, replace(own, packs="thin", keep=None)):
        progress = Progress()
        with pytest.raises(ConfigError, match="rounding to int4 alone costs KL"):
            compile_model(config, progress)
        assert not {"moments", "profile", "shares"} & progress.stage_seconds.keys()
    with pytest.raises(ConfigError, match="--token-share auto: expected calibration text enough to hold some out"):
        fit_shares(thin_inputs, None, None, None, [0, 0], None)  # type: ignore[arg-type]
    given = replace(thin_inputs, token_share=0.5)
    assert fit_shares(given, None, None, None, [3, 4], None) == Shares(dense=0.5, clusters=(0.5, 0.5))  # type: ignore[arg-type]


def test_few_tries_find_shares_whose_loss_grows_as_a_power() -> None:
    limits, tries = np.array([0.03, 0.1, 0.5]), []

    def excesses(shares: Sequence[float]) -> list[float]:
        tries.append(shares)
        loss = 3.2 * (1 - np.asarray(shares)) ** 3.4
        return [search._straight(excess) for excess in loss / limits - 1]

    found = least_keeps(
        excesses,
        num_clusters=3,
        least=0.3,
        tolerance=-search._straight(-0.05),
        num_tries=6,
        first_try=0.65,
        power=1.0,
        fine=0.005,
    )
    expected = 1 - (limits / 3.2) ** (1 / 3.4)
    assert all(0 <= share - least < 0.02 for share, least in zip(found, expected, strict=True))
    assert len(tries) <= 4
