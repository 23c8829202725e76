"""From a prompt to token ids: the bundle's tokenizer, chat template and special tokens."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError
from coreinfer.bundles.layout import LAYOUT
from tokenizers import Tokenizer

from .chat import render_chat, takes_tools
from .tools import FORMATS, PLAIN, CallReader, ToolFormat, tool_names

__all__ = ["PromptFormat", "read_tokenizer"]

T = TypeVar("T")


class PromptFormat:
    """How one bundle's model wants to be spoken to.

    Attributes:
        tokenizer: the model's.
        chat_template: in jinja2's language; None where the model has none.
        eos_token_ids: tokens that end a text.
        special_tokens: those that a chat template may name.
    """

    def __init__(self, bundle: Bundle, tokenizer: Future[Tokenizer] | None = None) -> None:
        """Read the tokenizer's files of a bundle whose checksums were verified.

        Args:
            tokenizer: what `read_tokenizer` gave or raised while they were verified; None to call it now.
        Raises:
            BundleCorrupt: a file cannot be parsed.
        """
        self._model_name = bundle.manifest.model.name
        self.tokenizer = _parsed(
            bundle, LAYOUT.tokenizer, tokenizer.result if tokenizer else lambda: read_tokenizer(bundle.path)
        )
        self.chat_template = _read(bundle, LAYOUT.chat_template, str) if bundle.has(LAYOUT.chat_template) else None
        self.eos_token_ids, self.special_tokens = _read(bundle, LAYOUT.generation, _generation_defaults)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls of functions."""
        template = self.chat_template
        if template is None or not takes_tools(template):
            return PLAIN
        return next((form for form in FORMATS if form.writes_like(template)), PLAIN)

    def call_reader(self, tools: Sequence[Mapping[str, Any]] | None, *, one_call: bool = False) -> CallReader | None:
        """Begin to read calls in one answer; None where there are no tools."""
        return CallReader(self.tool_format, tool_names(tools), one_call=one_call) if tools else None

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Write a conversation in the model's chat template.

        Raises:
            ConfigError: the model has no chat template, or it refuses the messages or the tools.
        """
        if self.chat_template is None:
            raise ConfigError(f"{self._model_name} has no chat template; give the prompt as text")
        return render_chat(self.chat_template, messages, special_tokens=self.special_tokens, tools=tools)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Turn text into token ids.

        Args:
            add_special_tokens: put the tokens around it that the tokenizer puts around a text of its own.
        Raises:
            ConfigError: the text is no Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # Python keeps bytes of the command line that are not UTF-8 as halves of surrogate pairs.
            raise ConfigError(f"prompt: expected Unicode text, got half a character at {error.start}") from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn token ids into text without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def encode_after(self, known_ids: Sequence[int], rendered: str) -> list[int]:
        """Turn a rendered conversation into token ids that begin, where its text allows it, with known ones.

        A model does not always write a text with the tokens that its tokenizer gives to it. What is in the KV cache are
        the model's own, so they are kept if they stand for the same text.

        Args:
            known_ids: a prompt and the tokens that were decoded after it.
            rendered: the conversation so far, the prompt's first.
        """
        whole = self.encode(rendered, add_special_tokens=False)
        text = self._raw(whole)
        # The token that ended the answer may be one that the template does not write.
        for head in (list(known_ids), list(known_ids[:-1])):
            known = self._raw(head)
            if known and text.startswith(known):
                ids = head + self.encode(text[len(known) :], add_special_tokens=False)
                if self._raw(ids) == text:
                    return ids
        return whole

    def _raw(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))


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
