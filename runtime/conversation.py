"""A conversation: turn after turn on one KV cache."""

from collections.abc import Callable, Generator

from coreinfer.bundles import ConfigError

from .generation import Generation, Token, collect
from .options import DEFAULTS, GenerationOptions
from .prompts.prompt_format import continues
from .prompts.requests import Loaded, Request, read_request

__all__ = ["Conversation"]

Answer = Callable[[Request, GenerationOptions], Generator[Token, None, None]]


class Conversation:
    """The messages of a conversation, and the tokens that they were read and written as.

    Each turn is routed again and swaps the pack. The KV cache keeps the tokens of earlier turns as they were computed:
    prompts dense, answers by the pack that wrote them. Tokens that were dropped from the KV cache in the meantime are
    read again.

    Attributes:
        messages: all messages so far, each {"role", "content"}.
    """

    def __init__(self, loaded: Loaded, answer: Answer, *, system: str | None = None) -> None:
        """Begin a conversation. Use `Engine.conversation` to get one."""
        self._loaded = loaded
        self._answer = answer
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages: list[dict[str, str]] = (
            [{"role": "system", "content": self._system}] if self._system is not None else []
        )
        self._known_ids: tuple[int, ...] = ()

    def send(self, text: str, options: GenerationOptions = DEFAULTS, *, role: str = "user") -> Generation:
        """Send a message and return the whole answer; the arguments are those of `stream`."""
        tokens = list(self.stream(text, options, role=role))
        return collect(tokens, self._loaded.prompts.call_reader(options.offered_tools))

    def stream(
        self, text: str, options: GenerationOptions = DEFAULTS, *, role: str = "user"
    ) -> Generator[Token, None, None]:
        """Send a message and return the answer token by token.

        The message and its answer are added to `messages` when the stream ends; when it is closed early, with the text
        so far. A stream that fails or was never started leaves the conversation as it was.

        Args:
            text: the content of the message.
            options: options of this answer.
            role: role of the message; "tool" for the result of a tool, if the chat template has this role; "assistant"
                for the start of the answer.
        Yields:
            A `Token` for each token; the last has a finish reason.
        Raises:
            ConfigError: the chat template refuses the messages, or the conversation has become too long.
        """
        messages = [*self.messages, {"role": role, "content": text}]
        request = read_request(self._loaded, messages, options, known_ids=self._known_ids)
        if continues(messages, options):
            # What is decoded goes on with what was said, so that both are one message.
            return self._take(messages, request, self._answer(request, options), begun=text)
        return self._take(messages, request, self._answer(request, options))

    def _take(
        self,
        messages: list[dict[str, str]],
        request: Request,
        stream: Generator[Token, None, None],
        *,
        begun: str | None = None,
    ) -> Generator[Token, None, None]:
        if self.messages != messages[:-1]:
            raise ConfigError("conversation: it went on since this turn was made; make the turn again")
        tokens: list[Token] = []
        try:
            for token in stream:
                tokens.append(token)
                yield token
        except GeneratorExit:
            self._note(messages, request, tokens, begun)
            raise
        else:
            self._note(messages, request, tokens, begun)
        finally:
            stream.close()

    def _note(self, messages: list[dict[str, str]], request: Request, tokens: list[Token], begun: str | None) -> None:
        answer = (begun or "") + "".join(token.text for token in tokens)
        earlier = messages if begun is None else messages[:-1]
        self.messages = [*earlier, {"role": "assistant", "content": answer}]
        self._known_ids = (*request.token_ids, *(token.token_id for token in tokens))
