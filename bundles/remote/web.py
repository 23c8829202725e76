"""A bundle as a folder that fsspec reads: https, S3. Files are fetched by ranges, and go on where they broke off."""

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any

from coreinfer.bundles.errors import BundleError, BundleNotFound, ConfigError
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import FileRecord
from coreinfer.bundles.shared.extras import needs_extra

from .faults import is_of_network, reason_of
from .opening import Mirror
from .places import WebPlace

__all__ = ["mirror_web"]

_log = logging.getLogger(__name__)
_RANGE_BYTES = 8 << 20
_NUM_TRIES = 5
_PAUSE_SECONDS = 0.2
"""Before the second try; doubled before each further one."""


def mirror_web(place: WebPlace) -> Mirror:
    """Fetch the manifest, which names the folder: another version of the bundle gets another one.

    Raises:
        BundleNotFound: there is no bundle at the address.
        BundleError: the server cannot be reached.
        ConfigError: a package is not installed.
    """
    files = _file_system(place)
    text = _attempted(place, LAYOUT.manifest, lambda: files.cat_file(f"{place}/{LAYOUT.manifest}"))
    key = hashlib.sha256(f"{place}\0".encode() + text).hexdigest()[:32]
    folder = _cache_dir() / key
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / LAYOUT.manifest, text)

    def download(name: str, record: FileRecord, anew: bool) -> None:
        target = folder / name
        partial = target.with_name(f"{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        if anew:
            partial.unlink(missing_ok=True)
        _fill(files, place, name, partial, record.bytes)
        partial.replace(target)

    return Mirror(place=str(place), folder=folder, download=download)


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coreinfer" / "bundles"


def _replace(path: Path, data: bytes) -> None:
    """Write a small file whole, also beside another process that does the same."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    beside.replace(path)


def _file_system(place: WebPlace) -> Any:
    with needs_extra(f"a bundle at {place}", "remote"):
        import fsspec
    try:
        # Listings of a bundle that was uploaded again would be stale.
        return fsspec.url_to_fs(str(place), use_listings_cache=False)[0]
    except ImportError as error:
        raise ConfigError(f"a bundle at {place}: {error}; pip install 'coreinfer[remote]'") from error


def _fill(files: Any, place: WebPlace, name: str, partial: Path, num_bytes: int) -> None:
    """Append to a file what it lacks.

    Raises:
        BundleError: the server cannot be reached, or does not answer ranges.
    """
    with partial.open("ab") as file:
        while (start := file.tell()) < num_bytes:
            end = min(start + _RANGE_BYTES, num_bytes)
            data = _attempted(place, name, lambda: files.cat_file(f"{place}/{name}", start=start, end=end))  # noqa: B023
            if len(data) == num_bytes:
                # The whole file: a server that knows no ranges.
                file.truncate(0)
            elif len(data) != end - start:
                raise BundleError(
                    f"{place}: {name}: expected {end - start} bytes from byte {start} on, got {len(data)}; "
                    "the server must answer ranges, and hold the bundle that its manifest describes"
                )
            file.write(data)
            file.flush()


def _attempted(place: WebPlace, name: str, read: Any) -> bytes:
    """Read, again after a pause where the connection broke.

    Raises:
        BundleNotFound: there is no such file, or it may not be read.
        BundleError: the server cannot be reached.
    """
    problem: Exception | None = None
    for number in range(_NUM_TRIES):
        if number:
            time.sleep(_PAUSE_SECONDS * 2 ** (number - 1))
        try:
            return bytes(read())
        except (FileNotFoundError, PermissionError) as error:
            raise BundleNotFound(
                f"{place}: no {name} there ({reason_of(error)}); check the address and its access"
            ) from error
        except Exception as error:
            # Each file system has its own, of aiohttp, botocore and others.
            if not is_of_network(error):
                raise
            problem = error
            _log.info("%s: %s broke off (%s); trying again", place, name, reason_of(error))
    raise BundleError(
        f"{place}: {name} cannot be fetched ({reason_of(problem)}); check the connection and run the same again"
    ) from problem
