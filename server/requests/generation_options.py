"""From a request's fields to the options of a generation."""

from dataclasses import fields
from typing import Any

from coreinfer.runtime import GenerationOptions
from coreinfer.server.api_errors import ApiError
from coreinfer.server.server_config import ServerConfig

from .request_bodies import ChatRequest, CompletionRequest, SamplingFields

__all__ = ["chat_options", "completion_options", "same_names"]

_COMPLETION_TOKENS = 16
"""What a completion gets where it does not say, as at OpenAI."""
_TEMPERATURE = 1.0
"""What a request gets where it does not say, as at OpenAI."""
_TRANSLATED = {"logit_bias", "logprobs", "stop", "tools", "tool_choice"}
"""Fields whose values in a body are of another kind than those of a generation; what else has one name is the same."""
_OPTION_NAMES = {item.name for item in fields(GenerationOptions)}


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
    """Translate what all requests have, and what has the same name in both; what one leaves out has its default."""
    return {
        "temperature": _TEMPERATURE,
        **{name: value for name in same_names(type(body)) if (value := getattr(body, name)) is not None},
        "logit_bias": {int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop or (),
    }


def same_names(body: type[SamplingFields]) -> set[str]:
    """Name the fields of a body that a generation takes as they are."""
    return (body.model_fields.keys() & _OPTION_NAMES) - _TRANSLATED


def _length(asked: int | None, config: ServerConfig, default: int | None) -> dict[str, Any]:
    """Settle how long an answer may be. What was asked for must fit, as at OpenAI."""
    limit = config.max_new_tokens
    if asked is not None and asked > limit:
        raise ApiError(400, f"max_tokens: this server allows at most {limit}, got {asked}", param="max_tokens")
    return {"max_new_tokens": asked or min(default or limit, limit), "whole_length": asked is not None}
