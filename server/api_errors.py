"""What a client is told when a request fails: OpenAI's shape, or Ollama's under /api/, with a status that fits.

ApiError                 any status
├── QueueFull            429, with Retry-After
├── RequestTimedOut      504, or the last event of a stream
├── ShuttingDown         503, or the last event of a stream
└── ClientGone           499, seen in the metrics only
"""

import logging
from collections.abc import Mapping
from typing import Any

from coreinfer.bundles.errors import ConfigError, ContextTooLong, CoreInferError, ModelOutputError
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .answers.response_bodies import ErrorBody, PlainErrorBody
from .requests.invalid import describe_invalid

__all__ = [
    "ERRORS",
    "OLLAMA_ERRORS",
    "OLLAMA_PREFIX",
    "ApiError",
    "ClientGone",
    "QueueFull",
    "RequestTimedOut",
    "ShuttingDown",
    "add_error_handlers",
    "api_error",
    "error_response",
]

_log = logging.getLogger(__name__)

_MAX_PROBLEMS = 8
"""Of a request, those that are named; the others are counted."""

_STATUSES = {
    400: "The request is wrong, or asks for what is not supported.",
    401: "The key is wrong or missing.",
    404: "There is no such model.",
    413: "The body is too large.",
    415: "The body is not said to be JSON.",
    429: "The queue is full; the header Retry-After says when to come again.",
    500: "A bug, or a bundle that is damaged or computes no finite numbers.",
    503: "The server is shutting down.",
    504: "The answer took too long.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _STATUSES.items()
}
"""What routes can answer in addition to what they return, for FastAPI's schema."""
OLLAMA_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": PlainErrorBody, "description": text} for status, text in _STATUSES.items()
}
"""The same for Ollama's interface."""
OLLAMA_PREFIX = "/api"
"""Of the paths of Ollama's interface."""


class ApiError(Exception):
    """A request that fails with a status and a message for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Describe what is wrong.

        Args:
            status: of HTTP.
            message: one line.
            param: the field of the request that is wrong.
            code: a short name for programs.
            headers: of the response.
        """
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The JSON object for the client."""
        # Names of fields come from the client and may hold halves of surrogate pairs, which UTF-8 cannot.
        message, param = (None if text is None else _encodable(text) for text in (str(self), self.param))
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def plain_content(self) -> dict[str, Any]:
        """The JSON object for clients of Ollama's interface."""
        return {"error": _encodable(str(self))}


class QueueFull(ApiError):
    """No place in the queue of a model."""

    def __init__(self, capacity: int, retry_seconds: int) -> None:
        """Say when to come again."""
        super().__init__(
            429,
            f"the queue is full: {capacity} requests are waiting; try again in {retry_seconds} s",
            code="queue_full",
            headers={"Retry-After": str(retry_seconds)},
        )


class RequestTimedOut(ApiError):
    """A request took longer than the server allows."""

    def __init__(self, timeout_seconds: float) -> None:
        """Name the limit."""
        super().__init__(504, f"the request took longer than {timeout_seconds:g} s", code="timeout")


class ShuttingDown(ApiError):
    """The server ends before the answer does."""

    def __init__(self) -> None:
        """Nothing to add."""
        super().__init__(503, "the server is shutting down", code="shutting_down")


class ClientGone(ApiError):
    """The client closed its connection."""

    def __init__(self) -> None:
        """Nothing to add: nobody reads it."""
        super().__init__(499, "the client closed the connection", code="client_gone")


def api_error(error: Exception) -> ApiError:
    """Turn what a generation raised into what its client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConfigError):
        code = "context_length_exceeded" if isinstance(error, ContextTooLong) else None
        return ApiError(400, " ".join(str(error).split()), code=code)
    if isinstance(error, ModelOutputError):
        # Where it was raised says nothing: it is the model's doing.
        _log.error("a request failed: %s", error)
        return ApiError(500, str(error), code="model_output_not_finite")
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log has it", code="internal_error")


def error_response(error: ApiError, path: str) -> JSONResponse:
    """Put an error into a response to a request for a path."""
    content = error.plain_content if path.startswith(f"{OLLAMA_PREFIX}/") else error.content
    return JSONResponse(content, status_code=error.status, headers=error.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Bring every error of an application into the form of the interface that was asked."""

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return error_response(api_error(error), request.url.path)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = describe_invalid(error.errors(), error.body)
        return error_response(ApiError(400, found.message, param=found.param, code=found.code), request.url.path)

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(ApiError(error.status_code, str(error.detail), headers=error.headers), request.url.path)

    app.add_exception_handler(ApiError, failed)
    app.add_exception_handler(CoreInferError, failed)
    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
