"""A connection to Ray, or a Ray that is started here and ends with the block."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coreinfer.bundles.errors import ConfigError

from .extras import needs_extra

__all__ = ["LOCAL", "check_ray", "on_ray"]

_log = logging.getLogger(__name__)

LOCAL = "local"
"""As an address: start Ray here."""

# Requests and tokens are small; Ray would take a third of the memory for large objects.
_LOCAL_STORE_BYTES = 128 << 20
_CONNECT_SECONDS = 5.0


def check_ray(what: str) -> None:
    """Import Ray.

    Args:
        what: what needs it, for the message.
    Raises:
        ConfigError: it is not installed; says how to install it.
    """
    with needs_extra(what, "ray"):
        import ray  # noqa: F401


@contextmanager
def on_ray(address: str, *, num_cpus: int) -> Iterator[None]:
    """Be connected to Ray in the block.

    Args:
        address: of a cluster, or `LOCAL` to start one that ends with the block.
        num_cpus: CPUs that will be asked for, at most. A Ray that is started here lends out so many; it counts them,
            and binds nobody to them.
    Raises:
        ConfigError: Ray is not installed, or nobody answers at the address.
    """
    check_ray("--ray")
    import ray

    # Nothing is reported to anybody who was not asked for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started: dict[str, Any] = {}
    if address == LOCAL:
        started = {"num_cpus": num_cpus, "object_store_memory": _LOCAL_STORE_BYTES, "include_dashboard": False}
    else:
        _check_address(address)
    with _own_signals():
        try:
            # "local" also where a Ray runs on this machine already.
            ray.init(address, logging_level=logging.ERROR, **started)
        # Ray raises a bare Exception where it does not start in time.
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"--ray {address}: no Ray there ({first}); give HOST:PORT of one, or local") from error
    logging.getLogger("ray").setLevel(logging.WARNING)
    if (found := ray.cluster_resources().get("CPU", 0.0)) < num_cpus:
        # Clusters may grow when they are asked for more.
        _log.warning("--ray %s: it has %g CPUs, and up to %d are asked for", address, found, num_cpus)
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Find out whether somebody listens at an address: Ray itself would try for minutes.

    Raises:
        ConfigError: nobody does, or it is no address.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or "/" in host:
        raise ConfigError(f"--ray {address}: expected HOST:PORT, such as 10.0.0.1:6379, or local")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--ray {address}: cannot be reached ({error}); start Ray there, or give local") from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of signals, which Ray replaces by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
