"""The pool of the KV cache: pages that sequences share, copy, give back, and are refused."""

import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles import Bundle, ConfigError, open_bundle
from coreinfer.bundles.shared.machine import cpu_multiplies_bf16
from coreinfer.bundles.statistics import SELECTIONS
from coreinfer.runtime.engines import kv_limits
from coreinfer.runtime.engines.kv_limits import PAGE_TOKENS, count_pages, pages_of
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import Decoder, KvPoolFull
from coreinfer.runtime.engines.torch.decoder import TorchDecoder

from .model_factory import SHAPES, VOCABULARY

IDS = np.random.default_rng(3).integers(3, VOCABULARY, 256).tolist()
ENGINES = ("native", "torch")


def make(engine: str, bundle: Bundle, *, num_pages: int | None = None) -> Any:
    """A decoder whose pool has so many pages."""
    if engine == "native":
        one = NativeDecoder(bundle, threads=1, isa="portable")
        limit = None if num_pages is None else num_pages * one.page_bytes
        return NativeDecoder(bundle, threads=1, kv_cache_bytes=limit)
    model = bundle.manifest.model
    page_bytes = PAGE_TOKENS * 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
    limit = None if num_pages is None else num_pages * page_bytes
    return TorchDecoder(bundle, device="cpu", dtype="float32", kv_cache_bytes=limit)


def read_fresh(decoder: Any, pieces: Sequence[Sequence[int]]) -> Any:
    """Logits of the last token of each piece, read into a sequence of its own."""
    selected, number = decoder.sequence, decoder.add_sequence()
    decoder.select(number)
    logits = [decoder.forward(piece) for piece in pieces]
    decoder.select(selected)
    decoder.drop_sequence(number)
    return np.concatenate(logits)


# What a fork gives


@pytest.mark.parametrize("num_tokens", [5, 63, 64, 65, 128, 150])
@pytest.mark.parametrize("family", SHAPES)
def test_a_fork_goes_on_as_a_sequence_of_its_own(
    family: str, num_tokens: int, tiny_bundle: Callable[..., Path]
) -> None:
    decoder = make("native", open_bundle(tiny_bundle(family)))
    decoder.forward(IDS[:150])
    steps = [[token_id] for token_id in IDS[200:220]]
    expected = read_fresh(decoder, [IDS[:num_tokens], *steps])[1:]
    whole = read_fresh(decoder, [IDS[:150], [7], [8]])[1:]
    fork = decoder.fork_sequence(0, num_tokens)
    # By turns: neither writes where the other reads.
    np.testing.assert_array_equal(decoder.forward([7]), whole[:1])
    decoder.select(fork)
    assert (decoder.num_cached, decoder.cached.token_ids) == (num_tokens, IDS[:num_tokens])
    np.testing.assert_array_equal(np.concatenate([decoder.forward(step) for step in steps]), expected)
    decoder.select(0)
    assert (decoder.num_cached, decoder.cached.token_ids) == (151, [*IDS[:150], 7])
    np.testing.assert_array_equal(decoder.forward([8]), whole[1:])
    # Without its source too.
    decoder.truncate(0)
    decoder.forward(IDS[100:])
    decoder.select(fork)
    decoder.truncate(num_tokens)
    np.testing.assert_array_equal(np.concatenate([decoder.forward(step) for step in steps]), expected)


@pytest.mark.parametrize("source", ["first", "added"])
def test_a_fork_of_the_torch_engine_goes_on_too(source: str, tiny_bundle: Callable[..., Path]) -> None:
    decoder = make("torch", open_bundle(tiny_bundle("gemma3")))
    number = 0 if source == "first" else decoder.add_sequence()
    decoder.select(number)
    decoder.forward(IDS[:150])
    expected = read_fresh(decoder, [IDS[:90], IDS[90:100]])[1:]
    fork = decoder.fork_sequence(number, 90)
    whole = decoder.forward([7])
    decoder.select(fork)
    assert (decoder.num_cached, decoder.cached.token_ids) == (90, IDS[:90])
    np.testing.assert_allclose(decoder.forward(IDS[90:100]), expected, atol=1e-4)
    decoder.select(number)
    decoder.truncate(150)
    np.testing.assert_array_equal(decoder.forward([7]), whole)


def test_a_fork_of_recorded_steps_goes_on_too(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("llama"))
    decoder = TorchDecoder(bundle, device="cpu", dtype="float32", gpu_memory_mb=300, cuda_graphs="on")
    decoder.forward(IDS[:100])
    fork = decoder.fork_sequence(0, 90)
    expected = decoder.forward([7])
    decoder.select(fork)
    decoder.forward(IDS[90:100])
    np.testing.assert_allclose(decoder.forward([7]), expected, atol=1e-4)


def test_a_fork_shares_whole_pages(tiny_bundle: Callable[..., Path]) -> None:
    decoder = make("native", open_bundle(tiny_bundle("llama")), num_pages=6)
    decoder.forward(IDS[:150])
    assert decoder.num_free_pages == 3
    decoder.fork_sequence(0, 128)
    assert decoder.num_free_pages == 3
    other = decoder.fork_sequence(0, 150)
    assert decoder.num_free_pages == 2
    # What one of them writes where all may read is written to a copy.
    decoder.truncate(100)
    assert decoder.num_free_pages == 3
    decoder.forward([5])
    assert decoder.num_free_pages == 2
    decoder.drop_sequence(other)
    assert decoder.num_free_pages == 3


# When pages lack


@pytest.mark.parametrize("engine", ENGINES)
def test_what_has_no_pages_is_refused_and_changes_nothing(engine: str, tiny_bundle: Callable[..., Path]) -> None:
    decoder = make(engine, open_bundle(tiny_bundle("llama")), num_pages=3)
    assert (decoder.page_tokens, decoder.num_pages, decoder.num_free_pages) == (64, 3, 3)
    decoder.forward(IDS[:100])
    expected = decoder.forward([7])
    decoder.truncate(100)
    other = decoder.add_sequence()
    calls: list[Callable[[], object]] = [
        lambda: decoder.forward(IDS[:93]),
        lambda: decoder.forward(IDS[:150], all_logits=True),
        lambda: decoder.prompt_statistics(IDS[:100], SELECTIONS),
        lambda: decoder.forward_rows([0, other, *[0] * 30], IDS[:32]),
        lambda: decoder.forward_rows([other] * 65, IDS[:65]),
        lambda: decoder.fork_sequence(0, 100) and decoder.fork_sequence(0, 100),
    ]
    for call in calls[:-1]:
        with pytest.raises(KvPoolFull, match=r"KV cache: expected 2 free pages of 64 tokens, got 1"):
            call()
        assert (decoder.num_cached, decoder.num_free_pages, len(decoder.cached.token_ids)) == (100, 1, 100)
    with pytest.raises(KvPoolFull, match="KV cache: expected"):
        calls[-1]()
    np.testing.assert_array_equal(decoder.forward([7]), expected)


def test_a_copy_needs_a_page_too(tiny_bundle: Callable[..., Path]) -> None:
    decoder = make("native", open_bundle(tiny_bundle("llama")), num_pages=2)
    decoder.forward(IDS[:100])
    with pytest.raises(KvPoolFull, match="expected 1 free pages of 64 tokens, got 0"):
        decoder.fork_sequence(0, 70)
    fork = decoder.fork_sequence(0, 64)
    decoder.truncate(60)
    decoder.select(fork)
    decoder.forward(IDS[64:70])
    decoder.select(0)
    with pytest.raises(KvPoolFull, match="expected 1 free pages of 64 tokens, got 0"):
        decoder.forward([5])
    decoder.drop_sequence(fork)
    decoder.forward([5])
    assert (decoder.num_cached, decoder.num_free_pages) == (61, 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_wrong_forks_are_refused(engine: str, tiny_bundle: Callable[..., Path]) -> None:
    decoder = make(engine, open_bundle(tiny_bundle("llama")))
    decoder.forward(IDS[:10])
    for source, num_tokens, reason in (
        (0, 11, "num_tokens: expected 0 to 10"),
        (0, -1, "num_tokens"),
        (1, 0, "sequence"),
    ):
        with pytest.raises(ConfigError, match=reason):
            decoder.fork_sequence(source, num_tokens)
    assert decoder.add_sequence() == 1


# Limits


def test_a_limit_below_a_page_is_refused(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("llama"))
    for engine in ENGINES:
        with pytest.raises(ConfigError, match=r"kv_cache_mb: expected at least .* a page of 64 tokens"):
            make(engine, bundle, num_pages=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_loading_sets_the_limit(engine: Any, tiny_bundle: Callable[..., Path]) -> None:
    page_mb = 0.2
    loaded = runtime.load(tiny_bundle("llama"), engine=engine, device="cpu", kv_cache_mb=3 * page_mb)
    # Torch computes in float32 where the CPU does not multiply bfloat16.
    torch_bytes = PAGE_TOKENS * 3 * 2 * 2 * 8 * (2 if cpu_multiplies_bf16() else 4)
    page_bytes = loaded.decoder.page_bytes if isinstance(loaded.decoder, NativeDecoder) else torch_bytes
    assert loaded.decoder.num_pages == 3 * page_mb * 1e6 // page_bytes
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="kv_cache_mb: expected a number above 0"):
            runtime.load(tiny_bundle("llama"), engine=engine, device="cpu", kv_cache_mb=wrong)


def test_a_prompt_that_the_pool_does_not_hold_is_refused_by_name(tiny_bundle: Callable[..., Path]) -> None:
    engine = runtime.load(tiny_bundle("llama"), engine="native", threads=1, kv_cache_mb=0.05)
    assert engine.decoder.num_pages == 2
    prompt = "flour and butter " * 22
    with pytest.raises(
        ConfigError, match=r"prompt: expected 1 to 128 tokens, got .*KV cache has no room.*raise kv_cache_mb"
    ):
        engine.generate(prompt, max_new_tokens=2)
    assert engine.generate("flour", max_new_tokens=2).token_ids


def test_a_pool_beyond_the_address_space_is_refused(tiny_bundle: Callable[..., Path]) -> None:
    code = (
        "import resource\n"
        "from coreinfer.bundles import ConfigError, open_bundle\n"
        "from coreinfer.runtime.engines.native.decoder import NativeDecoder\n"
        f"bundle = open_bundle({str(tiny_bundle('llama'))!r})\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "try:\n    NativeDecoder(bundle, threads=1, kv_cache_bytes=9 << 30)\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kv_cache_mb: KV cache: the system does not reserve 96")
    assert done.stdout.endswith("; give a smaller limit\n")


def test_the_default_is_half_of_the_free_memory_or_64_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_limits, "free_memory_bytes", lambda: 2_000_000)
    assert count_pages(None, page_bytes=1000, max_positions=4096) == 1000
    assert count_pages(None, page_bytes=1, max_positions=4096) == 64 * 64
    assert count_pages(None, page_bytes=1, max_positions=100) == 1024
    assert count_pages(None, page_bytes=10**9, max_positions=4096) == 1
    assert count_pages(5_999, page_bytes=1000, max_positions=4096) == 5


def test_free_memory_is_no_more_than_the_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert kv_limits.free_memory_bytes() > 0
    for limit, expected in ((b"5000000\n", 4_999_000), (b"max\n", None)):
        (tmp_path / "max").write_bytes(limit)
        (tmp_path / "current").write_bytes(b"1000\n")
        monkeypatch.setattr(kv_limits, "_GROUP_LIMITS", ((tmp_path / "max", tmp_path / "current"),))
        assert kv_limits.free_memory_bytes() == expected or (expected is None and kv_limits.free_memory_bytes() > 10**7)


# Many operations beside a plain model of them


@dataclass
class _Plain:
    """What the pool should do, with a list of page names for each sequence."""

    num_pages: int
    pages: dict[int, list[int]] = field(default_factory=lambda: {0: []})
    ids: dict[int, list[int]] = field(default_factory=lambda: {0: []})
    names: int = 0

    @property
    def num_free(self) -> int:
        return self.num_pages - len({name for pages in self.pages.values() for name in pages})

    def needed(self, number: int, count: int) -> int:
        length = len(self.ids[number])
        return pages_of(length + count) - len(self.pages[number]) + self.must_copy(number)

    def must_copy(self, number: int) -> bool:
        length = len(self.ids[number])
        return length % PAGE_TOKENS > 0 and self.num_holders(self.pages[number][length // PAGE_TOKENS]) > 1

    def num_holders(self, name: int) -> int:
        return sum(name in pages for pages in self.pages.values())

    def new(self) -> int:
        self.names += 1
        return self.names

    def append(self, number: int, token_ids: list[int]) -> None:
        if self.must_copy(number):
            self.pages[number][-1] = self.new()
        self.ids[number] += token_ids
        while len(self.pages[number]) < pages_of(len(self.ids[number])):
            self.pages[number].append(self.new())

    def truncate(self, number: int, count: int) -> None:
        del self.ids[number][count:]
        del self.pages[number][pages_of(len(self.ids[number])) :]

    def fork(self, source: int, number: int, count: int) -> None:
        self.ids[number] = self.ids[source][:count]
        self.pages[number] = self.pages[source][: count // PAGE_TOKENS]
        if count % PAGE_TOKENS:
            self.pages[number].append(self.new())


def test_ten_thousand_operations_lose_no_page(tiny_bundle: Callable[..., Path]) -> None:
    decoder = make("native", open_bundle(tiny_bundle("llama")), num_pages=12)
    plain, rng = _Plain(num_pages=12), random.Random(5)
    num_refused = 0
    for _ in range(10_000):
        number = rng.choice(list(plain.ids))
        decoder.select(number)
        try:
            num_refused += _operate(decoder, plain, number, rng)
        finally:
            assert decoder.num_free_pages == plain.num_free
        if number in plain.ids:
            decoder.select(number)
            assert (decoder.num_cached, decoder.cached.token_ids) == (len(plain.ids[number]), plain.ids[number])
    assert num_refused > 100
    # The pages hold what was read, whatever happened: calls of two tokens or more are alike.
    fresh = make("native", open_bundle(tiny_bundle("llama")))
    for number in list(plain.ids):
        fresh.truncate(0)
        expected = fresh.forward([*plain.ids[number][:250], 7, 8], all_logits=True)[-2:]
        decoder.select(number)
        decoder.truncate(250)
        np.testing.assert_array_equal(decoder.forward([7, 8], all_logits=True), expected)
        if number:
            decoder.drop_sequence(number)
    decoder.select(0)
    decoder.truncate(0)
    assert decoder.num_free_pages == 12


def _operate(decoder: Decoder, plain: _Plain, number: int, rng: random.Random) -> int:
    """Do something at random to a sequence, in both; whether it was refused, as it should be."""
    what = rng.choice(["add", "drop", "fork", "fork", "truncate", "append", "append", "append"])
    length = len(plain.ids[number])
    if what == "add" and len(plain.ids) < 9:
        added = decoder.add_sequence()
        assert added not in plain.ids
        plain.ids[added], plain.pages[added] = [], []
    elif what == "drop" and number:
        decoder.drop_sequence(number)
        del plain.ids[number], plain.pages[number]
    elif what == "truncate":
        count = rng.randrange(length + 2)
        decoder.truncate(count)
        plain.truncate(number, count)
    elif what == "fork" and len(plain.ids) < 9:
        count = rng.choice([length, rng.randrange(length + 1), length // PAGE_TOKENS * PAGE_TOKENS])
        if plain.num_free < (count % PAGE_TOKENS > 0):
            with pytest.raises(KvPoolFull):
                decoder.fork_sequence(number, count)
            return 1
        plain.fork(number, decoder.fork_sequence(number, count), count)
    elif what == "append":
        token_ids = rng.choices(IDS, k=rng.choice([2, 3, 40, 64]))
        if length + len(token_ids) > 250:
            return 0
        if plain.needed(number, len(token_ids)) > plain.num_free:
            with pytest.raises(KvPoolFull):
                decoder.forward(token_ids)
            return 1
        decoder.forward(token_ids)
        plain.append(number, token_ids)
    return 0
