"""From a request's fields to the options of a generation."""

from typing import Any

from coreinfer.runtime import GenerationOptions

from .api_errors import ApiError
from .request_bodies import ChatRequest, CompletionRequest, SamplingFields
from .server_config import ServerConfig

__all__ = ["chat_options", "completion_options"]

_COMPLETION_TOKENS = 16
"""What a completion gets where it does not say, as at OpenAI."""


def chat_options(body: ChatRequest, config: ServerConfig) -> GenerationOptions:
    """Translate a chat's options.

    Raises:
        ApiError: it asks for more tokens than the server allows.
        ConfigError: options do not go together.
    """
    return GenerationOptions(
        **_sampling(body),
        **_length(body.max_tokens or body.max_completion_tokens, config, None),
        logprobs=body.num_logprobs,
        json_schema=body.response_format.schema_to_follow if body.response_format else None,
        tools=[tool.plain for tool in body.tools] if body.tools else None,
        tool_choice=body.plain_choice,
        chat_template_kwargs=body.chat_template_kwargs,
        continue_final_message=body.continue_final_message,
        parse_special=bool(body.parse_special),
    )


def completion_options(body: CompletionRequest, config: ServerConfig) -> GenerationOptions:
    """Translate a completion's options.

    Raises:
        ApiError: it asks for more tokens than the server allows.
    """
    return GenerationOptions(
        **_sampling(body), **_length(body.max_tokens, config, _COMPLETION_TOKENS), logprobs=body.logprobs, raw=True
    )


def _sampling(body: SamplingFields) -> dict[str, Any]:
    """Translate what all requests have; what one leaves out has OpenAI's default, or this project's."""
    return {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_k": body.top_k or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "min_p": body.min_p or 0.0,
        "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": {int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        "seed": body.seed,
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop or [],
        "mode": body.mode,
        "skip_special_tokens": body.skip_special_tokens is not False,
    }


def _length(asked: int | None, config: ServerConfig, default: int | None) -> dict[str, Any]:
    """Settle how long an answer may be. What was asked for must fit, as at OpenAI."""
    limit = config.max_new_tokens
    if asked is not None and asked > limit:
        raise ApiError(400, f"max_tokens: this server allows at most {limit}, got {asked}", param="max_tokens")
    return {"max_new_tokens": asked or min(default or limit, limit), "whole_length": asked is not None}
