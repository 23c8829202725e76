"""What crosses from the front to a replica and back: plain values, which are pickled."""

from dataclasses import dataclass, field

from coreinfer.runtime import GenerationOptions, Token
from coreinfer.runtime.prompts.requests import Prompt
from coreinfer.server.api_errors import ApiError

__all__ = ["Asked", "Failure", "Facts", "Hint", "Posted", "State"]


@dataclass(frozen=True, kw_only=True)
class Hint:
    """Where a request would find what it needs in memory.

    Attributes:
        cluster: whose pack decodes it; None where the dense FFN does.
        conversation: the same for all turns of a conversation; None for a text.
        continues: whether it is a later turn, of which the KV cache may hold the earlier ones.
    """

    cluster: int | None = None
    conversation: str | None = None
    continues: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request to a replica, which reads and routes the prompt itself, by its own bundle.

    Attributes:
        left_seconds: how long it may be worked on; clocks of machines differ.
        streamed: whether tokens are sent as they come, or all of them with the last.
    """

    prompt: Prompt
    options: GenerationOptions
    left_seconds: float
    streamed: bool
    hint: Hint


@dataclass(frozen=True, kw_only=True)
class State:
    """A replica, as its metrics have it.

    Attributes:
        replica: its id.
        fingerprint: of its bundle.
        num_pages, num_free_pages: of its KV cache.
    """

    replica: str
    fingerprint: str
    num_pages: int
    num_free_pages: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What a client is told of a request that failed; the fields are those of `ApiError`."""

    status: int
    message: str
    param: str | None
    code: str | None
    headers: dict[str, str]

    @classmethod
    def of(cls, error: ApiError) -> "Failure":
        """Make plain values of an error."""
        return cls(
            status=error.status, message=str(error), param=error.param, code=error.code, headers=dict(error.headers)
        )

    @property
    def error(self) -> ApiError:
        """The error again."""
        return ApiError(self.status, self.message, param=self.param, code=self.code, headers=self.headers)


@dataclass(frozen=True, kw_only=True)
class Posted:
    """One message of an answer. The first comes when the request has a place, before there is a token.

    Attributes:
        state: of the replica.
        tokens: the next ones; the last of all has a finish reason.
        failure: why there will be no more.
        first_token_seconds: from the request's arrival at the replica to its first token, once that is there.
        is_lost: whether the replica itself cannot go on, so that another one may be asked.
    """

    state: State
    tokens: list[Token] = field(default_factory=list)
    failure: Failure | None = None
    first_token_seconds: float | None = None
    is_lost: bool = False


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the front must know of a loaded engine.

    Attributes:
        max_tokens: those of a prompt and its answer together, at most.
        num_cache_tokens: tokens that its KV cache has room for.
    """

    max_tokens: int
    num_cache_tokens: int
