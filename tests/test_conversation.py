"""Conversations: turns that route anew and keep the KV cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.bundles.layout import LAYOUT
from coreinfer.runtime.engines.protocol import FfnChoice
from coreinfer.runtime.prompts.literals import MarkedText
from coreinfer.runtime.prompts.prompt_format import PromptFormat

from .bundle_factory import list_again
from .engine_inputs import PROMPT, UNFAMILIAR
from .model_factory import corpus_texts

SHORT = runtime.GenerationOptions(max_new_tokens=6)
SYSTEM = "Speak of the sea."


@pytest.fixture(params=["native", "torch"])
def engine(request: pytest.FixtureRequest, tiny_bundle: Callable[..., Path]) -> runtime.Engine:
    return runtime.load(tiny_bundle("llama"), engine=request.param, threads=1)


def questions(engine: runtime.Engine) -> list[str]:
    """Two short texts of different clusters."""
    texts = [" ".join(text.split()[5:15]) for text in corpus_texts()]
    first = engine.router.route(texts[0])
    return [texts[0], next(text for text in texts if engine.router.route(text).cluster != first.cluster)]


def test_a_turn_keeps_all_that_was_read_and_decoded(engine: runtime.Engine) -> None:
    conversation = engine.conversation(SYSTEM)
    first = conversation.send(PROMPT, SHORT)
    cached = list(engine.decoder.cached.token_ids)
    assert len(cached) == first.num_prompt_tokens + len(first.token_ids) - 1
    second = conversation.send("and salt", SHORT)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == len(cached)
    assert engine.decoder.cached.token_ids[: len(cached)] == cached
    assert second.num_prompt_tokens > len(cached)
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 2]
    assert [message["content"] for message in conversation.messages[1::2]] == [PROMPT, "and salt"]
    assert [message["content"] for message in conversation.messages[2::2]] == [first.text, second.text]


def test_the_prompt_is_what_the_template_says(engine: runtime.Engine) -> None:
    conversation = engine.conversation(SYSTEM)
    for text in (PROMPT, "and salt", "and lemon"):
        conversation.send(text, SHORT)
    rendered = engine.loaded.prompts.render([*conversation.messages, {"role": "user", "content": "more"}])
    got = conversation.send("more", SHORT)
    prompt_ids = engine.decoder.cached.token_ids[: got.num_prompt_tokens]
    assert engine.tokenizer.decode(prompt_ids, skip_special_tokens=False) == rendered


def test_each_turn_has_its_pack(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[FfnChoice] = []
    use = engine.decoder.use

    def record(choice: FfnChoice) -> None:
        used.append(choice)
        use(choice)

    monkeypatch.setattr(engine.decoder, "use", record)
    conversation = engine.conversation()
    options = runtime.GenerationOptions(max_new_tokens=6, mode="similarity")
    turns = [conversation.send(text, options) for text in questions(engine)]
    assert turns[0].cluster != turns[1].cluster
    assert [choice.cluster for choice in used] == [None, turns[0].cluster, None, turns[1].cluster]
    assert turns[1].num_cached_tokens > turns[0].num_prompt_tokens


def test_another_generation_in_between_costs_only_time(engine: runtime.Engine) -> None:
    conversation = engine.conversation()
    options = runtime.GenerationOptions(max_new_tokens=6, mode="dense")
    conversation.send(PROMPT, options)
    engine.generate(UNFAMILIAR, raw=True, max_new_tokens=3)
    second = conversation.send("and salt", options)
    assert second.num_cached_tokens < 3
    prompt_ids = engine.decoder.cached.token_ids[: second.num_prompt_tokens]
    engine.decoder.truncate(0)
    assert int(engine.decoder.forward(prompt_ids)[-1].argmax()) == second.token_ids[0]


def test_reset_forgets_all_but_the_system_message(engine: runtime.Engine) -> None:
    conversation = engine.conversation(SYSTEM)
    first = conversation.send(PROMPT, SHORT)
    conversation.send("and salt", SHORT)
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": SYSTEM}]
    assert conversation.send(PROMPT, SHORT).token_ids == first.token_ids


def test_a_closed_turn_keeps_what_was_said(engine: runtime.Engine) -> None:
    conversation = engine.conversation()
    stream = conversation.stream(PROMPT, SHORT)
    head = [next(stream) for _ in range(3)]
    stream.close()
    assert conversation.messages[1]["content"] == "".join(token.text for token in head)
    got = conversation.send("and salt", SHORT)
    assert got.num_cached_tokens >= head[0].num_prompt_tokens


def test_a_turn_that_never_began_or_failed_leaves_no_trace(
    engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = engine.conversation()
    conversation.stream(PROMPT, SHORT)
    with pytest.raises(runtime.ConfigError, match="prompt: expected 1 to 255 tokens"):
        conversation.send("flour " * 300)

    def fail(*arguments: Any, **named: Any) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "forward", fail)
        with pytest.raises(MemoryError):
            conversation.send(PROMPT, SHORT)
    assert conversation.messages == []
    assert conversation.send(PROMPT, SHORT).text


def test_a_turn_made_before_another_is_refused(engine: runtime.Engine) -> None:
    conversation = engine.conversation()
    early = conversation.stream(PROMPT, SHORT)
    conversation.send("and salt", SHORT)
    with pytest.raises(runtime.ConfigError, match="went on since this turn was made"):
        next(early)


def test_a_stop_string_makes_the_tail_be_read_again(engine: runtime.Engine) -> None:
    conversation = engine.conversation()
    whole = engine.conversation().send(PROMPT, runtime.GenerationOptions(max_new_tokens=20))
    got = conversation.send(PROMPT, runtime.GenerationOptions(max_new_tokens=20, stop=[whole.text[9:12]]))
    assert conversation.messages[-1]["content"] == got.text == whole.text[: whole.text.index(whole.text[9:12])]
    second = conversation.send("and salt", SHORT)
    assert got.num_prompt_tokens <= second.num_cached_tokens < got.num_prompt_tokens + len(got.token_ids)


def test_stability_chooses_by_the_turns_own_tokens(engine: runtime.Engine) -> None:
    conversation = engine.conversation()
    options = runtime.GenerationOptions(max_new_tokens=4, mode="stability")
    conversation.send(PROMPT, options)
    second = conversation.send("and salt", options)
    assert second.mode == "stability"
    assert second.num_cached_tokens > 0


# Tokens of the prompt


@pytest.fixture
def prompts(tiny_bundle: Callable[..., Path], tmp_path: Path) -> PromptFormat:
    return runtime.load(tiny_bundle("llama"), engine="native", threads=1).loaded.prompts


def plain_ids(prompts: PromptFormat, text: str) -> list[int]:
    return list(prompts.tokenizer.encode(text, add_special_tokens=False).ids)


def test_decoded_tokens_stay_as_they_are(prompts: PromptFormat) -> None:
    canonical = plain_ids(prompts, "kitchen and storm")
    letters = [token for letter in "kitchen" for token in plain_ids(prompts, letter)]
    assert canonical[: len(letters)] != letters
    got = prompts.encode_after(letters, MarkedText(("kitchen and storm",)))
    assert got[: len(letters)] == letters
    assert prompts.tokenizer.decode(got) == "kitchen and storm"


def test_another_text_is_tokenized_anew(prompts: PromptFormat) -> None:
    letters = [token for letter in "kitchen" for token in plain_ids(prompts, letter)]
    assert prompts.encode_after(letters, MarkedText(("kit and storm",))) == plain_ids(prompts, "kit and storm")
    assert prompts.encode_after([], MarkedText(("kit",))) == plain_ids(prompts, "kit")


def test_the_end_of_text_stays_where_the_template_writes_it(prompts: PromptFormat) -> None:
    known = [*plain_ids(prompts, "tide"), 2]
    assert prompts.encode_after(known, MarkedText(("tide</s>wave",)))[: len(known)] == known
    assert prompts.encode_after(known, MarkedText(("tide wave",)))[: len(known) - 1] == known[:-1]


# Chat templates


@pytest.fixture
def with_template(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Callable[[str], runtime.Engine]:
    """A function that loads the tiny bundle with another chat template."""

    def load(template: str) -> runtime.Engine:
        copy = Path(shutil.copytree(tiny_bundle("llama"), tmp_path / "copy"))
        (copy / LAYOUT.chat_template).write_text(template, encoding="utf-8")
        list_again(copy)
        return runtime.load(copy, engine="native", threads=1)

    return load


TOOLS = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}]


def test_tools_reach_the_template(with_template: Callable[[str], runtime.Engine]) -> None:
    engine = with_template(
        "{% if tools %}[{{ tools | tojson }}]{% endif %}"
        "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"
    )
    conversation = engine.conversation()
    got = conversation.send("soup", runtime.GenerationOptions(max_new_tokens=2, tools=TOOLS))
    prompt = engine.tokenizer.decode(engine.decoder.cached.token_ids[: got.num_prompt_tokens])
    assert prompt == f"[{json.dumps(TOOLS)}]user:soup;"
    plain = engine.generate([{"role": "user", "content": "soup"}], max_new_tokens=2)
    assert engine.tokenizer.decode(engine.decoder.cached.token_ids[: plain.num_prompt_tokens]) == "user:soup;"


def test_tools_that_nobody_takes_are_refused(engine: runtime.Engine) -> None:
    with pytest.raises(runtime.ConfigError, match="tools: they go with messages"):
        engine.stream(PROMPT, tools=TOOLS, raw=True)


def test_a_system_message_that_the_template_drops_is_refused(with_template: Callable[[str], runtime.Engine]) -> None:
    engine = with_template("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    assert engine.conversation().send("soup", SHORT).text
    with pytest.raises(runtime.ConfigError, match=r"messages\[0\]: .* leaves system messages out"):
        engine.conversation(SYSTEM).send("soup", SHORT)
