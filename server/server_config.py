"""Configuration of the server."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from coreinfer.bundles.shared.checks import number, raise_problems, whole_number
from coreinfer.bundles.shared.option_fields import field_problems, keyword, option

__all__ = ["KEY_VARIABLE", "LOOPBACK_HOSTS", "ServerConfig"]

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
KEY_VARIABLE = "COREINFER_API_KEY"


def _key_problems(_name: str, key: object) -> Iterator[str]:
    if not isinstance(key, str):
        yield f"{KEY_VARIABLE}: expected a text, got {type(key).__name__}"
    elif not key:
        yield f"{KEY_VARIABLE}: expected a key, got an empty text; unset it to serve without one"


def _origin_problems(name: str, origins: tuple[str, ...]) -> Iterator[str]:
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s@?#]+", origin):
            yield f"{name}: expected * or an origin such as https://app.example, got {origin}"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits and access of a server.

    Each option is stated here and nowhere else: those of `coreinfer-serve`, docs/cli.md and the checks are made from
    these fields.
    """

    parallel: int = field(
        default=8, metadata=option("Number of requests that each bundle answers at once.", check=whole_number(1))
    )
    queue: int = field(
        default=64,
        metadata=option(
            "Number of requests that may wait for each bundle; others get status 429.", check=whole_number(1)
        ),
    )
    timeout_seconds: float = field(
        default=300.0,
        metadata=option(
            "Maximum seconds for one request, waiting included.", check=number(least=0.001), switches=("--timeout",)
        ),
    )
    grace_seconds: float = field(
        default=10.0,
        metadata=option(
            "Seconds that running requests get to finish after SIGTERM or Ctrl-C.",
            check=number(least=0),
            switches=("--grace",),
        ),
    )
    max_body_kb: int = field(
        default=1024, metadata=option("Maximum kilobytes of a request's body.", check=whole_number(1))
    )
    """In units of 1,024 bytes."""
    max_new_tokens: int = field(
        default=2048, metadata=option("Maximum number of tokens that a request may ask for.", check=whole_number(1))
    )
    """Also what a request gets where it does not say."""
    api_key: str | None = field(
        default=None,
        metadata=keyword("Clients must send it as a bearer token.", problems=_key_problems, unset="no key"),
    )
    allowed_hosts: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "Also answer requests to this host name; only needed when listening on loopback.",
            unset="none",
            switches=("--allow-host",),
        ),
    )
    """Values of the header Host that are answered; empty for all. Guards a server that is bound to a loopback address
    against pages that point a name of their own at it."""
    cors_origins: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "Allow web pages of this origin, such as https://app.example; * for all; repeatable.",
            problems=_origin_problems,
            unset="none",
            switches=("--cors-origin",),
        ),
    )
    any_model: bool = field(
        default=False,
        metadata=option("Answer with the one DIR, also when a request names another model.", switches=("--any-model",)),
    )

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ConfigError: naming all options that are wrong.
        """
        raise_problems(field_problems(self))

    @property
    def max_body_bytes(self) -> int:
        """Most bytes of a request's body."""
        return self.max_body_kb << 10
