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

__all__ = ["LOCAL", "THIS_CLUSTER", "check_ray", "data_context", "on_ray"]

LOCAL = "local"
"""As an address: start Ray here."""
THIS_CLUSTER = "auto"
"""As an address: the Ray that this machine is part of."""

_log = logging.getLogger(__name__)

_SMALL_STORE_BYTES = 128 << 20
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
def on_ray(address: str, *, num_cpus: int, sends_arrays: bool = False) -> Iterator[None]:
    """Be connected to Ray in the block; where the program is already, that connection serves.

    Args:
        address: of a cluster, `THIS_CLUSTER`, or `LOCAL` to start one that ends with the block.
        num_cpus: CPUs that a Ray which is started here lends out; it counts them, and binds nobody to them.
        sends_arrays: whether large objects are sent: what is started here then takes a third of the memory for them, as
            Ray does by itself, and has its dashboard, and what workers print stays in their logs.
    Raises:
        ConfigError: Ray is not installed, or nobody answers at the address.
    """
    check_ray("--ray")
    import ray

    if ray.is_initialized():
        yield
        return
    # Nothing is reported to anybody who was not asked for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": not sends_arrays}
    if address == LOCAL:
        options |= {"num_cpus": num_cpus}
        if not sends_arrays:
            options |= {"object_store_memory": _SMALL_STORE_BYTES, "include_dashboard": False}
    elif address != THIS_CLUSTER:
        _check_address(address)
    with _own_signals():
        try:
            # "local" also where a Ray runs on this machine already.
            context = ray.init(address, **options)
        # Ray raises a bare Exception where it does not start in time.
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise ConfigError(f"--ray {address}: cannot be reached ({first}); give HOST:PORT, or local") from error
    logging.getLogger("ray").setLevel(logging.WARNING)
    if context.dashboard_url:
        _log.info("Ray's dashboard: http://%s", context.dashboard_url)
    try:
        yield
    finally:
        ray.shutdown()


def data_context(*, in_order: bool) -> Any:
    """How Ray Data runs here: it draws nothing, and logs what goes wrong.

    Args:
        in_order: whether results come in the order of what they are made of.
    Returns:
        A `ray.data.DataContext`, for the time of a block: `with DataContext.current(...)`.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It warns that it draws nothing.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = in_order
    context.enable_progress_bars = context.print_on_execution_start = False
    return context


def _check_address(address: str) -> None:
    """Find out whether somebody listens at an address: Ray itself would try for minutes.

    Raises:
        ConfigError: nobody does, or it is no address.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or "/" in host:
        raise ConfigError(f"--ray {address}: expected HOST:PORT, such as 10.0.0.1:6379, auto or local")
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
