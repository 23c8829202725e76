"""Several texts at once in the C library: to the bit what each gives alone and what Python gets; and refusals."""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer.bundles import open_bundle
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder

from .c_engine import ALL_LOGITS, LAST_LOGITS, SCREENED, CEngine, Watched
from .c_library import ROOT, CError, CModel, build_program, has_compilers, run_program
from .engine_inputs import MAX_POSITIONS
from .forks import in_fork
from .model_factory import UNLIKE, VOCABULARY

pytestmark = pytest.mark.skipif(not has_compilers(), reason="no C or C++ compiler here")

IDS = np.random.default_rng(5).integers(3, VOCABULARY, 120).tolist()
OTHER_IDS = np.random.default_rng(6).integers(3, VOCABULARY, 40).tolist()
CACHE = {"num_threads": 2, "kv_cache_bytes": 4_000_000}
"""Room for several texts."""
NUM_SHARED = 70
"""More than a page, and not a whole number of them."""


@pytest.fixture
def model(tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]) -> CEngine:
    return engine_in_c(tiny_bundle("llama", quantize="int4"), num_threads=2)


def alone(model: CModel, prompt: list[int], ids: list[int]) -> list[Any]:
    """What coreinfer.h's own functions say of each token after a prompt."""
    model.truncate(0)
    model.feed(prompt)
    return [model.feed([token_id]) for token_id in ids]


@pytest.mark.parametrize("family", [*UNLIKE, "mixtral"])
def test_two_texts_and_a_fork_in_one_pass(
    family: str, tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]
) -> None:
    path = tiny_bundle(family, quantize="int4")
    lone, model = engine_in_c(path, num_threads=2), engine_in_c(path, **CACHE)
    prompts = [IDS[:80], OTHER_IDS[:9], IDS[:NUM_SHARED]]
    going_on = [IDS[80:88], OTHER_IDS[9:17], OTHER_IDS[20:28]]
    expected = [alone(lone, prompt, ids) for prompt, ids in zip(prompts, going_on, strict=True)]

    model.forward(0, prompts[0])
    other = model.add_sequence()
    model.forward(other, prompts[1])
    # Tokens of a prompt are to the bit the same only where the whole pass is.
    model.truncate_sequence(0, 0)
    model.forward(0, prompts[2])
    fork = model.fork_sequence(0, NUM_SHARED)
    model.truncate_sequence(0, 0)
    model.forward(0, prompts[0])
    numbers = [0, other, fork]
    for step, ids in enumerate(zip(*going_on, strict=True)):
        for row, wanted in zip(model.forward_rows(numbers, ids), expected, strict=True):
            np.testing.assert_array_equal(row, wanted[step])
    assert [model.num_cached(number) for number in numbers] == [88, 17, NUM_SHARED + 8]
    # Sequence 0 is that of coreinfer.h's functions.
    assert model.num_tokens == 88
    np.testing.assert_array_equal(model.feed(IDS[:1]), lone_after(lone, prompts[0], going_on[0]))


def lone_after(lone: CModel, prompt: list[int], ids: list[int]) -> Any:
    return alone(lone, prompt, [*ids, IDS[0]])[-1]


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_passes_are_those_of_the_python_engine(
    kind: str, tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]
) -> None:
    """All logits, screened heads, and a block beside rows."""
    path = tiny_bundle("gemma3", quantize=kind)
    decoder = NativeDecoder(open_bundle(path), threads=2, kv_cache_bytes=CACHE["kv_cache_bytes"])
    model = engine_in_c(path, **CACHE)
    np.testing.assert_array_equal(model.forward(0, IDS[:80], ALL_LOGITS), decoder.forward(IDS[:80], all_logits=True))
    np.testing.assert_array_equal(model.forward(0, IDS[80:81], SCREENED), decoder.forward(IDS[80:81], greedy=True))
    other = model.add_sequence()
    assert decoder.add_sequence() == other
    for last in (True, False):
        flags = SCREENED | (LAST_LOGITS if last else 0)
        decoder.select(other)
        expected = decoder.forward_beside(OTHER_IDS[:9], [0, 0], IDS[81:83], last_logits=last, greedy=True)
        np.testing.assert_array_equal(model.forward_beside(other, OTHER_IDS[:9], [0, 0], IDS[81:83], flags), expected)
    decoder.select(0)
    for screened in (False, True):
        assert model.bytes_per_token(83, SCREENED * screened) == decoder.bytes_per_token(83, greedy=screened)
    assert [layer for layer in range(model.num_layers) if model.is_wide(layer)] == decoder.wide_layers
    assert (model.num_pages, model.num_free_pages, model.page_bytes) == (
        *(decoder.num_pages, decoder.num_free_pages, decoder.page_bytes),
    )


def test_logits_need_not_be_taken(model: CEngine) -> None:
    expected = model.forward(0, IDS[:20])
    after = model.forward(0, IDS[20:21])
    model.truncate_sequence(0, 0)
    ids = np.asarray(IDS[:20], dtype=np.int32)
    model.call("forward", model._model, 0, ids.ctypes.data, len(ids), 0, None, None, None)
    np.testing.assert_array_equal(model.forward(0, IDS[20:21]), after)
    assert not np.array_equal(after, expected)


def test_pages_are_freed_and_shared(model: CEngine) -> None:
    whole = model.num_free_pages
    model.forward(0, IDS)
    fork = model.fork_sequence(0, 64)
    assert model.num_free_pages == whole - 2
    model.forward(fork, IDS[:1])
    assert model.num_free_pages == whole - 3
    model.drop_sequence(fork)
    assert model.add_sequence() == fork
    assert model.num_cached(fork) == 0
    model.truncate_sequence(0, 200)
    assert model.num_cached(0) == len(IDS)
    model.truncate_sequence(0, 0)
    assert model.num_free_pages == whole


def test_a_cache_has_room_for_64_texts_at_most(
    tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]
) -> None:
    for num_bytes, num_pages in ((0, 4), (2**62, 64 * 4)):
        model = engine_in_c(tiny_bundle("llama", quantize="int4"), kv_cache_bytes=num_bytes)
        assert (model.num_pages, model.max_tokens) == (num_pages, MAX_POSITIONS)


# The watcher


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_watcher_sees_what_that_of_python_sees(
    family: str, tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]
) -> None:
    path = tiny_bundle(family, quantize="int4")
    decoder, model = NativeDecoder(open_bundle(path), threads=2), engine_in_c(path, num_threads=2)
    expected: list[Any] = []

    def watch_python(layer: int, expert: int, values: Any, weights: Any) -> None:
        expected.append((layer, expert, values.copy(), None if weights is None else weights.copy()))

    decoder._model.forward(np.asarray(IDS[:70], dtype=np.int32), watcher=watch_python)
    seen: list[Any] = []

    def watch(watched: Watched) -> int:
        shape = (watched.num_tokens, watched.stride)
        values = np.ctypeslib.as_array(watched.activations, shape).copy()
        weights = np.ctypeslib.as_array(watched.weights, shape[:1]).copy() if watched.weights else None
        seen.append((watched.layer, watched.expert, values, weights))
        return 0

    model.forward(0, IDS[:70], watcher=watch)
    places = [call[:2] for call in seen]
    assert places == [call[:2] for call in expected]
    assert {layer for layer, _ in places} == {0, 1, 2}
    assert any(expert for _, expert in places) is (family == "mixtral")
    for got, wanted in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(got[2], wanted[2])
        np.testing.assert_array_equal(got[3], wanted[3])


def test_a_watcher_may_stop_and_nothing_was_read(model: CEngine) -> None:
    expected = model.forward(0, IDS[:20]).copy()
    after = model.forward(0, IDS[20:90])
    model.truncate_sequence(0, 20)
    calls: list[int] = []

    def stop(watched: Watched) -> int:
        calls.append(watched.layer)
        return int(watched.layer)

    with pytest.raises(CError, match=r"^STOPPED: pass: the watcher ended it$"):
        model.forward(0, IDS[20:90], watcher=stop)
    assert calls == [0, 1]
    assert model.num_cached(0) == 20
    np.testing.assert_array_equal(model.forward(0, IDS[20:90]), after)
    assert not np.array_equal(expected, after)


def test_a_watcher_of_python_that_fails_takes_its_tokens_back(tiny_bundle: Callable[..., Path]) -> None:
    decoder = NativeDecoder(open_bundle(tiny_bundle("llama")), threads=1)

    def fail(layer: int, *_: object) -> None:
        raise KeyError(layer)

    with pytest.raises(KeyError, match="0"):
        decoder._model.forward(np.asarray(IDS[:9], dtype=np.int32), watcher=fail)
    assert decoder.num_cached == 0


# What it refuses


def test_wrong_sequences_and_ids(model: CEngine) -> None:
    gone = model.add_sequence()
    model.drop_sequence(gone)
    calls: tuple[Callable[[int], object], ...] = (
        model.drop_sequence,
        model.num_cached,
        lambda n: model.truncate_sequence(n, 0),
        lambda n: model.fork_sequence(n, 0),
        lambda n: model.forward(n, [5]),
        lambda n: model.forward_rows([0, n], [5, 5]),
        lambda n: model.forward_beside(n, [5, 5], [0], [5]),
    )
    for wrong in (gone, -1, 9):
        for call in calls:
            with pytest.raises(CError, match=rf"^ARGUMENT: sequence: expected one that was added, got {wrong}$"):
                call(wrong)
    reads: tuple[Callable[[list[int]], object], ...] = (
        lambda ids: model.forward(0, ids),
        lambda ids: model.forward_rows([0] * len(ids), ids),
        lambda ids: model.forward_beside(0, [5, 5], [0] * len(ids), ids),
    )
    for ids in ([VOCABULARY], [-1], []):
        for read in reads:
            with pytest.raises(CError, match=r"^ARGUMENT: token id"):
                read(ids)
    with pytest.raises(CError, match=r"^ARGUMENT: sequence: expected another than 0, which stays, got 0$"):
        model.drop_sequence(0)
    with pytest.raises(CError, match=r"^ARGUMENT: block_ids: expected at least two tokens, got 1$"):
        model.forward_beside(0, [5], [0], [5])
    assert model.num_cached(0) == 0


def test_wrong_numbers(model: CEngine) -> None:
    calls: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: model.forward(0, [5], LAST_LOGITS), "flags"),
        (lambda: model.forward_rows([0], [5], ALL_LOGITS), "flags"),
        (lambda: model.bytes_per_token(4, LAST_LOGITS), "flags"),
        (lambda: model.bytes_per_token(-4), "num_tokens"),
        (lambda: model.truncate_sequence(0, -1), "num_tokens"),
        (lambda: model.fork_sequence(0, 1), "num_tokens"),
        (lambda: model.try_columns(0.0), "share"),
        (lambda: model.call("lay_out_columns", model._model, 32, 0), "groups"),
    )
    for call, name in calls:
        with pytest.raises(CError, match=rf"^ARGUMENT: {name}: expected"):
            call()


def test_room_is_checked_before_anything_is_read(model: CEngine) -> None:
    other = model.add_sequence()
    model.forward(0, [5] * (MAX_POSITIONS - 3))
    calls: tuple[Callable[[], object], ...] = (
        lambda: model.forward(0, [5] * 4),
        lambda: model.forward_rows([other, 0, 0, 0, 0], [5] * 5),
        lambda: model.forward_beside(0, [5] * 3, [other, 0], [5] * 2),
    )
    for call in calls:
        with pytest.raises(CError, match=r"^ARGUMENT: token ids: expected at most 3 more in the KV cache, got 4$"):
            call()
    # The pool is as large as one context.
    with pytest.raises(CError, match=r"^NO_ROOM: KV cache: expected 1 free pages"):
        model.forward_rows([0, other], [5, 5])
    assert (model.num_cached(0), model.num_cached(other)) == (MAX_POSITIONS - 3, 0)
    with pytest.raises(CError, match=r"^NO_ROOM"):
        model.fork_sequence(0, 65)


def test_nothing_is_a_null_pointer(model: CEngine) -> None:
    zeros = np.zeros(8, dtype=np.int32)
    one = zeros.ctypes.data
    own = model._model
    for name, *arguments in (
        ("add_sequence", None, one),
        ("add_sequence", own, None),
        ("fork_sequence", own, 0, 0, None),
        ("drop_sequence", None, 1),
        ("truncate_sequence", None, 0, 0),
        ("num_cached", own, 0, None),
        ("num_cached", None, 0, one),
        ("forward", None, 0, one, 1, 0, None, None, None),
        ("forward", own, 0, None, 1, 0, None, None, None),
        ("forward", own, 0, one, 1, ALL_LOGITS, None, None, None),
        ("forward_rows", own, None, one, 1, 0, one),
        ("forward_rows", own, one, None, 1, 0, one),
        ("forward_beside", own, 0, None, 2, one, one, 1, 0, one),
        ("lay_out_columns", None, 0, 0),
        ("try_columns", own, 0.5, 0, None),
        ("bytes_per_token", own, 1, 0, 1, None),
        ("use_ffn", own, None, None, 0),
        ("announce_ffn", own, None),
        ("holds_ffn", own, None, one),
        ("pack", own, 0, None),
        ("limit_memory", own, None, 1, 1),
        ("read_in_layers", None, b"x", one),
        ("keep_experts", None, None, 0, one),
        ("gather_neurons", None, None, 0, one),
        ("read_ffn", b"{}", None, one, 1, one),
        ("open_files", None, None, None, one),
    ):
        with pytest.raises(CError, match=r"^ARGUMENT: .*expected a pointer, got NULL$"):
            model.call(name, *arguments)


# Forked processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_goes_on(model: CEngine) -> None:
    model.forward(0, IDS[:20])
    other = model.fork_sequence(0, 20)
    expected = model.forward_rows([0, other], IDS[20:22]).copy()
    model.truncate_sequence(0, 20)
    model.truncate_sequence(other, 20)

    def work() -> str:
        return str(np.array_equal(model.forward_rows([0, other], IDS[20:22]), expected))

    assert in_fork(work) == "True"
    assert work() == "True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_in_the_middle_of_a_pass_is_told(model: CEngine) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait(_: Watched) -> int:
        inside.set()
        go_on.wait(20)
        return 0

    thread = threading.Thread(target=lambda: model.forward(0, IDS[:9], watcher=wait))
    thread.start()
    try:
        assert inside.wait(20)
        with pytest.raises(CError, match=r"^BUSY: the native decoder is in use by another thread$"):
            model.add_sequence()
        assert model.num_free_pages < model.num_pages
        said = in_fork(lambda: str(model.add_sequence()))
    finally:
        go_on.set()
        thread.join()
    assert said.startswith("CError: BUSY: this process was forked while another thread decoded")
    assert model.num_cached(0) == 9


# The example, and the binding


def test_the_example_goes_two_ways(
    c_library: Path, tiny_bundle: Callable[..., Path], open_in_c: Callable[..., CModel], tmp_path: Path
) -> None:
    path = tiny_bundle("qwen3", quantize="int4")
    program = build_program(c_library, ROOT / "examples/branches.c", tmp_path / "branches")
    model, ways = open_in_c(path), []
    best = np.argsort(-model.feed(IDS[:7]), kind="stable")[:2]
    for first in best:
        model.truncate(0)
        model.feed(IDS[:7])
        tokens = [int(first)]
        while len(tokens) < 10:
            tokens.append(int(model.feed(tokens[-1:]).argmax()))
        ways.append(tokens)
    done = run_program(program, path, 10, *IDS[:7])
    assert (done.returncode, done.stderr) == (0, "")
    assert [tuple(map(int, line.split())) for line in done.stdout.splitlines()] == [*zip(*ways, strict=True)]
    assert run_program(program, path).returncode == 2
    refused = run_program(program, path, 4, VOCABULARY)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"error: token id: expected 0 to {VOCABULARY - 1}, got {VOCABULARY}\n"


def test_the_python_engine_goes_through_the_c_functions() -> None:
    """Models, FFNs and sequences of the Python module are made of coreinfer_engine.h alone."""
    folder = ROOT / "runtime/engines/native/csrc"
    own = {"binding_handles.h", "binding_parts.h", "coreinfer_engine.h", "refusals.h"}
    for name in ("binding.cpp", "binding_handles.h"):
        text = (folder / name).read_text(encoding="utf-8")
        included = {line.split('"')[1] for line in text.splitlines() if line.startswith('#include "')}
        assert included <= own
        assert "Decoder" not in text


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
def test_the_python_module_shows_no_name_of_the_c_library() -> None:
    """Another libcoreinfer in the process must not take their place."""
    shown = subprocess.run(["nm", "-D", _native.__file__], capture_output=True, text=True, check=True).stdout
    assert "PyInit__native" in shown
    assert "coreinfer_" not in shown
