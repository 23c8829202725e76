"""Chat templates: the same text as from transformers, and no way out of the sandbox."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles.errors import ConfigError
from coreinfer.runtime.prompts.chat_template import check_messages, render_chat, routing_text
from tokenizers import Tokenizer, models

Messages = Sequence[Mapping[str, str]]
Render = Callable[[str, Messages, bool], str]

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

CHATML = """\
{%- if tools is not none and tools %}
    {{- '<tools>' + tools | tojson + '</tools>' }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = messages[0]['content'] %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate\\nuser/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system_message != false %}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ ' '  + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}
"""

GEMMA = """\
{{ bos_token }}
{%- set ns = namespace(prefix='') -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set ns.prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set ns.prefix = messages[0]['content'][0]['text'] -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (ns.prefix if loop.first else "") }}
    {{- message['content'] | trim -}}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""

# What newer templates use besides: loop controls, JSON that is not escaped for HTML, macros, the date, generation tags.
HELPERS = """\
{%- macro header(role) %}<|{{ role }}|>{% endmacro %}
{{- strftime_now('%Y') }} {{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}
{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}
{%- set last = 'none' %}
{%- set ns = namespace(dict(first=1), self=2) %}
{%- set ns.count = messages | length + ns.first + ns.self %}
{{- ns.count }}{{ dict([('a', 1)], b=none) | tojson }}{{ dict.fromkeys('xy', 0) }}{{ ns['missing'] is defined }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {{- header(message.role) }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{% set last = message.content %}{{ message.content + eos_token }}{% endgeneration %}{{ last }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
{%- endfor %}
{{- last }}{{ sep_token is defined }}{{ documents is none }}{{ tools is none }}{{ unk_token }}{{ nothing }}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}
"""

TURNS = [
    {"role": "user", "content": "  What is <b>\"5 < 6\"</b> & 'why'? {{ bos_token }} 🙂\n"},
    {"role": "assistant", "content": "Die Antwort:\n\n- größer\t"},
    {"role": "user", "content": "谢谢"},
]
SYSTEM = {"role": "system", "content": "Be brief.\n"}
CONVERSATIONS = [TURNS[:1], TURNS, [SYSTEM, TURNS[0]], [SYSTEM, *TURNS], [*TURNS, TURNS[1]]]


@pytest.fixture(scope="module")
def transformers_render() -> Render:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")),
        **SPECIAL_TOKENS,
    )

    def render(template: str, messages: Messages, add_generation_prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    return render


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=lambda messages: "-".join(turn["role"] for turn in messages))
@pytest.mark.parametrize("template", [CHATML, LLAMA_2, GEMMA, HELPERS], ids=["chatml", "llama-2", "gemma", "helpers"])
def test_the_text_is_that_of_transformers(
    transformers_render: Render, template: str, messages: Messages, add_generation_prompt: bool
) -> None:
    text = render_chat(template, messages, special_tokens=SPECIAL_TOKENS, add_generation_prompt=add_generation_prompt)
    assert text == transformers_render(template, messages, add_generation_prompt)
    assert messages[-1]["content"].strip() in text


def test_a_chatml_prompt_is_written_out() -> None:
    assert render_chat(CHATML, TURNS[2:], special_tokens={}) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\n谢谢<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_other_keys_of_a_message_reach_the_template() -> None:
    message = {"role": "user", "content": "hi", "name": "Ada \ud83d"}
    assert (
        render_chat("{{ messages[0].name }}: {{ messages[0].content }}", [message], special_tokens={})
        == "Ada \ud83d: hi"
    )


def test_a_template_gets_no_objects_with_methods(tmp_path: Path) -> None:
    message: dict[str, Any] = {"role": "user", "content": "hi", "file": tmp_path / "new"}
    with pytest.raises(ConfigError, match=r"^messages: expected values that JSON can hold, got another: .*Path"):
        render_chat("{{ messages[0].file.touch() }}", [message], special_tokens={})
    assert not (tmp_path / "new").exists()


def test_messages_win_over_a_special_token_of_that_name() -> None:
    assert render_chat("{{ messages[0].content }}", TURNS[2:], special_tokens={"messages": "<m>"}) == "谢谢"


def test_the_date_is_todays() -> None:
    before = datetime.now().strftime("%d %b %Y")
    text = render_chat("{{ strftime_now('%d %b %Y') }}", TURNS, special_tokens={})
    assert text in {before, datetime.now().strftime("%d %b %Y")}


def test_what_the_template_refuses_is_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        render_chat(LLAMA_2, TURNS[1:], special_tokens=SPECIAL_TOKENS)
    assert str(error.value) == "chat template: Conversation roles must alternate user/assistant/user/assistant/..."


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("\n\n{% for message in messages %}", r"line 3: Unexpected end of template"),
        ("{{ 'a' | no_such_filter }}", r"line 1: No filter named 'no_such_filter'"),
        ("{% generation %}{{ 1 }}", r"line 1: Unexpected end of template"),
        ("{{ tools.name.first }}", r"'None' has no attribute 'name'"),
        ("{{ missing.name }}", r"'missing' is undefined"),
        ("{{ messages[0].content + 1 }}", r"TypeError: "),
        ("{{ 1 / 0 }}", r"ZeroDivisionError: division by zero"),
        ("{{ raise_exception('') }}", r"TemplateError: "),
        ("{{ cycle | tojson }}{{ namespace() | tojson }}", r"TypeError: .*not JSON serializable"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", r"RecursionError: "),
        ("{% include 'other' %}", r"\w+: no loader for this environment specified"),
    ],
)
def test_a_template_that_fails_is_a_config_error(template: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^chat template: {reason}") as error:
        render_chat(template, TURNS, special_tokens={})
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ ('' | attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ self.__init__.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = dict %}",
        "{{ namespace(_Namespace__attrs=1) }}",
        "{{ namespace({'__init__': 1}) }}",
        "{{ dict.__class__.mro() }}",
        "{{ messages.append(messages[0]) }}",
        "{{ messages[0].update(role='system') }}",
        "{% for number in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    messages = [dict(turn) for turn in TURNS]
    with pytest.raises(ConfigError, match=r"unsafe|Range too big"):
        render_chat(template, messages, special_tokens={})
    assert messages == TURNS


def test_a_template_gets_no_class() -> None:
    assert render_chat("{{ dict.items is defined }}{{ dict(a=1) }}", TURNS, special_tokens={}) == "False{'a': 1}"


def test_a_template_cannot_change_the_next_rendering() -> None:
    render_chat("{% set tools = 1 %}{% set raise_exception = 2 %}{% set range = 3 %}", TURNS, special_tokens={})
    assert render_chat("{{ tools }}{{ range(2) | list }}", TURNS, special_tokens={}) == "None[0, 1]"
    with pytest.raises(ConfigError, match=r"^chat template: no$"):
        render_chat("{{ raise_exception('no') }}", TURNS, special_tokens={})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages: expected a list, got str 'hello'"),
        (None, "messages: expected a list, got NoneType 'None'"),
        ({"role": "user", "content": "x"}, "messages: expected a list, got dict "),
        (iter(TURNS), "messages: expected a list, got list_iterator "),
        ([], "messages: expected at least one message, got an empty list"),
        (["hello\nworld"], "messages[0]: expected an object with role and content, got str 'hello world'"),
        ([TURNS[0], {"role": "user"}], "messages[1].content: expected a string, got nothing"),
        ([{"role": None, "content": "x"}], "messages[0].role: expected a string, got NoneType 'None'"),
        ([{"role": "user", "content": [1]}], "messages[0].content: expected a string, got list '[1]'"),
        (
            [{"role": 1}, 7],
            "3 problems: (1) messages[0].content: expected a string, got nothing; "
            "(2) messages[0].role: expected a string, got int '1'; "
            "(3) messages[1]: expected an object with role and content, got int '7'",
        ),
    ],
)
def test_malformed_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        check_messages(messages)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        render_chat(CHATML, messages, special_tokens={})


def test_well_formed_messages_pass() -> None:
    check_messages(TURNS)
    check_messages(tuple(TURNS))
    check_messages([{"role": "", "content": "", "name": 3}])


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (TURNS[:2], TURNS[0]["content"]),
        (TURNS, "谢谢"),
        ([SYSTEM, TURNS[1]], TURNS[1]["content"]),
        ([SYSTEM], SYSTEM["content"]),
    ],
)
def test_the_users_last_message_is_routed(messages: Messages, text: str) -> None:
    assert routing_text(messages) == text


# What a template leaves out

FILTERED = "{% for m in messages %}[{{ m.role }}]{{ FILTER }}{% endfor %}"


@pytest.mark.parametrize(
    "content",
    [
        "m.content | upper",
        "m.content | replace('e', '')",
        "m.content | trim",
        "'Note: ' ~ m.content[2:]",
        "m.content | tojson",
        "m.content | length",
        "'German' if 'German' in m.content else 'English'",
    ],
)
@pytest.mark.parametrize("role", ["system", "tool", "developer"])
def test_a_template_may_change_what_is_said(content: str, role: str) -> None:
    messages = [{"role": role, "content": "Speak German.\n"}, TURNS[2]]
    assert render_chat(FILTERED.replace("FILTER", content), messages, special_tokens={}).startswith(f"[{role}]")


@pytest.mark.parametrize("said", ["Be brief.", "user", "谢谢"])
@pytest.mark.parametrize("role", ["system", "tool", "developer"])
def test_a_template_that_leaves_a_message_out_is_refused(said: str, role: str) -> None:
    """Also where the same text stands elsewhere."""
    template = "{% for m in messages if m.role == 'user' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    messages = [{"role": role, "content": said}, TURNS[2]]
    with pytest.raises(ConfigError, match=rf"^messages\[0\]: this model's chat template leaves {role} messages out"):
        render_chat(template, messages, special_tokens={})
    assert render_chat(template, [{"role": role, "content": ""}, TURNS[2]], special_tokens={}) == "[user]谢谢"


def test_a_second_system_message_that_is_left_out_is_refused() -> None:
    messages = [SYSTEM, TURNS[0], {"role": "system", "content": "Be brief."}, TURNS[2]]
    template = "{{ messages[0].content }}{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match=r"^messages\[2\]: "):
        render_chat(template, messages, special_tokens={})
