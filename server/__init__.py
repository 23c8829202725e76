"""The server: bundles behind OpenAI's API, and a page with a map. Needs the extra `coreinfer[serve]`.

from coreinfer import runtime, server

app = server.create_app({"demo": runtime.load("build/demo-bundle")}, server.ServerConfig())
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from coreinfer.bundles.shared.extras import needs_extra
from coreinfer.runtime import Engine

from .server_config import ServerConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["ServerConfig", "create_app"]


def create_app(engines: Mapping[str, Engine], config: ServerConfig) -> "FastAPI":
    """Put the server's application together; see `coreinfer.server.app.create_app`.

    Raises:
        ConfigError: the packages of the extra `serve` are not installed.
    """
    # Loaded only when something is served, so that `--help` works without them.
    with needs_extra("serving", "serve"):
        from . import app
    return app.create_app(engines, config)
