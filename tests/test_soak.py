"""The soak test of `benchmarks/soak.py` in small, and a prompt of thousands of tokens beside a short one."""

import importlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from coreinfer import runtime
from coreinfer.bundles import open_bundle
from coreinfer.runtime.engines.native.decoder import NativeDecoder

from .engine_inputs import with_room
from .model_factory import corpus_texts

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PASS_SECONDS, TOKEN_SECONDS = 1.0, 0.01


@pytest.mark.parametrize("num_pages", [5, 40])
def test_hundreds_of_requests_of_which_many_are_given_up(
    tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, num_pages: int
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    soak = importlib.import_module("soak")
    arguments = [tiny_bundle("llama", quantize="int4"), "--requests", 300, "--questions", 40, "--pages", num_pages]
    result = CliRunner().invoke(soak.main, [str(argument) for argument in arguments], catch_exceptions=False)
    figures = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, figures["wrong"]) == (0, 0), result.output
    assert (figures["requests"], figures["pages_lost"], figures["runs_left"]) == (300, 0, 0)
    assert figures["ways"].keys() >= {"answered", "left", "timed out", "closed", "forgotten", "cancelled", "failing"}
    assert figures["pages_kept_for_others"] > 0


def test_a_prompt_of_thousands_of_tokens_stops_nobody(tiny_bundle: Callable[..., Path]) -> None:
    bundle = with_room(open_bundle(tiny_bundle("llama", quantize="int4")), factor=16)
    engine = runtime.Engine(bundle, NativeDecoder(bundle, threads=1))
    scheduler, seconds = engine.driver.scheduler, [0.0]
    forward, forward_beside = engine.decoder.forward, engine.decoder.forward_beside
    long_ids = engine.tokenizer.encode(" ".join(corpus_texts())).ids[1:3500]
    long_prompt, short_prompt = str(engine.tokenizer.decode(long_ids)), corpus_texts()[0]
    long_options = runtime.GenerationOptions(mode="dense", max_new_tokens=4, raw=True)
    short_options = runtime.GenerationOptions(mode="dense", max_new_tokens=1000, raw=True, logit_bias={2: -100.0})
    expected = [
        [token.token_id for token in engine.start(prompt, options)]
        for prompt, options in ((long_prompt, long_options), (short_prompt, short_options))
    ]
    while scheduler.pool.evict():
        pass

    def timed(token_ids: Any, **options: Any) -> Any:
        # As on a machine where a token of a prompt takes a hundredth of a pass over the weights.
        seconds[0] += PASS_SECONDS + TOKEN_SECONDS * (len(token_ids) - 1)
        return forward(token_ids, **options)

    def timed_beside(block_ids: Any, sequences: Any, token_ids: Any, **options: Any) -> Any:
        seconds[0] += PASS_SECONDS + TOKEN_SECONDS * len(block_ids)
        return forward_beside(block_ids, sequences, token_ids, **options)

    engine.decoder.forward = timed  # type: ignore[method-assign]
    engine.decoder.forward_beside = timed_beside  # type: ignore[method-assign]
    scheduler.clock = lambda: seconds[0]
    short, long, times = list[int](), list[Any](), list[float]()

    def take(event: Any) -> None:
        short.append(event.token_id)
        times.append(seconds[0])

    engine.submit(short_prompt, short_options, take)
    for _ in range(10):
        scheduler.step()
    engine.submit(long_prompt, long_options, long.append)
    num_steps = 0
    while not long:
        before = len(short)
        scheduler.step()
        num_steps += 1
        # Not one step without a token.
        assert len(short) == before + 1
    assert num_steps > len(long_ids) // engine.decoder.block_tokens
    gaps = [after - before for before, after in pairwise(times)][10:]
    assert max(gaps) < 2 * PASS_SECONDS
    # Most passes that decode read as well.
    assert sum(gap > PASS_SECONDS for gap in gaps) > 0.5 * len(gaps)
    while scheduler.has_work:
        scheduler.step()
    assert [[token.token_id for token in long], short] == expected
