"""From a prompt to token ids: the bundle's tokenizer, chat template and special tokens."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError, ContextTooLong
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.shared.beginnings import encoded, text_ids
from coreinfer.runtime.options import DEFAULTS, GenerationOptions
from tokenizers import Tokenizer

from .chat_template import check_messages, render_chat, takes_tools
from .literals import LiteralEncoder, MarkedText, Marks
from .token_room import TokenRoom, token_room
from .tools import FORMATS, PLAIN, CallReader, ToolFormat, tool_names

__all__ = ["PromptFormat", "continues", "read_tokenizer"]

T = TypeVar("T")

_LONG_TOKEN_CHARACTERS = 8


class PromptFormat:
    """How prompts for one bundle's model are written.

    Attributes:
        tokenizer: the model's.
        chat_template: in jinja2's language; None where the model has none.
        tool_template: the one for conversations with tools; None where that is the same.
        eos_token_ids: tokens that end a text.
        special_tokens: those that a chat template may name.
    """

    def __init__(self, bundle: Bundle, tokenizer: Future[Tokenizer] | None = None) -> None:
        """Read the tokenizer's files of a bundle whose checksums were verified.

        Args:
            tokenizer: what `read_tokenizer` returned or raised while they were verified; None to call it now.
        Raises:
            BundleCorrupt: a file cannot be parsed.
        """
        model = bundle.manifest.model
        self._model_name, self._max_positions, self._vocab_size = model.name, model.max_positions, model.vocab_size
        self.tokenizer = _parsed(
            bundle, LAYOUT.tokenizer, tokenizer.result if tokenizer else lambda: read_tokenizer(bundle.path)
        )
        self.chat_template = _read(bundle, LAYOUT.chat_template, str) if bundle.has(LAYOUT.chat_template) else None
        self.tool_template = _read(bundle, LAYOUT.tool_template, str) if bundle.has(LAYOUT.tool_template) else None
        self._literals = LiteralEncoder(self.tokenizer)
        self.eos_token_ids, self.special_tokens = _read(bundle, LAYOUT.generation, _generation_defaults)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls of functions."""
        template = self.tool_template or self.chat_template
        if template is None or not takes_tools(template):
            return PLAIN
        return next((form for form in FORMATS if form.writes_like(template)), PLAIN)

    def call_reader(self, tools: Sequence[Mapping[str, Any]] | None, *, one_call: bool = False) -> CallReader | None:
        """Begin to read calls in one answer; None where there are no tools."""
        return CallReader(self.tool_format, tool_names(tools), one_call=one_call) if tools else None

    def read_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: GenerationOptions = DEFAULTS,
        *,
        known_ids: Sequence[int] = (),
    ) -> list[int]:
        """Turn a conversation into token ids by the model's chat template.

        Names of control tokens in messages are text, unless `options.parse_special` is set.

        Args:
            known_ids: see `encode_after`.
        Raises:
            ConfigError: the model has no chat template, or it refuses the messages or the tools.
        """
        return self.encode_after(known_ids, self._marked(messages, options))

    def render(self, messages: Sequence[Mapping[str, Any]], options: GenerationOptions = DEFAULTS) -> str:
        """Write a conversation in the model's chat template.

        Raises:
            ConfigError: the model has no chat template, or it refuses the messages or the tools.
        """
        if self.chat_template is None:
            raise ConfigError(f"{self._model_name} has no chat template; give the prompt as text")
        return render_chat(
            self.tool_template if options.offered_tools and self.tool_template else self.chat_template,
            messages,
            special_tokens=self.special_tokens,
            tools=options.offered_tools,
            variables=options.chat_template_kwargs,
            continue_final_message=continues(messages, options),
        )

    def _marked(self, messages: Sequence[Mapping[str, Any]], options: GenerationOptions) -> MarkedText:
        """Write a conversation, and mark the pieces that are text even if they look like control tokens."""
        text, names = self.render(messages, options), self._literals.names
        said = [messages, options.offered_tools, options.chat_template_kwargs]
        if names is None or options.parse_special or not self._literals.holds_name(said):
            return MarkedText((text,))
        marks = Marks(names)
        # Roles are the caller's, and templates make control tokens of them.
        marked = [{**marks.mark(message), "role": message["role"]} for message in messages]
        tools, variables = marks.mark(options.offered_tools), marks.mark(options.chat_template_kwargs)
        found = marks.read(self.render(marked, replace(options, tools=tools, chat_template_kwargs=variables)))
        if found.text != text:
            raise ConfigError(
                "messages: they hold the name of a control token, which this model's chat template does not pass on "
                "as it is; leave it out, or set parse_special"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """Turn a text that is to be continued as it is into token ids, with those that begin a text of the model.

        Raises:
            ConfigError: the text is not valid Unicode, or holds a token that the model has no embedding for.
            ContextTooLong: it is of so many characters that it is certainly too long for the model.
        """
        self._check_text(text)
        return self._known(text_ids(self.tokenizer, text))

    def prepare(self) -> None:
        """Make now what the first long text, and the first name of a control token in a message, would wait for."""
        _ = self._token_room
        self._literals.prepare()

    def _check_text(self, text: str) -> None:
        _check_unicode(text)
        limit = self._max_positions
        # Tokens of so many characters are rare: most texts need no closer look at the tokenizer.
        if len(text) <= _LONG_TOKEN_CHARACTERS * limit or self._token_room is None:
            return
        if (least := self._token_room.least_tokens(text)) >= limit:
            raise ContextTooLong(
                f"prompt: expected 1 to {limit - 1} tokens, got {len(text)} characters, that is {least} or more"
            )

    @cached_property
    def _token_room(self) -> TokenRoom | None:
        return token_room(self.tokenizer)

    def _known(self, token_ids: list[int]) -> list[int]:
        """Refuse tokens that the model has no embedding for."""
        if max(token_ids, default=0) >= self._vocab_size:
            token = self.tokenizer.id_to_token(max(token_ids))
            raise ConfigError(f"prompt: {self._model_name} has no embedding for the token {token!r}; leave it out")
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn token ids into text without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def encode_after(self, known_ids: Sequence[int], rendered: MarkedText) -> list[int]:
        """Turn a rendered conversation into token ids that begin, where its text allows it, with known ones.

        A model does not always write a text with the tokens that its tokenizer makes of it. The KV cache holds the
        model's own tokens, so they are kept if they stand for the same text.

        Args:
            known_ids: a prompt and the tokens that were decoded after it.
            rendered: the conversation so far, the prompt's first.
        """
        whole = self._encode(rendered)
        text = self._raw(whole)
        if len(rendered.pieces) == 1:
            # Some tokenizers do not give a text back to the letter.
            rendered = MarkedText((text,))
        elif text != rendered.text:
            return whole
        # The token that ended the answer may be one that the template does not write.
        for head in (list(known_ids), list(known_ids[:-1])):
            known = self._raw(head)
            if known and text.startswith(known):
                ids = head + self._encode(rendered.after(len(known)))
                if self._raw(ids) == text:
                    return ids
        return whole

    def _encode(self, marked: MarkedText) -> list[int]:
        self._check_text(marked.text)
        if len(marked.pieces) > 1:
            return self._known(self._literals.encode(marked))
        return self._known(list(encoded(self.tokenizer, marked.text, add_special_tokens=False).ids))

    def _raw(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))


def continues(messages: Sequence[Mapping[str, Any]], options: GenerationOptions) -> bool:
    """Whether the last message is continued."""
    check_messages(messages)
    by_assistant = messages[-1]["role"] == "assistant"
    if options.continue_final_message and not by_assistant:
        raise ConfigError(
            f"continue_final_message: expected the assistant's message at the end, got one of {messages[-1]['role']!r}"
        )
    return by_assistant if options.continue_final_message is None else options.continue_final_message


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Python keeps bytes of the command line that are not UTF-8 as halves of surrogate pairs.
        raise ConfigError(f"prompt: expected Unicode text, got half a character at {error.start}") from error


def read_tokenizer(bundle_dir: Path) -> Tokenizer:
    """Parse the model's tokenizer of a bundle that need not be verified yet.

    Raises:
        Exception: it is missing, no file, or cannot be parsed.
    """
    path = bundle_dir / LAYOUT.tokenizer
    if not path.is_file():
        # To open a pipe is to wait for whoever writes into it.
        raise FileNotFoundError(f"{path} is no file")
    return Tokenizer.from_str(path.read_bytes().decode())


def _read(bundle: Bundle, name: str, parse: Callable[[str], T]) -> T:
    return _parsed(bundle, name, lambda: parse(bundle.read_bytes(name).decode()))


def _parsed(bundle: Bundle, name: str, get: Callable[[], T]) -> T:
    try:
        return get()
    except Exception as error:
        # tokenizers raises bare Exceptions.
        raise BundleCorrupt(f"{bundle.path / name}: cannot be parsed ({error}); compile the bundle again") from error


def _generation_defaults(text: str) -> tuple[frozenset[int], dict[str, str]]:
    """Read the tokens that end a text, and the special tokens that a chat template may name."""
    data = json.loads(text)
    eos_token_ids = frozenset(int(token_id) for token_id in data["eos_token_ids"])
    return eos_token_ids, {str(name): str(token) for name, token in data["special_tokens"].items()}
