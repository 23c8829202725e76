"""The engine against transformers' own generate, against itself, and against callers who err."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles.layout import LAYOUT
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.generation import PromptFfn
from coreinfer.runtime.routing.modes import largest_cluster

from .bundle_factory import list_again
from .engine_inputs import DIALOGUE, MAX_POSITIONS, PROMPT, SAMPLED, UNFAMILIAR, load
from .model_factory import build_model, build_tokenizer, corpus_texts


@pytest.fixture(scope="module")
def engine(tiny_bundle: Callable[..., Path]) -> runtime.Engine:
    return load(tiny_bundle("llama"))


def reference_ids(family: str, prompt_ids: list[int], **options: Any) -> list[int]:
    """Greedy tokens of transformers on the original weights, its end of text included."""
    ids = torch.tensor([prompt_ids])
    with torch.inference_mode():
        output: Any = build_model(family).generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options
        )
    found: list[int] = output[0, len(prompt_ids) :].tolist()
    return found


def greedy_ids(engine: runtime.Engine, prompt: str, prefill: FfnChoice, decode: FfnChoice, count: int) -> list[int]:
    """Greedy tokens by hand: the prompt with one choice of weights, the rest with another."""
    decoder = engine.decoder
    decoder.truncate(0)
    decoder.use(prefill)
    logits = decoder.forward(engine.tokenizer.encode(prompt).ids)
    decoder.use(decode)
    ids = [int(logits[-1].argmax())]
    while len(ids) < count:
        ids.append(int(decoder.forward([ids[-1]])[-1].argmax()))
    return ids


# The same model


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_dense_greedy_is_transformers_generate(family: str, tiny_bundle: Callable[..., Path]) -> None:
    engine = load(tiny_bundle(family), mode="dense")
    for text in (PROMPT, corpus_texts()[7]):
        prompt_ids = build_tokenizer()(text)["input_ids"]
        got = engine.generate(text, raw=True, max_new_tokens=40)
        assert list(got.token_ids) == reference_ids(family, prompt_ids, max_new_tokens=40)
        assert got.num_prompt_tokens == len(prompt_ids)
        assert got.mode == "dense"


def test_messages_are_read_as_transformers_reads_them(engine: runtime.Engine) -> None:
    prompt_ids: Any = build_tokenizer().apply_chat_template(DIALOGUE, add_generation_prompt=True, return_dict=False)
    got = engine.generate(DIALOGUE, mode="dense", max_new_tokens=30)
    assert got.num_prompt_tokens == len(prompt_ids)
    assert list(got.token_ids) == reference_ids("llama", prompt_ids, max_new_tokens=30)


def test_messages_are_routed_by_the_last_question(engine: runtime.Engine) -> None:
    got = engine.generate(DIALOGUE, max_new_tokens=1)
    question, sea = (engine.router.route(DIALOGUE[number]["content"]) for number in (-1, 1))
    assert (got.cluster, got.distance) == (question.cluster, question.distance)
    # Which of the tiny clusters are distinct depends on the CPU that compiled them; distances differ on all.
    assert got.distance != sea.distance


def test_similarity_reads_dense_and_decodes_with_the_nearest_pack(engine: runtime.Engine) -> None:
    text_of_cluster = {engine.router.route(text).cluster: text for text in corpus_texts()}
    assert len(text_of_cluster) >= 2
    for cluster, text in text_of_cluster.items():
        got = engine.generate(text, raw=True, mode="similarity", max_new_tokens=12)
        assert got.cluster == cluster
        pack = FfnChoice(cluster=cluster)
        assert list(got.token_ids) == greedy_ids(engine, text, DENSE, pack, 12)[: len(got.token_ids)]
        assert got.cluster_label == engine.manifest.clusters[cluster].label


# The same text


@pytest.mark.parametrize("mode", ["auto", "similarity", "stability", "fused", "dense"])
def test_same_seed_gives_the_same_text(
    mode: runtime.Mode, engine: runtime.Engine, tiny_bundle: Callable[..., Path]
) -> None:
    first = engine.generate(PROMPT, raw=True, mode=mode, seed=5, max_new_tokens=25, **SAMPLED)
    engine.generate(corpus_texts()[2], raw=True, mode="fused", max_new_tokens=9)
    again = engine.generate(PROMPT, raw=True, mode=mode, seed=5, max_new_tokens=25, **SAMPLED)
    fresh = load(tiny_bundle("llama"), mode=mode).generate(PROMPT, raw=True, seed=5, max_new_tokens=25, **SAMPLED)
    assert len(first.token_ids) > 5
    assert first.token_ids == again.token_ids == fresh.token_ids
    assert first.text == again.text == fresh.text


def test_modes_follow_each_other_without_a_trace(engine: runtime.Engine, tiny_bundle: Callable[..., Path]) -> None:
    modes: list[runtime.Mode] = ["dense", "similarity", "stability", "fused", "stability", "similarity", "dense"]
    fresh = {
        mode: load(tiny_bundle("llama")).generate(PROMPT, raw=True, mode=mode, max_new_tokens=20) for mode in modes
    }
    assert len({generation.token_ids for generation in fresh.values()}) >= 2
    for mode in modes:
        assert engine.generate(PROMPT, raw=True, mode=mode, max_new_tokens=20).token_ids == fresh[mode].token_ids


def test_seeds_differ(engine: runtime.Engine) -> None:
    texts = {engine.generate(PROMPT, raw=True, temperature=1.0, seed=seed, max_new_tokens=12).text for seed in range(6)}
    assert len(texts) > 3


def test_stream_is_generate_in_pieces(engine: runtime.Engine) -> None:
    whole = engine.generate(PROMPT, raw=True, max_new_tokens=25, temperature=0.8, seed=1)
    tokens = list(engine.stream(PROMPT, raw=True, max_new_tokens=25, temperature=0.8, seed=1))
    assert "".join(token.text for token in tokens) == whole.text
    assert tuple(token.token_id for token in tokens) == whole.token_ids
    assert whole.text == engine.tokenizer.decode(list(whole.token_ids), skip_special_tokens=True)
    assert [token.finish_reason for token in tokens] == [None] * (len(tokens) - 1) + [whole.finish_reason]


def test_measurements_fit_each_other(engine: runtime.Engine) -> None:
    tokens = list(engine.stream(PROMPT, raw=True, max_new_tokens=10))
    count = len(tokens)
    assert count > 3
    assert [token.num_tokens for token in tokens] == list(range(1, count + 1))
    assert {token.num_prompt_tokens for token in tokens} == {len(engine.tokenizer.encode(PROMPT).ids)}
    seconds = [token.decode_seconds for token in tokens]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0
    assert len({token.prefill_seconds for token in tokens}) == 1
    assert tokens[0].prefill_seconds > 0
    assert tokens[0].decode_tokens_per_second == 0
    assert tokens[-1].decode_tokens_per_second == pytest.approx((count - 1) / seconds[-1])
    got = engine.generate(PROMPT, raw=True, max_new_tokens=10)
    assert len(got.token_ids) == count
    assert got.decode_tokens_per_second == pytest.approx((count - 1) / got.decode_seconds)


# The end


def test_max_new_tokens_ends_a_text(engine: runtime.Engine) -> None:
    long = engine.generate(PROMPT, raw=True, max_new_tokens=20)
    short = engine.generate(PROMPT, raw=True, max_new_tokens=7)
    assert short.token_ids == long.token_ids[:7]
    assert short.finish_reason == "length"


@pytest.mark.parametrize("start", [0, 1, 9, 20])
def test_a_stop_string_ends_a_text_and_is_left_out(start: int, engine: runtime.Engine) -> None:
    whole = engine.generate(PROMPT, raw=True, max_new_tokens=30).text
    stop = whole[start : start + 4]
    got = engine.generate(PROMPT, raw=True, max_new_tokens=30, stop=["never there", stop])
    assert got.text == whole[: whole.index(stop)]
    assert got.finish_reason == "stop"
    assert len(got.token_ids) < 30


def test_end_of_text_comes_from_the_bundle(engine: runtime.Engine, tiny_bundle: Any, tmp_path: Path) -> None:
    whole = engine.generate(PROMPT, raw=True, max_new_tokens=30)
    eos = whole.token_ids[7]
    position = whole.token_ids.index(eos)
    copy = Path(shutil.copytree(tiny_bundle("llama"), tmp_path / "copy"))
    defaults = json.loads((copy / LAYOUT.generation).read_text(encoding="utf-8"))
    (copy / LAYOUT.generation).write_text(json.dumps({**defaults, "eos_token_ids": [eos, 381]}), encoding="utf-8")
    list_again(copy)
    got = load(copy).generate(PROMPT, raw=True, max_new_tokens=30)
    assert got.token_ids == whole.token_ids[: position + 1]
    assert got.finish_reason == "stop"
    # The token that ends a text is no part of it.
    assert got.text == engine.tokenizer.decode(list(got.token_ids[:-1]), skip_special_tokens=True)


def test_the_context_ends_a_text(engine: runtime.Engine) -> None:
    prompt_ids = engine.tokenizer.encode(" ".join(corpus_texts())).ids[1:240]
    prompt = engine.tokenizer.decode(prompt_ids)
    num_prompt = len(engine.tokenizer.encode(prompt).ids)
    got = engine.generate(prompt, raw=True, mode="dense", max_new_tokens=MAX_POSITIONS)
    assert (got.num_prompt_tokens, got.finish_reason) == (num_prompt, "length")
    assert got.num_prompt_tokens + len(got.token_ids) == MAX_POSITIONS
    encoded = engine.tokenizer.encode(prompt).ids
    assert list(got.token_ids) == reference_ids("llama", encoded, max_length=MAX_POSITIONS)


# Which mode


def test_auto_takes_the_dense_ffn_for_an_unfamiliar_prompt(engine: runtime.Engine) -> None:
    got = engine.generate(UNFAMILIAR, raw=True, max_new_tokens=15)
    assert (got.mode, got.familiar, got.fallback) == ("dense", False, "unfamiliar")
    assert got.distance > engine.manifest.router.distance_p99
    assert got.token_ids == engine.generate(UNFAMILIAR, raw=True, mode="dense", max_new_tokens=15).token_ids
    usual = engine.generate(PROMPT, raw=True, max_new_tokens=15)
    assert (usual.mode, usual.familiar, usual.fallback) == ("similarity", True, None)
    assert usual.distance <= engine.manifest.router.distance_p99


def test_without_the_dense_ffn_packs_do_all(tiny_bundle: Callable[..., Path]) -> None:
    engine = load(tiny_bundle("llama", dense=False))
    for text in (PROMPT, UNFAMILIAR):
        got = engine.generate(text, raw=True, max_new_tokens=10)
        pack = FfnChoice(cluster=got.cluster)
        assert list(got.token_ids) == greedy_ids(engine, text, pack, pack, 10)[: len(got.token_ids)]
        assert got.mode == engine.generate(text, raw=True, mode="similarity", max_new_tokens=2).mode == "similarity"
    # The last one was unfamiliar: the cluster with most calibration text serves it, and its distance is that cluster's.
    clusters = engine.manifest.clusters
    assert (got.fallback, got.cluster) == ("unfamiliar", largest_cluster(engine.manifest))
    assert clusters[got.cluster].num_tokens == max(cluster.num_tokens for cluster in clusters)
    assert got.path[0].distance == engine.router.distances(UNFAMILIAR)[got.cluster] >= got.distance
    modes: list[runtime.Mode] = ["stability", "fused", "dense"]
    for mode in modes:
        with pytest.raises(runtime.ConfigError, match=f"mode '{mode}' needs the dense FFN.*--dense"):
            engine.stream(PROMPT, raw=True, mode=mode)


def test_a_pack_reads_the_prompt_where_that_is_asked_for(tiny_bundle: Callable[..., Path]) -> None:
    engine = load(tiny_bundle("llama"))
    answers = {}
    # In turns: what one has read must not be taken for what the other would read.
    turns: list[tuple[PromptFfn, FfnChoice | None]] = [("dense", DENSE), ("pack", None)]
    for prompt_ffn, reader in turns * 2:
        got = engine.generate(PROMPT, raw=True, prompt_ffn=prompt_ffn, max_new_tokens=10)
        pack = FfnChoice(cluster=got.cluster)
        assert list(got.token_ids) == greedy_ids(engine, PROMPT, reader or pack, pack, 10)[: len(got.token_ids)]
        answers[prompt_ffn] = engine.generate(PROMPT, raw=True, prompt_ffn=prompt_ffn, logprobs=1).logprobs[0]
    assert answers["dense"] != answers["pack"]
    unfamiliar = engine.generate(UNFAMILIAR, raw=True, prompt_ffn="pack", max_new_tokens=10)
    assert unfamiliar.mode == "dense"
    assert unfamiliar.token_ids == engine.generate(UNFAMILIAR, raw=True, max_new_tokens=10).token_ids
    modes: list[runtime.Mode] = ["stability", "fused", "dense", "lossless"]
    for mode in modes:
        with pytest.raises(runtime.ConfigError, match=f"^prompt_ffn: expected dense in mode '{mode}', got 'pack'"):
            engine.stream(PROMPT, raw=True, mode=mode, prompt_ffn="pack")


def test_unrepaired_packs_leave_long_prompts_to_their_own_neurons(tiny_bundle: Callable[..., Path]) -> None:
    engine = load(tiny_bundle("llama", reconstruct=False))
    least = engine.manifest.plan.stability_min_tokens
    ids = engine.tokenizer.encode(" ".join(corpus_texts()[0::4])).ids
    short, long = (engine.tokenizer.decode(ids[1 : least + extra]) for extra in (-30, 5))
    modes = [engine.generate(text, raw=True, max_new_tokens=1) for text in (short, long)]
    assert [generation.num_prompt_tokens >= least for generation in modes] == [False, True]
    assert [generation.mode for generation in modes] == ["similarity", "stability"]


# Several at a time


def test_streams_and_generations_run_beside_each_other(engine: runtime.Engine) -> None:
    expected = engine.generate(PROMPT, raw=True, max_new_tokens=12).token_ids
    unfamiliar = engine.generate(UNFAMILIAR, raw=True, max_new_tokens=12).token_ids
    first = engine.stream(PROMPT, raw=True, max_new_tokens=12)
    head = [next(first).token_id for _ in range(3)]
    second = engine.stream(UNFAMILIAR, raw=True, max_new_tokens=12)
    other = [next(second).token_id]
    assert engine.generate(UNFAMILIAR, raw=True, max_new_tokens=12).token_ids == unfamiliar
    # Neither is the worse for it.
    assert (*head, *(token.token_id for token in first)) == expected
    assert (*other, *(token.token_id for token in second)) == unfamiliar
    third = engine.stream(PROMPT, raw=True, max_new_tokens=12)
    next(third)
    third.close()
    assert engine.generate(PROMPT, raw=True, max_new_tokens=12).token_ids == expected
    assert engine.driver.scheduler.pool.num_taken == 0


@pytest.mark.parametrize("mode", ["similarity", "fused"])
def test_an_abandoned_stream_leaves_nothing_behind(mode: runtime.Mode, engine: runtime.Engine) -> None:
    expected = engine.generate(PROMPT, raw=True, mode="similarity", max_new_tokens=12).token_ids
    stream = engine.stream(corpus_texts()[1], raw=True, mode=mode, temperature=1.0, seed=3)
    for _ in range(4):
        next(stream)
    del stream
    assert engine.generate(PROMPT, raw=True, mode="similarity", max_new_tokens=12).token_ids == expected


def test_a_stream_that_never_began_holds_nothing(engine: runtime.Engine) -> None:
    waiting = engine.stream(PROMPT, raw=True, max_new_tokens=12)
    expected = engine.generate(UNFAMILIAR, raw=True, max_new_tokens=12).token_ids
    assert engine.generate(UNFAMILIAR, raw=True, max_new_tokens=12).token_ids == expected
    assert len(list(waiting)) == 12


def test_a_failing_decoder_frees_the_engine(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.generate(PROMPT, raw=True, max_new_tokens=5).token_ids

    def fail(*args: Any, **named: Any) -> np.ndarray:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate(PROMPT, raw=True)
    assert engine.generate(PROMPT, raw=True, max_new_tokens=5).token_ids == expected


def test_threads_share_an_engine(engine: runtime.Engine) -> None:
    """Each gets what it would get alone, and no one is refused."""
    texts = corpus_texts()[:6]
    expected = {text: engine.generate(text, raw=True, max_new_tokens=20).token_ids for text in texts}
    got: list[tuple[str, tuple[int, ...]]] = []

    def work(text: str) -> None:
        for number in range(8):
            if number % 2:
                got.append((text, engine.generate(text, raw=True, max_new_tokens=20).token_ids))
            else:
                got.append((text, tuple(token.token_id for token in engine.stream(text, raw=True, max_new_tokens=20))))

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8 * len(texts)
    assert all(token_ids == expected[text] for text, token_ids in got)
    assert engine.driver.scheduler.pool.num_taken == 0


# Callers who err
