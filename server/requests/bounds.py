"""Bodies of requests that are legal JSON, and still too much to look at."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

__all__ = ["MAX_VALUES", "BoundedRoute"]

MAX_VALUES = 10_000
"""Values in a body: checking one, and saying what is wrong with it, takes some 10 microseconds on the event loop."""


class BoundedRoute(APIRoute):
    """A route whose body holds at most `MAX_VALUES` values, those inside others counted too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Have the body counted before it is checked."""
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return bounded


class _BoundedRequest(Request):
    async def json(self) -> Any:
        value = await super().json()
        if _has_more_values(value, MAX_VALUES):
            raise HTTPException(
                400, f"the body: expected at most {MAX_VALUES} values in it (objects, lists, texts, numbers), got more"
            )
        return value


def _has_more_values(value: object, limit: int) -> bool:
    count, inside = 1, [value]
    while inside and count <= limit:
        value = inside.pop()
        if isinstance(value, (dict, list)):
            count += len(value)
            inside.extend(value.values() if isinstance(value, dict) else value)
    return count > limit
