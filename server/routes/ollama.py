"""The routes of Ollama's interface: chat, generate, and what there is. Nothing is pulled, copied or deleted."""

import time
from datetime import UTC, datetime
from typing import Annotated, Any

from coreinfer.runtime import GenerationOptions
from coreinfer.runtime.prompts.requests import Prompt
from coreinfer.server.answers.ollama_forms import OllamaChatForm, OllamaForm, OllamaTextForm
from coreinfer.server.answers.ollama_responses import (
    Details,
    OllamaChat,
    OllamaText,
    Shown,
    Tag,
    Tags,
    Version,
    utc_text,
)
from coreinfer.server.answers.streaming import LINES, answer_streamed, answer_whole
from coreinfer.server.api_errors import OLLAMA_ERRORS, OLLAMA_PREFIX
from coreinfer.server.jobs import Job
from coreinfer.server.requests.bounds import BoundedRoute
from coreinfer.server.requests.ollama_bodies import OllamaChatRequest, OllamaTextRequest, ShowRequest
from coreinfer.server.requests.ollama_prompts import chat_prompt, ollama_options, text_prompt
from coreinfer.server.service import VERSION, Model, Service, service_of
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

__all__ = ["router"]

router = APIRouter(prefix=OLLAMA_PREFIX, route_class=BoundedRoute)

ServiceOf = Annotated[Service, Depends(service_of)]
_TAG = ":latest"


def _answers(description: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": description, "content": {LINES.media_type: {"schema": {}}}}, **OLLAMA_ERRORS}


@router.get("/version", responses={401: OLLAMA_ERRORS[401]})
async def show_version() -> Version:
    """Say which version of the server this is."""
    return Version(version=VERSION)


@router.get("/tags", responses={401: OLLAMA_ERRORS[401]})
@router.get("/ps", responses={401: OLLAMA_ERRORS[401]})
async def list_tags(service: ServiceOf) -> Tags:
    """List the bundles that are served, all of which are loaded."""
    return Tags(models=[_tag(model) for model in service.models.values()])


@router.post("/show", responses=OLLAMA_ERRORS)
async def show(body: ShowRequest, service: ServiceOf) -> Shown:
    """Show one of them."""
    model = _model(service, body.model)
    record, template = model.manifest.model, model.prompts.chat_template
    return Shown(
        template=template or "",
        details=_details(model),
        model_info={
            "general.architecture": record.family,
            f"{record.family}.context_length": record.max_positions,
            f"{record.family}.block_count": record.num_layers,
            f"{record.family}.embedding_length": record.hidden_size,
        },
        capabilities=["completion", "tools"] if template else ["completion"],
        modified_at=_modified(model),
    )


@router.post("/chat", response_model=OllamaChat, responses=_answers("The answer, or its lines."))
async def chat(body: OllamaChatRequest, request: Request, service: ServiceOf) -> OllamaChat | OllamaText | Response:
    """Answer a conversation."""
    model, options = _model(service, body.model), ollama_options(body, service.config)
    reader = model.prompts.call_reader(options.offered_tools)
    form = OllamaChatForm(model=body.model, reader=reader)
    job = _submit(service, model, chat_prompt(body.messages), options, body.stream)
    return await _answer(request, job, form, body.stream)


@router.post("/generate", response_model=OllamaText, responses=_answers("The text, or its lines."))
async def generate(body: OllamaTextRequest, request: Request, service: ServiceOf) -> OllamaChat | OllamaText | Response:
    """Answer a text, or continue it."""
    model, options = _model(service, body.model), ollama_options(body, service.config)
    job = _submit(service, model, text_prompt(body), options, body.stream)
    return await _answer(request, job, OllamaTextForm(model=body.model), body.stream)


def _submit(service: Service, model: Model, prompt: Prompt, options: GenerationOptions, stream: bool | None) -> Job:
    streamed = stream is not False
    return service.submit(model, prompt, options, arrived_seconds=time.monotonic(), streamed=streamed)


async def _answer(
    request: Request, job: Job, form: OllamaForm, stream: bool | None
) -> OllamaChat | OllamaText | Response:
    """Answer as a whole, or line by line; until the first token is there, an error has a status of its own."""
    if stream is False:
        (tokens,) = await answer_whole(request, [job])
        return form.line(tokens)
    return await answer_streamed(request, [job], lambda _, token: [form.line([token])], LINES)


def _model(service: Service, name: str) -> Model:
    """Find a model by the name that clients of Ollama make of it."""
    return service.model(name if name in service.models else name.removesuffix(_TAG))


def _tag(model: Model) -> Tag:
    files = model.manifest.files.values()
    return Tag(
        name=model.id,
        model=model.id,
        modified_at=_modified(model),
        size=sum(file.bytes for file in files),
        digest=model.fingerprint,
        details=_details(model),
    )


def _details(model: Model) -> Details:
    manifest = model.manifest
    family = manifest.model.family
    return Details(
        family=family,
        families=[family],
        parent_model=manifest.model.name,
        quantization_level=manifest.quantization["ffn"].format,
    )


def _modified(model: Model) -> str:
    return utc_text(datetime.fromtimestamp(model.created_seconds, UTC))
