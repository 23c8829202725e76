"""The routes of OpenAI's interface: models, chat, completions."""

import time
from collections.abc import Callable
from typing import Annotated, Any

from coreinfer.runtime import GenerationOptions, Token
from coreinfer.runtime.requests import Prompt
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel

from .answers import Header, chat_answer, chat_chunk, completion_answer, completion_chunk, usage_chunk
from .bodies import BoundedRoute
from .errors import ERRORS, ApiError
from .requests import ChatRequest, CompletionRequest, SamplingFields
from .responses import Chat, ChatChunk, Completion, ModelCard, ModelList
from .service import Model, Service, service_of
from .streaming import EventStream, unless_gone
from .worker import Job

__all__ = ["router"]

router = APIRouter(prefix="/v1", route_class=BoundedRoute)

ServiceOf = Annotated[Service, Depends(service_of)]

_COMPLETION_TOKENS = 16
"""What a completion gets where it does not say, as at OpenAI."""


def _answers(description: str) -> dict[int | str, dict[str, Any]]:
    # Of each event; its data is a chunk, an error, or [DONE].
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    stream = {"text/event-stream": {"schema": event}}
    return {200: {"description": description, "content": stream}, **ERRORS}


@router.get("/models", responses={401: ERRORS[401]})
async def list_models(service: ServiceOf) -> ModelList:
    """List the bundles that are served."""
    return ModelList(data=[_card(model) for model in service.models.values()])


@router.get("/models/{model}", responses={status: ERRORS[status] for status in (401, 404)})
async def show_model(model: str, service: ServiceOf) -> ModelCard:
    """Show one of them."""
    return _card(service.model(model))


@router.post("/chat/completions", response_model=Chat, responses=_answers("The answer, or its events."))
async def chat(body: ChatRequest, request: Request, service: ServiceOf) -> Chat | Response:
    """Answer a conversation."""
    model = service.model(body.model)
    prompt = [message.plain for message in body.messages]
    options = _options(
        body,
        max_new_tokens=_num_new_tokens(body.max_tokens or body.max_completion_tokens, service, None),
        logprobs=body.num_logprobs,
        json_schema=body.response_format.schema_to_follow if body.response_format else None,
    )
    header = _header(model)
    job = _submit(service, model, prompt, options)
    if body.stream:
        return await _stream(request, job, body, lambda token: chat_chunk(header, token))
    return chat_answer(header, await _all_tokens(request, job))


@router.post("/completions", response_model=Completion, responses=_answers("The completion, or its events."))
async def complete(body: CompletionRequest, request: Request, service: ServiceOf) -> Completion | Response:
    """Continue a text."""
    model = service.model(body.model)
    options = _options(
        body,
        max_new_tokens=_num_new_tokens(body.max_tokens, service, _COMPLETION_TOKENS),
        logprobs=body.logprobs,
        raw=True,
    )
    header = _header(model)
    job = _submit(service, model, body.text, options)
    if not body.stream:
        return completion_answer(header, await _all_tokens(request, job))
    offset = 0

    def chunk(token: Token) -> Completion:
        nonlocal offset
        event = completion_chunk(header, token, offset=offset)
        offset += len(token.text)
        return event

    return await _stream(request, job, body, chunk)


def _submit(service: Service, model: Model, prompt: Prompt, options: GenerationOptions) -> Job:
    return service.submit(model, prompt, options, arrived_seconds=time.monotonic())


async def _all_tokens(request: Request, job: Job) -> list[Token]:
    """Wait for a whole generation, as long as its client does."""
    try:
        return await unless_gone(request, _collect(job))
    finally:
        job.abandon()


async def _collect(job: Job) -> list[Token]:
    return [token async for token in job.tokens()]


async def _stream(
    request: Request, job: Job, body: SamplingFields, chunk: Callable[[Token], ChatChunk | Completion]
) -> EventStream:
    """Stream a generation. Its first token is waited for: until then an error has a status of its own."""
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)

    def events(token: Token) -> list[BaseModel]:
        event = chunk(token)
        return [event, usage_chunk(event, token)] if include_usage and token.finish_reason else [event]

    try:
        first = await unless_gone(request, job.next())
    except BaseException:
        job.abandon()
        raise
    return EventStream(first, job, events)


def _options(
    body: SamplingFields,
    *,
    max_new_tokens: int,
    logprobs: int | None,
    json_schema: dict[str, Any] | None = None,
    raw: bool = False,
) -> GenerationOptions:
    """Translate a request's options; what it leaves out has OpenAI's default, or this project's."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=body.seed,
        stop=stop,
        mode=body.mode,
        logprobs=logprobs,
        json_schema=json_schema,
        raw=raw,
    )


def _num_new_tokens(asked: int | None, service: Service, default: int | None) -> int:
    """Settle how long an answer may be.

    Raises:
        ApiError: more was asked for than the server gives.
    """
    limit = service.config.max_new_tokens
    if asked is not None and asked > limit:
        raise ApiError(400, f"max_tokens: this server gives at most {limit}, got {asked}", param="max_tokens")
    return asked or min(default or limit, limit)


def _header(model: Model) -> Header:
    return Header(model=model.id, fingerprint=model.fingerprint, word=model.word)


def _card(model: Model) -> ModelCard:
    return ModelCard(id=model.id, created=model.created_seconds)
