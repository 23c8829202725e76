"""The routes of OpenAI's interface: models, chat, completions."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from coreinfer.runtime import GenerationOptions
from coreinfer.runtime.prompts.requests import Prompt
from coreinfer.server.answers.answer_forms import AnswerForm, ChatForm, CompletionForm, Header, UsageEvents
from coreinfer.server.answers.response_bodies import Chat, Completion, ModelCard, ModelList
from coreinfer.server.answers.streaming import answer_streamed, answer_whole
from coreinfer.server.api_errors import ERRORS, ApiError
from coreinfer.server.jobs import Job
from coreinfer.server.requests.bounds import BoundedRoute
from coreinfer.server.requests.generation_options import chat_options, completion_options
from coreinfer.server.requests.request_bodies import ChatRequest, CompletionRequest, SamplingFields
from coreinfer.server.service import Model, Service, service_of
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

__all__ = ["router"]

router = APIRouter(prefix="/v1", route_class=BoundedRoute)

ServiceOf = Annotated[Service, Depends(service_of)]


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
async def chat(body: ChatRequest, request: Request, service: ServiceOf) -> Chat | Completion | Response:
    """Answer a conversation."""
    model = service.model(body.model)
    options = chat_options(body, service.config)
    jobs = _submit(service, model, [[message.plain for message in body.messages]], options, body)
    reader = model.prompts.call_reader
    one_call = body.parallel_tool_calls is False
    form = ChatForm(
        header=_header(model, jobs, body), readers=[reader(options.offered_tools, one_call=one_call) for _ in jobs]
    )
    return await _answer(request, jobs, form, body)


@router.post("/completions", response_model=Completion, responses=_answers("The completion, or its events."))
async def complete(body: CompletionRequest, request: Request, service: ServiceOf) -> Chat | Completion | Response:
    """Continue a text, or several."""
    model = service.model(body.model)
    options = completion_options(body, service.config)
    jobs = _submit(service, model, body.texts, options, body)
    echoed = [text if body.echo else "" for text in body.texts for _ in range(body.num_choices)]
    return await _answer(request, jobs, CompletionForm(header=_header(model, jobs, body), echoed=echoed), body)


def _submit(
    service: Service, model: Model, prompts: Sequence[Prompt], options: GenerationOptions, body: SamplingFields
) -> list[Job]:
    """Put the generations of an answer into the queue, all or none: each prompt's choices after one another.

    Raises:
        ApiError: they are more than the queue can hold, ever or now.
    """
    arrived_seconds, num_choices = time.monotonic(), body.num_choices
    most = service.config.queue + 1
    if len(prompts) * num_choices > most:
        raise ApiError(400, f"n, prompt: this server returns at most {most} answers at once; ask for fewer", param="n")
    jobs: list[Job] = []
    try:
        for prompt in prompts:
            for number in range(num_choices):
                seed = None if options.seed is None else options.seed + number
                own = replace(options, seed=seed)
                streamed = bool(body.stream)
                jobs.append(service.submit(model, prompt, own, arrived_seconds=arrived_seconds, streamed=streamed))
    except BaseException:
        for job in jobs:
            job.abandon()
        raise
    return jobs


async def _answer(
    request: Request, jobs: Sequence[Job], form: AnswerForm, body: SamplingFields
) -> Chat | Completion | Response:
    if not body.stream:
        return form.whole(await answer_whole(request, jobs))
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return await answer_streamed(request, jobs, UsageEvents(form, len(jobs), wanted=include_usage).events)


def _header(model: Model, jobs: Sequence[Job], body: SamplingFields) -> Header:
    return Header(
        model=model.id,
        fingerprint=lambda: jobs[0].fingerprint or model.fingerprint,
        word=model.word,
        num_alike=body.num_choices,
    )


def _card(model: Model) -> ModelCard:
    return ModelCard(id=model.id, created=model.created_seconds)
