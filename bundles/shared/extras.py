"""Packages that only some installations have."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from coreinfer.bundles.errors import ConfigError

__all__ = ["needs_extra", "require_package"]


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Import the packages of an extra in the block, so that the rest works without them.

    Args:
        what: what needs the package, for the message.
        extra: the extra that contains it.
    Raises:
        ConfigError: a package is not installed; says which one, and how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        # A module of our own that is missing is a fault, not an extra.
        if error.name is None or error.name.partition(".")[0] == "coreinfer":
            raise
        raise ConfigError(_message(what, error.name, f"'coreinfer[{extra}]'")) from error


def require_package(package: str, what: str, install: str) -> None:
    """Find out whether a package is installed, without importing it.

    Args:
        install: what `pip install` takes to install it.
    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(_message(what, package, install))


def _message(what: str, package: str, install: str) -> str:
    return f"{what} needs the package {package}; pip install {install}"
