"""Texts that move on to another cluster while they are decoded."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.runtime.decoding.sampling import Sampler
from coreinfer.runtime.engines.protocol import FfnChoice
from coreinfer.runtime.routing.drift import MARGIN, DriftWatch

from .model_factory import corpus_texts

NEAR, FAR = 0.5, 0.5 / (1 - 2 * MARGIN)


def distances(nearest: int) -> np.ndarray:
    found = np.full(3, FAR)
    found[nearest] = NEAR
    return found


@pytest.mark.parametrize(
    ("stretches", "expected"),
    [
        ([1, 1], [False, True]),
        ([1, 0, 1, 1], [False, False, False, True]),
        ([1, 2, 1, 2], [False] * 4),
        ([1, 1, 0, 0], [False, True, False, True]),
        ([1, 1, 2, 2, 2], [False, True, False, True, False]),
        ([0, 0, 0], [False] * 3),
    ],
)
def test_two_stretches_in_a_row_make_a_change(stretches: list[int], expected: list[bool]) -> None:
    watch = DriftWatch(0, stretch_tokens=8)
    assert [watch.swaps(distances(nearest)) for nearest in stretches] == expected


def test_a_narrow_lead_is_no_change() -> None:
    watch = DriftWatch(0, stretch_tokens=8)
    narrow = np.array([NEAR / (1 - 0.9 * MARGIN), NEAR, 0.9])
    assert [watch.swaps(narrow) for _ in range(4)] == [False] * 4
    assert watch.cluster == 0
    assert [watch.swaps(found) for found in (distances(1), narrow, distances(1), distances(1))] == [False] * 3 + [True]
    assert watch.cluster == 1


def test_a_stretch_is_the_last_tokens_at_its_end() -> None:
    watch = DriftWatch(0, stretch_tokens=4)
    ids = list(range(12))
    assert [list(watch.stretch(ids[:count])) for count in (3, 4, 5, 8)] == [[], [0, 1, 2, 3], [], [4, 5, 6, 7]]
    assert not DriftWatch(0, stretch_tokens=0).stretch(ids)


# In a generation


@pytest.fixture(params=["native", "torch"])
def engine(request: pytest.FixtureRequest, tiny_bundle: Callable[..., Path]) -> runtime.Engine:
    return runtime.load(tiny_bundle("llama"), engine=request.param, threads=1)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int]], None]:
    """A function that makes all sampling give these tokens."""

    def force(token_ids: Sequence[int]) -> None:
        forced: Iterator[int] = iter(token_ids)
        monkeypatch.setattr(Sampler, "sample", lambda *_: next(forced))

    return force


def two_topics(engine: runtime.Engine) -> tuple[str, str]:
    """Texts of two clusters, each nearest to its own by far in every part."""
    by_cluster: dict[int, list[str]] = {}
    for text in corpus_texts():
        body = text.split("speaks of ")[1]
        if engine.router.route(body).margin > 2 * MARGIN:
            by_cluster.setdefault(engine.router.route(body).cluster, []).append(body)
    first, second = sorted(by_cluster.values(), key=len)[-2:]
    return " ".join(first), " ".join(second)


def test_a_lasting_change_swaps_the_pack(
    engine: runtime.Engine, force: Callable[[Sequence[int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_topics(engine)
    ids = [*engine.tokenizer.encode(first).ids[1:65], *engine.tokenizer.encode(second).ids[1:129]]
    force(ids)
    used: list[FfnChoice] = []
    use = engine.decoder.use

    def record(choice: FfnChoice) -> None:
        used.append(choice)
        use(choice)

    monkeypatch.setattr(engine.decoder, "use", record)
    tokens = list(
        engine.stream(
            first[:40], raw=True, mode="similarity", max_new_tokens=len(ids), drift_tokens=32, stop=["never there"]
        )
    )
    got = runtime.collect(tokens)
    assert [step.first_token for step in got.path] == [1, 129]
    before, after = (engine.router.route(text).cluster for text in (first, second))
    assert [step.cluster for step in got.path] == [before, after]
    assert [choice.cluster for choice in used] == [None, before, after]
    assert [step.label for step in got.path] == [engine.manifest.clusters[step.cluster].label for step in got.path]
    assert {token.cluster for token in tokens[:128]} == {before}
    assert {token.cluster for token in tokens[128:]} == {after}
    assert (got.cluster, got.distance) == (after, got.path[0].distance)
    # Nothing was read again.
    assert engine.decoder.cached.token_ids[got.num_prompt_tokens :] == ids[:-1]


@pytest.mark.parametrize(("mode", "drift_tokens"), [("similarity", 0), ("dense", 32), ("stability", 32)])
def test_without_drift_or_a_pack_nothing_is_swapped(
    mode: runtime.Mode, drift_tokens: int, engine: runtime.Engine, force: Callable[[Sequence[int]], None]
) -> None:
    first, second = two_topics(engine)
    ids = engine.tokenizer.encode(second).ids[1:129]
    force(ids)
    got = engine.generate(first[:40], raw=True, mode=mode, max_new_tokens=len(ids), drift_tokens=drift_tokens)
    assert [step.first_token for step in got.path] == [1]


def test_a_text_that_stays_keeps_its_pack(engine: runtime.Engine, force: Callable[[Sequence[int]], None]) -> None:
    first, _ = two_topics(engine)
    ids = engine.tokenizer.encode(first).ids[1:193]
    force(ids)
    got = engine.generate(first[:40], raw=True, mode="similarity", max_new_tokens=len(ids), drift_tokens=32)
    assert [step.cluster for step in got.path] == [engine.router.route(first).cluster]
