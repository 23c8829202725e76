"""Chat templates of models that read pictures too, for chats that are text alone.

Such templates may expect a message as a list of parts, `[{"type": "text", "text": ...}]`, and write nothing of one that
is a string, without a word.
"""

import json
import logging
import secrets
from typing import Any

from coreinfer.bundles.errors import ConfigError
from coreinfer.compiler.models.source_files import source_file
from coreinfer.compiler.models.sources import ModelSource

__all__ = ["with_text_templates"]

_log = logging.getLogger(__name__)
_PROCESSOR_TEMPLATE = "chat_template.json"
"""Where processors for pictures and text had the template, before all had it in a file of its own."""
_IN_PARTS = (
    "{%- set in_parts = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] -%}"
    "{%- set message = dict(message, content=parts) if message['content'] is string else message -%}"
    "{%- set in_parts.messages = in_parts.messages + [message] -%}"
    "{%- endfor -%}"
    "{%- set messages = in_parts.messages -%}"
    # Blanks at the start of the template that follows would go with a tag before them.
    "{{ '' }}"
)
"""Beginning of a template, by which messages that are strings become lists of one part."""


def with_text_templates(tokenizer: Any, source: ModelSource) -> Any:
    """Give a tokenizer templates that write messages of text.

    Args:
        tokenizer: of transformers; changed in place.
    Raises:
        ConfigError: the processor's template cannot be read.
    """
    found = tokenizer.chat_template or _of_processor(source)
    if isinstance(found, dict):
        tokenizer.chat_template = {name: _for_text(template, tokenizer, source) for name, template in found.items()}
    elif found:
        tokenizer.chat_template = _for_text(found, tokenizer, source)
    return tokenizer


def _of_processor(source: ModelSource) -> str | None:
    path = source_file(source, _PROCESSOR_TEMPLATE)
    if path is None:
        return None
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--model {source.name}: {_PROCESSOR_TEMPLATE} cannot be read ({error or type(error).__name__}); expected "
            "an object with chat_template"
        ) from error
    return template if isinstance(template, str) else None


def _for_text(template: str, tokenizer: Any, source: ModelSource) -> str:
    """The template, with a beginning if it writes a message only in parts."""
    if _writes(template, tokenizer) or not _writes(_IN_PARTS + template, tokenizer):
        return template
    _log.info("%s: its chat template expects messages in parts, which they are turned into", source.name)
    return _IN_PARTS + template


def _writes(template: str, tokenizer: Any) -> bool:
    """Whether a user's message comes out of a template."""
    text = str(secrets.randbelow(9 * 10**23) + 10**23)
    messages = [{"role": "user", "content": text}]
    try:
        return text in tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception:
        # A template is a program. Some want more than a user's message; what they lack is told when they are used.
        return False
