"""Storage at addresses, such as s3://bucket/folder, that fsspec reads and writes."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.remote.faults import is_of_network, reason_of
from coreinfer.bundles.shared.extras import needs_extra

__all__ = ["address_of", "find_storage", "storage_errors"]

# A Path has one slash where the address had two. A drive of Windows is one letter.
_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/+(?P<rest>.+)")
_OF_EXTRA = ("s3:", "http:", "https:")
"""Kinds of storage whose packages the extra `remote` has."""


def address_of(given: str | Path) -> str | None:
    """Tell an address, without a slash at its end, from a path of this machine, which is None."""
    match = _ADDRESS.fullmatch(str(given))
    if match is None:
        return None
    # Of this machine's files the path begins with a slash of its own.
    start = "file:///" if match["scheme"] == "file" else f"{match['scheme']}://"
    return start + match["rest"].rstrip("/")


def find_storage(what: str, address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it.

    Args:
        what: the option that names it, for errors.
    Raises:
        ConfigError: there is no such kind of storage, or a package for it is not installed.
    """
    with needs_extra(f"{what} {address}", "remote"):
        import fsspec
    try:
        # What others write there meanwhile has to be seen. Elsewhere, folders are part of names, or are made first.
        options = {"auto_mkdir": True} if address.startswith("file:") else {}
        files, path = fsspec.url_to_fs(address, use_listings_cache=False, **options)
    except ImportError as error:
        # Of what other kinds need, fsspec names the package.
        advice = "; pip install 'coreinfer[remote]'" if address.startswith(_OF_EXTRA) else ""
        raise ConfigError(f"{what} {address}: {error}{advice}") from error
    except ValueError as error:
        raise ConfigError(f"{what} {address}: expected an address such as s3://BUCKET/FOLDER ({error})") from error
    return files, str(path)


@contextmanager
def storage_errors(told: Callable[[str], Exception]) -> Iterator[None]:
    """Raise another error in the place of one that storage raises in the block; others pass.

    Args:
        told: makes it, of what went wrong.
    """
    try:
        yield
    except Exception as error:
        if not is_of_network(error):
            raise
        raise told(reason_of(error)) from error
