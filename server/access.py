"""Who may ask, and how much: what is checked before a request reaches its route."""

import asyncio
import hmac
from collections.abc import Mapping
from typing import Any

from .api_errors import ApiError, error_response
from .metrics import AsgiApp, Message, Receive, Send
from .server_config import LOOPBACK_HOSTS, ServerConfig

__all__ = ["Gate", "HeadAsGet"]

# Without a key a client sees that the server lives, the page, and what could be asked; the page asks for the key.
_OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
_BODY_SECONDS = 30.0
# Many clients read the answer only when they have sent everything: so much of a body is read and thrown away.
_MAX_DISCARDED_BYTES = 64 << 20


class HeadAsGet:
    """ASGI middleware: answers HEAD wherever GET is answered, without the body."""

    def __init__(self, app: AsgiApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app(scope | {"method": "GET"}, receive, without_body)


class Gate:
    """ASGI middleware: checks host, key, type and size of a request."""

    def __init__(self, app: AsgiApp, *, config: ServerConfig) -> None:
        """Wrap an application."""
        self._app, self._config = app, config

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on with its whole body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(scope, headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check(self, scope: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        config = self._config
        host = _host_name(headers.get("host", ""))
        if config.allowed_hosts and host not in config.allowed_hosts and not _is_old_neighbour(scope, headers):
            raise ApiError(403, f"host {host!r} is not served; --allow-host adds it", code="wrong_host")
        if config.api_key is not None and scope["path"] not in _OPEN_PATHS:
            _check_key(headers.get("authorization", ""), config.api_key)
        # Any page may send plain text or a form to any server, but JSON only where the server agrees.
        if scope["method"] == "POST" and _media_type(headers) != "application/json":
            raise ApiError(415, "expected the header Content-Type: application/json")

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        """Read a body; None when the client went away meanwhile.

        Raises:
            ApiError: it is too large or too slow.
        """
        limit = self._config.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        if headers.get("expect", "").lower() == "100-continue" and int(headers.get("content-length") or 0) > limit:
            # Such a client waits to hear whether it may send.
            raise too_large
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        chunks.clear()
                    if not message.get("more_body") or size > _MAX_DISCARDED_BYTES:
                        break
        except TimeoutError as error:
            raise ApiError(408, f"the body took longer than {_BODY_SECONDS:g} s", code="slow_body") from error
        if size > limit:
            raise too_large
        return b"".join(chunks)


def _check_key(authorization: str, key: str) -> None:
    scheme, _, given = authorization.partition(" ")
    # In bytes: strings can be compared in constant time only if they are ASCII.
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise ApiError(
            401,
            "wrong or missing key; send the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _is_old_neighbour(scope: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
    """Whether a client of this machine speaks HTTP/1.0, which has no header Host; all browsers send one."""
    client = scope.get("client") or ("",)
    return scope.get("http_version") == "1.0" and "host" not in headers and client[0] in LOOPBACK_HOSTS


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").split(";")[0].strip().lower()


def _host_name(host: str) -> str:
    """Leave the port out of a Host header: 127.0.0.1:8000, [::1]:8000."""
    if host.startswith("["):
        return host[1:].split("]")[0]
    return host.split(":")[0].lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Replay a body that was read already; after it comes what the client does next."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again
