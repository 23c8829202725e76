"""Calls of functions: read out of texts in every model's form, told to every chat template, and enforced."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coreinfer import runtime
from coreinfer.bundles.layout import LAYOUT
from coreinfer.runtime.prompts.chat_template import render_chat
from coreinfer.runtime.prompts.tools import FORMATS, PLAIN, CallReader, ToolFormat

from .bundle_factory import list_again, with_more_positions

HERMES, MISTRAL, LLAMA = FORMATS
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Tell it.", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock"}},
]
ASK = [{"role": "user", "content": "What is it like in Rome?"}]
CALLED = {"id": "abc", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TURNS: list[dict[str, Any]] = [
    *ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "abc", "content": "rain"},
    {"role": "user", "content": "Thanks."},
]
CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '\\n' }}{% endfor %}"
QWEN = (
    "{% if tools %}{{ tools | tojson }} Return <tool_call>\n{}\n</tool_call>.{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% endfor %}"
)


def read(form: ToolFormat, text: str, size: int, **options: Any) -> tuple[str, list[tuple[str, str]]]:
    reader = CallReader(form, {"weather", "clock"}, **options)
    content = "".join(reader.push(text[start : start + size]) for start in range(0, len(text), size))
    return content + reader.finish(), [(call.name, call.arguments) for call in reader.calls]


CALL = '{"name": "weather", "arguments": {"city": "Rome", "days": [1, 2]}}'
OTHER = '{"name": "clock", "arguments": {}}'
WEATHER, CLOCK = ("weather", '{"city": "Rome", "days": [1, 2]}'), ("clock", "{}")


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
        (HERMES, f"So: <tool_call>{CALL}</tool_call>\n<tool_call>\n{OTHER}\n</tool_call>\n", "So: ", [WEATHER, CLOCK]),
        (HERMES, f"<tool_call>\n{CALL}", "", [WEATHER]),
        (HERMES, f"\n{CALL}\n", "", [WEATHER]),
        (HERMES, f"<tool_call>\n{CALL}\n</tool_call> and more", "and more", [WEATHER]),
        (MISTRAL, f"[TOOL_CALLS] [{CALL}, {OTHER}]", "", [WEATHER, CLOCK]),
        (MISTRAL, f" [{CALL}]", "", [WEATHER]),
        (LLAMA, f"<|python_tag|>{CALL.replace('arguments', 'parameters')}", "", [WEATHER]),
        (LLAMA, f"{CALL.replace('arguments', 'parameters')}; {OTHER}", "", [WEATHER, CLOCK]),
        (PLAIN, CALL, "", [WEATHER]),
        (PLAIN, f"[{CALL},\n{OTHER}]", "", [WEATHER, CLOCK]),
        (PLAIN, json.dumps({"name": "clock", "arguments": '{"zone": "UTC"}'}), "", [("clock", '{"zone": "UTC"}')]),
    ],
)
def test_calls_are_read(form: ToolFormat, text: str, content: str, calls: list[tuple[str, str]], size: int) -> None:
    assert read(form, text, size) == (content, calls)


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, "<tool_call>\n{broken\n</tool_call> after"),
        (HERMES, f"<tool_call>\n{CALL.replace('weather', 'nobody')}\n</tool_call>"),
        (HERMES, f"<tool_call>\n{CALL} and words\n</tool_call>"),
        (HERMES, "a < b <tool"),
        (HERMES, '<tool_call>\n{"name": "clock", "arguments": [1]}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "clock", "arguments": {"a": NaN}}\n</tool_call>'),
        (MISTRAL, "[TOOL_CALLS] [1]"),
        (MISTRAL, "[1, 2] is a list"),
        (LLAMA, '{"name": "nobody", "parameters": {}}'),
        (PLAIN, "[" * 5000),
        (PLAIN, f"An example: {CALL}"),
        (PLAIN, ""),
        (PLAIN, "  \n"),
    ],
)
def test_what_is_no_call_stays_text(form: ToolFormat, text: str, size: int) -> None:
    assert read(form, text, size) == (text, [])


def test_one_call_can_be_all_that_is_wanted() -> None:
    assert read(PLAIN, f"[{CALL}, {OTHER}]", 3, one_call=True) == ("", [WEATHER])


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (QWEN, HERMES),
        ("{{ tools }}[TOOL_CALLS] [", MISTRAL),
        ('{{ tools }}{"name": function name, "parameters": dictionary}', LLAMA),
        ("{{ tools }}<tool_call>\n<function=x>", PLAIN),
        ("{{ tools }}", PLAIN),
        ("<tool_call>", PLAIN),
    ],
)
def test_the_form_is_told_by_the_template(
    with_template: Callable[..., runtime.Engine], template: str, form: ToolFormat
) -> None:
    assert with_template(template).loaded.prompts.tool_format is form


@pytest.fixture
def with_template(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Callable[..., runtime.Engine]:
    """A function (template, mark) that loads the tiny bundle with another chat template, and a token for a mark."""

    def load(template: str, mark: dict[str, Any] | None = None) -> runtime.Engine:
        copy = Path(shutil.copytree(tiny_bundle("llama"), tmp_path / "copy"))
        (copy / LAYOUT.chat_template).write_text(template, encoding="utf-8")
        if mark:
            # In the place of a token that no text needs: the model has no rows for more.
            data = json.loads((copy / LAYOUT.tokenizer).read_text(encoding="utf-8"))
            data["added_tokens"][0] |= mark
            data["model"]["vocab"][mark["content"]] = data["model"]["vocab"].pop("<pad>")
            (copy / LAYOUT.tokenizer).write_text(json.dumps(data), encoding="utf-8")
        list_again(copy)
        with_more_positions(copy, 2048)
        return runtime.load(copy, engine="native", threads=1)

    return load


@pytest.fixture(scope="module")
def engine(long_bundle: Path) -> runtime.Engine:
    """The tiny bundle with room for tools, and a template that has none."""
    return runtime.load(long_bundle, engine="native", threads=1)


# Told to the template


def test_calls_and_results_reach_a_template_that_takes_tools() -> None:
    text = render_chat(QWEN, TURNS, special_tokens={}, tools=TOOLS)
    assert text.startswith(json.dumps(TOOLS))
    assert '<assistant><tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><tool>rain' in text
    names = "{{ tools is none }}{% for m in messages %}{{ m.name }}:{{ m.content }};{% endfor %}"
    assert render_chat(names, TURNS[1:], special_tokens={}) == "True:;weather:rain;:Thanks.;"


def test_calls_are_the_same_text_as_from_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from .model_factory import build_tokenizer

    assert transformers
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    turns: list[Any] = [*ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, TURNS[2]]
    expected = build_tokenizer().apply_chat_template(turns, tools=[*TOOLS], chat_template=QWEN, tokenize=False)
    assert render_chat(QWEN, TURNS[:3], special_tokens={}, tools=TOOLS, add_generation_prompt=False) == expected


def test_a_template_without_tools_gets_them_described() -> None:
    text = render_chat(CHATML, TURNS, special_tokens={}, tools=TOOLS)
    system, rest = text.split("<user>", 1)
    assert system.startswith("<system>You can call these functions")
    assert all(json.dumps(tool) in system for tool in TOOLS)
    assert rest == (
        "What is it like in Rome?\n<assistant>"
        '{"name": "weather", "arguments": {"city": "Rome"}}\n<user>Result of weather: rain\n\nThanks.\n'
    )
    own = [{"role": "system", "content": "Be brief."}, *ASK]
    assert render_chat(CHATML, own, special_tokens={}, tools=TOOLS).startswith("<system>Be brief.\n\nYou can call")


def test_results_of_calls_need_no_tools_any_more() -> None:
    assert "Result of weather: rain" in render_chat(CHATML, TURNS, special_tokens={})
    # Without an id it is a role of the template's own.
    assert render_chat(CHATML, [*ASK, {"role": "tool", "content": "x"}], special_tokens={}).endswith("<tool>x\n")


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "assistant", "content": None}, r"messages\[0\].content: expected a string, got NoneType"),
        ({"role": "assistant", "content": None, "tool_calls": []}, r"messages\[0\].content: expected a string"),
        ({"role": "assistant", "tool_calls": [1]}, r"messages\[0\].tool_calls\[0\]: expected"),
        ({"role": "assistant", "tool_calls": "x"}, r"messages\[0\].tool_calls: expected a list, got str"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            r"tool_calls\[0\].function.arguments: expected a JSON object, got other text",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},
            r"tool_calls\[0\].function.arguments: expected a JSON object, got list",
        ),
    ],
)
def test_malformed_calls_in_messages_are_refused(message: dict[str, Any], named: str) -> None:
    with pytest.raises(runtime.ConfigError, match=named):
        render_chat(CHATML, [message], special_tokens={})


# Enforced


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize(
    ("template", "mark"),
    [
        (CHATML, None),
        (QWEN, None),
        (QWEN, {"content": "<tool_call>", "special": False}),
        ("{{ tools }}[TOOL_CALLS] [", {"content": "[TOOL_CALLS]", "special": True}),
        ('{{ tools }}{"name": function name, "parameters": dictionary}', None),
    ],
    ids=["plain", "hermes", "hermes-token", "mistral", "llama"],
)
def test_a_call_that_is_asked_for_comes(
    with_template: Callable[..., runtime.Engine], template: str, mark: dict[str, Any] | None, temperature: float
) -> None:
    engine = with_template(template, mark)
    options: dict[str, Any] = {"tools": TOOLS, "max_new_tokens": 120, "temperature": temperature, "top_k": 50}
    named = {"type": "function", "function": {"name": "weather"}}
    for seed in range(3):
        got = engine.generate(ASK, tool_choice=named, seed=seed, **options)
        assert got.finish_reason == "stop"
        (call,) = got.tool_calls
        assert call.name == "weather"
        assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    (call,) = engine.generate(ASK, tool_choice="required", seed=1, **options).tool_calls
    assert call.name in ("weather", "clock")
    assert engine.generate(ASK, tool_choice="none", seed=1, **options).tool_calls == ()


def test_schemas_that_refer_to_themselves(engine: runtime.Engine) -> None:
    parameters = {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/Tree"}},
        "required": ["tree"],
        "additionalProperties": False,
        "$defs": {"Tree": {"type": "array", "items": {"$ref": "#/$defs/Tree"}, "maxItems": 1}},
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("plant", "fell")]
    got = engine.generate(ASK, tools=tools, tool_choice="required", max_new_tokens=120, temperature=1.0, seed=3)
    assert isinstance(json.loads(got.tool_calls[0].arguments)["tree"], list)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tool_choice": "required"}, "tool_choice: it requires a call, but there are no tools"),
        ({"tool_choice": "always", "tools": TOOLS}, "tool_choice: expected auto, none, required or"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": TOOLS},
            "tool_choice: expected one of weather, clock, got 'x'",
        ),
        ({"tool_choice": "required", "tools": TOOLS, "json_schema": {}}, "tool_choice, json_schema: .* one of the two"),
        ({"tool_choice": "required", "tools": 5}, "tools: expected a list of JSON schemas, got 5"),
        ({"tool_choice": "required", "tools": [3]}, "tools: expected a list of JSON schemas"),
        ({"tool_choice": "required", "tools": [{"function": 5}]}, r"tools\[0\].function.name: expected a string"),
        ({"tool_choice": "required", "tools": [{"type": "function"}]}, r"tools\[0\].function.name: expected a string"),
        (
            {"tool_choice": "required", "tools": [{"function": {"name": "f", "parameters": {"type": "nothing"}}}]},
            "tools: ",
        ),
    ],
)
def test_wrong_choices_are_refused(engine: runtime.Engine, options: dict[str, Any], named: str) -> None:
    with pytest.raises(runtime.ConfigError, match=named):
        engine.stream(ASK, **options)


def test_lists_of_prompts_and_conversations_know_calls(engine: runtime.Engine) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_new_tokens": 60}
    alone = engine.generate(ASK, **options).tool_calls[0]
    for answer in engine.generate([ASK, ASK], **options):
        assert (answer.tool_calls[0].name, answer.tool_calls[0].arguments) == (alone.name, alone.arguments)
    said = engine.conversation().send(ASK[0]["content"], runtime.GenerationOptions(**options))
    assert said.tool_calls[0].name == alone.name
