"""Run the application: a socket, uvicorn, and an orderly end."""

import itertools
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from types import FrameType

import uvicorn
from coreinfer.bundles.errors import ConfigError
from coreinfer.runtime import Engine

from .app import app_of
from .server_config import ServerConfig
from .service import Service, engine_service

__all__ = ["bind", "serve", "serve_engines"]

_log = logging.getLogger(__name__)

_BACKLOG = 2048
# After the grace time answers are cut; so long they may take to reach their clients.
_LAST_WORDS_SECONDS = 5


def bind(host: str, port: int) -> socket.socket:
    """Take an address before anything is loaded, so that a taken one is known at once.

    Args:
        port: 0 for any that is free.
    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        raise ConfigError(f"--host {host} --port {port}: cannot be bound ({error}); choose another") from error
    return taken


def serve_engines(
    engines: Mapping[str, Engine], config: ServerConfig, taken: socket.socket, *, on_start: Callable[[], None]
) -> None:
    """Serve engines of this process; see `serve`.

    Args:
        engines: loaded bundles by the names that clients use.
        config: limits and access.
    """
    serve(engine_service(engines, config), taken, on_start=on_start)


def serve(service: Service, taken: socket.socket, *, on_start: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish within the grace time.

    Args:
        taken: a bound socket.
        on_start: called when requests are answered.
    """
    config = service.config
    server = _Server(
        uvicorn.Config(
            app_of(service),
            # What else is installed shall not change how the server behaves.
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            # Forwarded addresses are used nowhere, so they need no trust.
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=int(config.grace_seconds) + _LAST_WORDS_SECONDS,
        ),
        grace_seconds=config.grace_seconds,
        cut=service.cut,
        on_start=on_start,
    )
    try:
        server.run(sockets=[taken])
    except KeyboardInterrupt:
        # uvicorn raises the signal again that it ended by; it has done all that there was to do.
        _log.info("ended by a signal")
    finally:
        # A second Ctrl-C skips the application's own end.
        service.close()


class _Server(uvicorn.Server):
    """uvicorn, which says when it answers, and cuts what still runs after the grace time."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        grace_seconds: float,
        cut: Callable[[], None],
        on_start: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._cut_later = threading.Timer(grace_seconds, cut)
        self._cut_later.daemon = True
        self._num_signals = itertools.count()
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A second signal may come while the first one's handler is still starting the timer.
        if next(self._num_signals) == 0:
            self._cut_later.start()
        super().handle_exit(sig, frame)
