"""The form of what the server answers, described in /openapi.json."""

from typing import Literal

from coreinfer.runtime import Mode
from pydantic import BaseModel, Field

__all__ = [
    "CallDelta",
    "CallOut",
    "Chat",
    "ChatChoice",
    "ChatChunk",
    "ChatLogprobs",
    "ChunkChoice",
    "ClusterPoint",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "ContentLogprob",
    "Delta",
    "ErrorBody",
    "Figures",
    "Finish",
    "FunctionOut",
    "Health",
    "Message",
    "ModelCard",
    "ModelList",
    "ModelMap",
    "Place",
    "PlainErrorBody",
    "PromptTokensDetails",
    "TokenLogprob",
    "Usage",
]

Finish = Literal["stop", "length", "tool_calls"]


class ErrorText(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error, in OpenAI's form."""

    error: ErrorText


class PlainErrorBody(BaseModel):
    """An error, in Ollama's form."""

    error: str


class PromptTokensDetails(BaseModel):
    """How a prompt was read."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a prompt and its answer; the token that ends a text counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Figures(BaseModel):
    """What CoreInfer says about an answer, in addition to OpenAI's fields."""

    cluster: int
    label: str
    distance: float
    familiar: bool
    fallback: str | None
    mode: Mode
    path: list[int]
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float


class TokenLogprob(BaseModel):
    """A token and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="UTF-8; null for a token that is a part of a character.")


class ContentLogprob(TokenLogprob):
    """A token of the answer, with the likeliest tokens in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ContentLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class FunctionOut(BaseModel):
    """What is called."""

    name: str
    arguments: str = Field(description="A JSON object, as text.")


class CallOut(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionOut


class CallDelta(CallOut):
    """A call in a stream; it comes whole."""

    index: int


class Message(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="null where the answer is only calls.")
    refusal: None = None
    tool_calls: list[CallOut] | None = None


class ChatChoice(BaseModel):
    """An answer of a chat."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class Chat(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    coreinfer: Figures


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChunkChoice(BaseModel):
    """A chunk's part of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(BaseModel):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    coreinfer: Figures | None = None


class CompletionChoice(BaseModel):
    """A completion, or a chunk's part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(BaseModel):
    """The answer of /v1/completions, or one event of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    coreinfer: Figures | None = None


class ModelCard(BaseModel):
    """A bundle that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the bundle was written.")
    owned_by: Literal["coreinfer"] = "coreinfer"


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The answer of /health."""

    status: Literal["ok"] = "ok"
    version: str
    models: list[str]
    key_required: bool


class ClusterPoint(BaseModel):
    """A cluster and its place on the map."""

    id: int
    label: str
    num_sentences: int
    examples: list[str]
    x: float
    y: float


class ModelMap(BaseModel):
    """The clusters of a bundle, as the page draws them."""

    model: str
    name: str
    has_chat_template: bool
    max_new_tokens: int = Field(description="Maximum number of tokens that the page asks for.")
    modes: list[Mode]
    clusters: list[ClusterPoint]


class Place(BaseModel):
    """Where a prompt is on the map."""

    cluster: int
    label: str
    distance: float
    familiar: bool
    x: float
    y: float
    distances: list[float] = Field(description="1 - cosine to each cluster.")
    weights: list[float] = Field(description="Of each cluster in the place; they sum to 1.")
