"""Configuration of the server."""

import re
from dataclasses import dataclass

from coreinfer.bundles.errors import ConfigError, join_problems

__all__ = ["LOOPBACK_HOSTS", "ServerConfig"]

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits and access of a server.

    Attributes:
        parallel: number of requests that each model answers at once.
        queue: number of further requests that may wait for each model.
        timeout_seconds: a request's whole time, waiting included.
        grace_seconds: time that running requests get at shutdown.
        max_body_bytes: maximum size of a request's body.
        max_new_tokens: maximum number of tokens of a request, and the default.
        api_key: clients must send it as a bearer token; None for no key.
        allowed_hosts: values of the header Host that are answered; empty for all. Guards a server that is bound to a
            loopback address against pages that point a name of their own at it.
        cors_origins: origins, such as https://app.example, whose pages may send requests; "*" for all.
        any_model: answer with the one model, also when a client asks for another name.
    """

    parallel: int = 8
    queue: int = 64
    timeout_seconds: float = 300.0
    grace_seconds: float = 10.0
    max_body_bytes: int = 1 << 20
    max_new_tokens: int = 2048
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    any_model: bool = False

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: naming all values that are wrong.
        """
        least: list[tuple[str, float, float]] = [
            ("parallel", self.parallel, 1),
            ("queue", self.queue, 1),
            ("timeout", self.timeout_seconds, 0.001),
            ("grace", self.grace_seconds, 0),
            ("max_body_bytes", self.max_body_bytes, 1),
            ("max_new_tokens", self.max_new_tokens, 1),
        ]
        problems = [f"{name}: expected at least {low}, got {value}" for name, value, low in least if not value >= low]
        if self.api_key == "":
            problems.append("COREINFER_API_KEY: expected a key, got an empty text; unset it to serve without one")
        problems += [
            f"--cors-origin: expected * or an origin such as https://app.example, got {origin}"
            for origin in self.cors_origins
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s@?#]+", origin)
        ]
        if problems:
            raise ConfigError(join_problems(problems))
