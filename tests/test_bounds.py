"""What a request may cost: time, memory, and the patience of those who ask beside it."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer import runtime
from coreinfer.bundles.encoder import EXCERPT_CHARACTERS, routing_excerpt
from coreinfer.bundles.shared.beginnings import encoded, text_ids
from coreinfer.compiler.clusters.embed import StaticEncoder
from coreinfer.runtime.prompts import literals, prompt_format
from coreinfer.runtime.prompts.prompt_format import PromptFormat
from coreinfer.runtime.prompts.token_room import token_room
from coreinfer.server.requests.bounds import MAX_VALUES
from coreinfer.server.server_config import ServerConfig
from coreinfer.server.service import engine_service
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from .engine_inputs import MAX_POSITIONS, PROMPT, with_room
from .model_factory import corpus_texts
from .server_process import JSON, RunningServer, serving

# Each pair of characters is two words to the encoder.
MANY_WORDS = "^a" * 500_000
# It takes 10 ms on a machine that does nothing else; what is tested against took 10 s and more.
HEALTH_SECONDS = 3.0
MEMORY_BYTES = 300 << 20


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[RunningServer]:
    with serving(bundle) as running:
        # What is loaded at the first request is not what is measured.
        running.post("/v1/chat/completions", json=chat(bundle.name, PROMPT))
        yield running


def chat(model: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 1, **fields}


@contextmanager
def watched(server: RunningServer) -> Iterator[list[float]]:
    """Ask for the server's health all the while; the list has the seconds of each answer."""
    done, seconds = threading.Event(), list[float]()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        while not done.is_set():
            begin = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            seconds.append(time.perf_counter() - begin)
            time.sleep(0.005)
        connection.close()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seconds
    finally:
        done.set()
        thread.join()


def send(server: RunningServer, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Send a body beside questions for the server's health, which must be answered at once, in little more memory."""
    before = server.resident_bytes()
    with watched(server) as seconds:
        time.sleep(0.05)
        response = server.post(path, content=json.dumps(body), headers=JSON)
        time.sleep(0.05)
    assert max(seconds) < HEALTH_SECONDS
    assert server.resident_bytes() - before < MEMORY_BYTES
    return response.status_code, response.text


def test_placing_a_long_text_stops_nobody(server: RunningServer, bundle: Path) -> None:
    status, answer = send(server, "/coreinfer/place", {"model": bundle.name, "text": MANY_WORDS})
    assert status == 200
    assert json.loads(answer)["distances"]


@pytest.mark.parametrize("text", [MANY_WORDS, "-" * 1_000_000, "7" * 1_000_000], ids=["words", "dashes", "digits"])
def test_a_long_prompt_stops_nobody(text: str, server: RunningServer, bundle: Path) -> None:
    status, answer = send(server, "/v1/chat/completions", chat(bundle.name, text))
    assert status == 400
    assert "prompt: expected" in answer


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{}] * 200_000},
        {"messages": [{"role": "user", "content": [0] * 300_000}]},
        {"stop": ["s"] * 150_000},
        {"logit_bias": {str(number): "x" for number in range(60_000)}},
        {f"field {number}": number for number in range(40_000)},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [0] * 300_000}}}},
    ],
    ids=["messages", "parts", "stops", "biases", "fields", "schema"],
)
def test_many_wrong_values_get_one_short_answer(fields: dict[str, Any], server: RunningServer, bundle: Path) -> None:
    status, answer = send(server, "/v1/chat/completions", {**chat(bundle.name, PROMPT), **fields})
    assert status == 400
    assert f"the body: expected at most {MAX_VALUES} values" in answer
    assert len(answer) < 500


def test_of_many_problems_a_few_are_named(server: RunningServer, bundle: Path) -> None:
    body = chat(bundle.name, PROMPT) | {f"field {number}": number for number in range(100)}
    status, answer = send(server, "/v1/chat/completions", body)
    message = json.loads(answer)["error"]["message"]
    assert status == 400
    assert message.startswith("field 0: not supported by this server")
    assert message.endswith("; and 92 more")


def test_a_body_within_its_bounds_is_answered(server: RunningServer, bundle: Path) -> None:
    body = chat(bundle.name, PROMPT)
    body["messages"] = [{"role": "user", "content": "a"}] * 8
    assert send(server, "/v1/chat/completions", body)[0] == 200


def test_the_first_schema_does_not_wait_for_llguidance(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second of everybody's to read a large tokenizer, so that it is done before the server answers."""
    llguidance = pytest.importorskip("llguidance")
    loaded = runtime.load(bundle, threads=1)
    service = engine_service({"m": loaded}, ServerConfig())
    monkeypatch.setattr(llguidance, "LLTokenizer", None)
    try:
        assert loaded.generate(PROMPT, json_schema={"const": 7}, max_new_tokens=20).text == "7"
    finally:
        service.close()


def test_nothing_large_is_made_of_the_tokenizer_for_a_request(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To look through its vocabulary, or to make the second one of literals, holds the lock of Python for long."""
    loaded = runtime.load(bundle, threads=1)
    name = next(token.content for token in loaded.tokenizer.get_added_tokens_decoder().values() if token.special)
    service = engine_service({"m": loaded}, ServerConfig())
    monkeypatch.setattr(prompt_format, "token_room", None)
    monkeypatch.setattr(literals, "Tokenizer", None)
    try:
        assert loaded.generate([{"role": "user", "content": f"what is {name}?"}], max_new_tokens=1).token_ids
        with pytest.raises(runtime.ContextTooLong):
            loaded.generate("-" * 100_000, raw=True)
    finally:
        service.close()


def test_a_large_schema_is_refused_by_name(engine: runtime.Engine) -> None:
    pytest.importorskip("llguidance")
    properties = {f"p{number}": {"type": "string"} for number in range(4800)}
    with pytest.raises(runtime.ConfigError, match=r"^json_schema: expected at most 65536 characters, got \d+"):
        engine.generate(PROMPT, json_schema={"type": "object", "properties": properties})


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (["s"] * 500_000, "stop: expected at most 256 strings, got 500000"),
        (["s", "s" * 1001], r"stop\[1\]: expected at most 1000 characters, got 1001"),
    ],
)
def test_stop_strings_are_bounded(stop: list[str], message: str, engine: runtime.Engine) -> None:
    with pytest.raises(runtime.ConfigError, match=f"^{message}$"):
        engine.stream(PROMPT, stop=stop)
    assert engine.generate(PROMPT, stop=["\0" * 1000] * 256, max_new_tokens=2).token_ids


# Routing


def test_an_excerpt_is_the_beginning_and_the_end() -> None:
    whole = "a" * EXCERPT_CHARACTERS + "b" * EXCERPT_CHARACTERS
    assert routing_excerpt(whole) == whole
    assert routing_excerpt(f"{whole[:-1]}cb") == f"{'a' * EXCERPT_CHARACTERS} {'b' * (EXCERPT_CHARACTERS - 2)}cb"
    assert routing_excerpt("") == ""


def test_long_texts_are_routed_by_their_ends(engine: runtime.Engine) -> None:
    kitchen, sea = (" ".join(text for text in corpus_texts() if topic in text) for topic in ("kitchen", "sea"))
    ends = [(kitchen * 9)[:EXCERPT_CHARACTERS], (kitchen * 9)[-EXCERPT_CHARACTERS:]]
    assert engine.router.route((sea * 99).join(ends)) == engine.router.route(" ".join(ends))
    assert engine.router.route(sea * 99) != engine.router.route(kitchen * 99)


def test_the_compiler_looks_at_the_same_part(engine: runtime.Engine) -> None:
    router = engine.router
    encoder = StaticEncoder(table=router._table, tokenizer_json=router._tokenizer.to_str())
    for text in (PROMPT, MANY_WORDS[:100_000], " ".join(corpus_texts() * 9)):
        similarities = encoder.embed([text]) @ router._index.reconstruct_n(0, router._index.ntotal).T
        np.testing.assert_allclose(1 - similarities[0], router.distances(text), atol=1e-5)


# Tokenizing


def test_long_texts_have_the_same_tokens(engine: runtime.Engine) -> None:
    """They are encoded by another call, which leaves Python's lock to others."""
    prompts = PromptFormat(with_room(engine.bundle, factor=100))
    text = " ".join(corpus_texts()) + MANY_WORDS[:20_000]
    assert len(text) > 1 << 14
    assert prompts.encode(text) == text_ids(engine.tokenizer, text)
    for special in (False, True):
        ids = engine.tokenizer.encode(text, add_special_tokens=special).ids
        assert list(encoded(engine.tokenizer, text, add_special_tokens=special).ids) == list(ids)


def byte_level(**options: Any) -> Tokenizer:
    """A byte-level BPE whose longest token is "aaaa"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "aa", "aaaa"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "a"), ("aa", "aa")], **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def most_characters(tokenizer: Tokenizer) -> int | None:
    room = token_room(tokenizer)
    return None if room is None else room.most_characters


def test_a_token_has_so_many_characters_at_most() -> None:
    tokenizer = byte_level()
    assert most_characters(tokenizer) == 4
    assert len(tokenizer.encode("a" * 400).ids) == 100
    tokenizer.add_special_tokens(["<special>"])
    assert most_characters(tokenizer) == len("<special>")
    tokenizer.normalizer = normalizers.NFC()
    assert most_characters(tokenizer) == 4 * len("<special>")
    # As Llama's: spaces become a character of their own.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    assert most_characters(tokenizer) == len("<special>")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), tokenizer.pre_tokenizer])
    assert most_characters(tokenizer) == len("<special>")


def test_characters_without_a_token_do_not_count() -> None:
    """As some of ASCII that were never seen in training; beyond it each character has a byte that was."""
    vocabulary = byte_level().get_vocab()
    for code in (4, 0xF1):
        (letter,) = {*"\u0104\u00f1"} & {chr(code + 0x100), chr(code)}
        del vocabulary[letter]
    tokenizer = byte_level()
    tokenizer.model = models.BPE(vocab=vocabulary, merges=[("a", "a"), ("aa", "aa")])
    room = token_room(tokenizer)
    assert room is not None
    assert room.lost == "\x04"
    for text in ("\x04" * 9, "aaaaaaaa\x04a", "\U00040000" * 5, "\x04\U00040000\x05"):
        assert room.least_tokens(text) <= len(tokenizer.encode(text).ids)
    assert room.least_tokens("aaaaaaaa\x04a") == 3
    # Without one of the others no character is sure of a token.
    del vocabulary["\u0122"]
    tokenizer.model = models.BPE(vocab=vocabulary, merges=[("a", "a"), ("aa", "aa")])
    assert "\u0122" in pre_tokenizers.ByteLevel.alphabet()
    assert token_room(tokenizer) is None


def test_nfc_makes_one_of_four_characters() -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    letter = "\u03b1\u0313\u0300\u0345"
    assert len(tokenizer.normalizer.normalize_str(letter)) == 1


def test_nothing_is_said_where_characters_may_get_lost() -> None:
    stripping, splitting, normalizing, cutting, lacking = (byte_level() for _ in range(5))
    stripping.add_tokens([AddedToken("<mask>", lstrip=True)])
    splitting.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])
    normalizing.normalizer = normalizers.Strip()
    cutting.enable_truncation(8)
    lacking.pre_tokenizer = pre_tokenizers.Digits()
    words = Tokenizer(models.WordPiece(vocab={"[UNK]": 0}, unk_token="[UNK]"))
    for tokenizer in (stripping, splitting, normalizing, cutting, lacking, words):
        assert most_characters(tokenizer) is None
    replacing = byte_level()
    replacing.normalizer = normalizers.Replace("ab", "c")
    assert most_characters(replacing) is None


def test_what_is_certainly_too_long_is_not_tokenized(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = PromptFormat(engine.bundle)
    most = most_characters(engine.tokenizer)
    assert most is not None
    longest = max(engine.tokenizer.get_vocab(), key=len)
    assert len(longest) == most
    # As long as it may be: that it is too long is found by counting its tokens.
    assert prompts.encode("x" * (most * (MAX_POSITIONS - 1)))
    monkeypatch.setattr(prompts, "tokenizer", None)
    with pytest.raises(runtime.ConfigError, match=r"^prompt: expected 1 to 255 tokens, .* that is 256 or more$"):
        prompts.encode("x" * (most * (MAX_POSITIONS - 1) + 1))
