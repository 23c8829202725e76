"""Decoding where memory for weights is limited: the same bits as without, and no page too many."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from click.testing import CliRunner
from coreinfer import runtime
from coreinfer.bundles import Bundle, ConfigError, CoreInferError, open_bundle
from coreinfer.runtime.commands.run import main as run_main
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from hypothesis import strategies

from .engine_inputs import PROMPT
from .forks import refusal_in_fork
from .model_factory import SHAPES, UNLIKE, VOCABULARY, corpus_texts
from .page_residency import resident_bytes

IDS = np.random.default_rng(1).integers(3, VOCABULARY, 40).tolist()
CHOICES = [DENSE, *(FfnChoice(cluster=cluster) for cluster in range(4))]
KV_BYTES = 400_000  # some pages
SHORT = runtime.GenerationOptions(max_new_tokens=6)


def least_mb(bundle_dir: Path) -> float:
    """The smallest limit that a bundle can be loaded with, as the refusal of a smaller one says."""
    with pytest.raises(ConfigError, match="memory_mb: expected at least") as caught:
        NativeDecoder(open_bundle(bundle_dir), threads=1, memory_bytes=1, kv_cache_bytes=KV_BYTES)
    return float(str(caught.value).split("at least ")[1].split(" MB")[0])


def limited(bundle: Bundle, mb: float) -> NativeDecoder:
    return NativeDecoder(bundle, threads=2, memory_bytes=round(mb * 1e6), kv_cache_bytes=KV_BYTES)


def all_logits(decoder: NativeDecoder) -> list[Any]:
    """Logits of blocks, single tokens and rows of several sequences, with each FFN in turn, some of them in turns."""
    rows = []
    for choice in [*CHOICES, *CHOICES[2:0:-1], DENSE]:
        decoder.use(choice)
        decoder.truncate(0)
        rows.append(decoder.forward(IDS[:20], all_logits=True))
        rows += [decoder.forward([token_id], greedy=greedy) for token_id in IDS[20:24] for greedy in (False, True)]
    other = decoder.add_sequence()
    for choice in itertools.islice(itertools.cycle(CHOICES[1:3]), 6):
        decoder.use(choice)
        rows.append(decoder.forward_rows([0, other, 0], IDS[:3]))
    decoder.drop_sequence(other)
    decoder.truncate(0)
    return rows


@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        *((family, "int4") for family in (*SHAPES, "gpt_neox")),
        *((family, quantize) for family in UNLIKE for quantize in ("bf16", "int8")),
    ],
)
def test_logits_are_those_without_a_limit(family: str, quantize: str, tiny_bundle: Callable[..., Path]) -> None:
    bundle_dir = tiny_bundle(family, quantize=quantize)
    bundle = open_bundle(bundle_dir)
    expected = all_logits(NativeDecoder(bundle, threads=2))
    least = least_mb(bundle_dir) + 0.06
    for mb in (least, 1.3 * least, 100.0):
        decoder = limited(open_bundle(bundle_dir), mb)
        for _ in range(2):
            got = all_logits(decoder)
            assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
        reads = decoder.disk_reads
        assert reads is not None
        assert reads.num_bytes > 0
        assert reads.num_hits + reads.num_misses > 0


def test_layers_stay_within_their_part(tiny_bundle: Callable[..., Path]) -> None:
    bundle_dir = tiny_bundle("llama", quantize="int4")
    for factor in (1.02, 1.2, 1.5):
        decoder = limited(open_bundle(bundle_dir), factor * least_mb(bundle_dir))
        residency = decoder._residency
        assert residency is not None
        for choice in CHOICES * 3:
            decoder.use(choice)
            decoder.truncate(0)
            decoder.forward(IDS)
            for token_id in IDS[:5]:
                decoder.forward([token_id], greedy=True)
                assert decoder._model.layer_bytes_used <= residency.plan.layers


def test_an_ffn_that_fits_is_read_once(tiny_bundle: Callable[..., Path]) -> None:
    decoder = limited(open_bundle(tiny_bundle("llama", quantize="int4")), 100.0)
    decoder.use(CHOICES[1])
    decoder.forward([5])
    decoder.forward([6])
    before = decoder.disk_reads
    for token_id in IDS:
        decoder.forward([token_id], greedy=True)
    after = decoder.disk_reads
    assert before is not None
    assert after is not None
    assert after.since(before).num_bytes == 0
    assert after.since(before).num_misses == 0
    assert decoder._model.holds(decoder._ffn(0))


def test_pages_of_packs_and_of_the_dense_ffn_do_not_stay(
    tiny_bundle: Callable[..., Path], make_copy: Callable[..., Path]
) -> None:
    # Of a copy: pages that another decoder has mapped stay with it.
    bundle_dir = make_copy()
    bundle = open_bundle(bundle_dir, lazy_packs=True, spare_memory=True)
    decoder = limited(bundle, 1.1 * least_mb(tiny_bundle("llama", quantize="int4")))
    all_logits(decoder)
    assert bundle.dense is not None
    for file in (bundle.dense, *bundle.packs):
        assert resident_bytes(file) == 0, file.path.name
    assert resident_bytes(bundle.base) > 0


def test_two_hundred_turns_over_all_clusters(tiny_bundle: Callable[..., Path], make_copy: Callable[..., Path]) -> None:
    bundle_dir = tiny_bundle("llama", quantize="int4")
    mb = 1.1 * least_mb(bundle_dir)
    free = runtime.load(bundle_dir, engine="native", threads=1, mode="similarity")
    # Of a copy: pages that another engine has mapped stay with it.
    bound = runtime.load(make_copy(), engine="native", threads=1, mode="similarity", memory_mb=mb, kv_cache_mb=0.4)
    turns = list(itertools.islice(itertools.cycle(" ".join(text.split()[5:15]) for text in corpus_texts()), 200))
    clusters, used = set(), []
    decoder = bound.decoder
    assert isinstance(decoder, NativeDecoder)
    assert decoder._residency is not None
    for turn in turns:
        expected, got = (engine.generate(turn, max_new_tokens=6) for engine in (free, bound))
        assert got.token_ids == expected.token_ids
        assert got.path == expected.path
        clusters.add(got.cluster)
        used.append(decoder._model.layer_bytes_used)
        assert got.disk_reads is not None
        assert expected.disk_reads is None
    assert clusters == set(range(4))
    assert max(used) <= decoder._residency.plan.layers
    assert max(used[100:]) <= max(used[:100])
    assert bound.bundle.dense is not None
    for file in (bound.bundle.dense, *bound.bundle.packs):
        assert resident_bytes(file) == 0, file.path.name


def test_a_conversation_with_a_limit_is_the_same(tiny_bundle: Callable[..., Path]) -> None:
    bundle_dir = tiny_bundle("llama", quantize="int4")
    texts = []
    for mb in (None, 1.2 * least_mb(bundle_dir)):
        engine = runtime.load(bundle_dir, engine="native", threads=1, mode="similarity", memory_mb=mb, kv_cache_mb=0.4)
        conversation = engine.conversation("Speak of the sea.")
        texts.append([conversation.send(text, SHORT).text for text in (PROMPT, "and salt", "and lemon")])
    assert texts[0] == texts[1]


def test_several_at_once_of_different_clusters(tiny_bundle: Callable[..., Path]) -> None:
    bundle_dir = tiny_bundle("llama", quantize="int4")
    prompts = [" ".join(text.split()[5:15]) for text in corpus_texts()[:12]]
    answers = []
    for mb in (None, 1.1 * least_mb(bundle_dir)):
        engine = runtime.load(bundle_dir, engine="native", threads=1, memory_mb=mb, kv_cache_mb=0.4)
        answers.append([answer.token_ids for answer in engine.generate(prompts, max_new_tokens=8)])
    assert answers[0] == answers[1]


def test_lossless_decoding_with_a_limit(tiny_bundle: Callable[..., Path]) -> None:
    bundle_dir = tiny_bundle("llama", quantize="int4")
    dense = runtime.load(bundle_dir, engine="native", threads=1).generate(PROMPT, mode="dense", max_new_tokens=12)
    bound = runtime.load(bundle_dir, engine="native", threads=1, memory_mb=1.1 * least_mb(bundle_dir), kv_cache_mb=0.4)
    assert bound.generate(PROMPT, mode="lossless", max_new_tokens=12).token_ids == dense.token_ids


@pytest.mark.parametrize("mode", ["stability", "fused"])
def test_modes_that_gather_are_refused(mode: Any, tiny_bundle: Callable[..., Path]) -> None:
    bundle_dir = tiny_bundle("llama")
    with pytest.raises(ConfigError, match=rf"mode '{mode}': with memory_mb the dense FFN"):
        runtime.load(bundle_dir, mode=mode, memory_mb=100)
    engine = runtime.load(bundle_dir, engine="native", threads=1, memory_mb=100)
    with pytest.raises(ConfigError, match=rf"mode '{mode}' gathers from the whole dense FFN, which memory_mb"):
        engine.generate(PROMPT, mode=mode)
    ids = tuple(np.arange(5, dtype=np.int32) for _ in range(3))
    with pytest.raises(ConfigError, match="memory_mb: a prompt's own neurons"):
        engine.decoder.use(FfnChoice(neuron_ids=ids))


def test_too_little_memory_is_one_line(bundle: Path) -> None:
    done = CliRunner().invoke(run_main, [str(bundle), "Hello", "--engine", "native", "--memory-mb", "0.01"])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "memory_mb: expected at least" in done.stderr


def test_the_torch_engine_has_no_such_limit(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="memory_mb: expected none with the torch engine"):
        runtime.load(bundle, engine="torch", memory_mb=100)
    with pytest.raises(ConfigError, match="memory_mb: only the native engine"):
        runtime.load(bundle, dtype="float32", memory_mb=100)


def test_figures_say_what_was_read(bundle: Path) -> None:
    done = CliRunner().invoke(
        run_main, [str(bundle), "Hello", "--engine", "native", "--memory-mb", "100", "--max-new-tokens", "4"]
    )
    assert done.exit_code == 0
    assert "MB read from disk" in done.stderr


def test_a_layer_that_cannot_be_read_fails_the_generation(make_copy: Callable[..., Path]) -> None:
    bundle_dir = make_copy(quantize="bf16")  # of which three layers do not fit
    decoder = limited(open_bundle(bundle_dir), least_mb(bundle_dir) + 0.001)
    decoder.use(DENSE)
    decoder.forward(IDS)
    os.truncate(bundle_dir / "dense.safetensors", 8192)
    with pytest.raises(CoreInferError, match="a layer could not be read"):
        decoder.forward(IDS)


@pytest.fixture
def make_copy(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that copies a bundle, so that it may be changed."""

    def copy(quantize: str = "int4") -> Path:
        return Path(shutil.copytree(tiny_bundle("llama", quantize=quantize), tmp_path / "copy"))

    return copy


def test_a_file_system_without_direct_reads(make_copy: Callable[..., Path]) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("no tmpfs")
    source = make_copy()
    bundle_dir = shared / f"coreinfer-test-{os.getpid()}"
    shutil.copytree(source, bundle_dir)
    try:
        expected = all_logits(NativeDecoder(open_bundle(source), threads=2))
        got = all_logits(limited(open_bundle(bundle_dir), 1.1 * least_mb(bundle_dir)))
        assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    finally:
        shutil.rmtree(bundle_dir)


def test_a_forked_process_is_told_to_load_again(tiny_bundle: Callable[..., Path]) -> None:
    decoder = limited(open_bundle(tiny_bundle("llama", quantize="int4")), 100.0)
    decoder.use(DENSE)
    decoder.forward([5])
    said = refusal_in_fork(lambda: decoder.forward([6]))
    assert "forked after a bundle was loaded with memory_mb" in said
    decoder.forward([6])


def test_what_stays_of_layers_of_unlike_sizes() -> None:
    # The largest stays: what passes then needs 2 x 3, and not 2 x 8.
    assert _native.kept_layers([8, 3, 2, 3, 2], 17, True) == [True, True, False, False, False]
    assert _native.kept_layers([8, 3, 2, 3, 2], 18, True) == [True] * 5
    assert _native.kept_layers([3, 3, 3, 3], 9, True) == [False, False, False, True]
    assert _native.kept_layers([3, 3, 3, 3], 5, True) == [False] * 4
    assert _native.kept_layers([3, 3, 3, 3], 6, False) == [False, True, False, True]


@hypothesis.given(
    layer_bytes=strategies.lists(strategies.integers(1, 50), min_size=1, max_size=12),
    room=strategies.integers(0, 300),
    streams=strategies.booleans(),
)
def test_what_stays_fits_beside_what_passes(layer_bytes: list[int], room: int, *, streams: bool) -> None:
    kept = _native.kept_layers(layer_bytes, room, streams)
    stays = sum(size for size, stay in zip(layer_bytes, kept, strict=True) if stay)
    passing = [size for size, stay in zip(layer_bytes, kept, strict=True) if not stay]
    assert all(kept) == (sum(layer_bytes) <= room)
    assert stays + (2 * max(passing, default=0) if streams and stays else 0) <= room
    # No less than of an even spread of as many as fit beside twice the largest of all.
    count, spare = len(layer_bytes), room - (2 * max(layer_bytes) if streams else 0)
    spreads = [
        sum(size for i, size in enumerate(layer_bytes) if (i + 1) * stay // count > i * stay // count)
        for stay in range(count - 1, -1, -1)
    ]
    assert stays >= next((total for total in spreads if total <= spare), 0)
