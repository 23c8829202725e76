"""Stage results on storage that machines share: each keeps a folder in front of it.

A result is published when it is complete: first its file, then the file's SHA-256 beside it. Whoever fetches it
compares both, so that half a file, of whatever kind of storage, is no result.
"""

import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from coreinfer.bundles.checksums import file_sha256
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.remote.faults import is_of_network, reason_of

from .storage import address_of, find_storage, storage_errors

__all__ = ["StageStore", "default_cache_dir", "local_folder", "store_of"]

_log = logging.getLogger(__name__)
_DIGEST_SUFFIX = ".sha256"
_OPTION = "--cache"


@dataclass(frozen=True, kw_only=True)
class StageStore:
    """Where results are published, by the address of a folder."""

    address: str

    def check(self) -> None:
        """Write a small file and take it away again.

        Raises:
            ConfigError: that does not work.
        """
        with storage_errors(self._told):
            files, folder = self._place()
            mark = f"{folder}/seen-{uuid4().hex}"
            files.pipe_file(mark, b"coreinfer")
            files.rm_file(mark)

    def _told(self, reason: str) -> ConfigError:
        return ConfigError(
            f"{_OPTION} {self.address}: cannot be written ({reason}); check the address and its access, name another "
            "one, or use --no-cache"
        )

    def fetch(self, target: Path) -> bool:
        """Bring a result, by its file's name, into the folder in front; False where there is none that is whole."""
        name = target.name
        try:
            files, folder = self._place()
            expected = bytes(files.cat_file(f"{folder}/{name}{_DIGEST_SUFFIX}")).decode("ascii", "replace").strip()
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, beside = tempfile.mkstemp(prefix=f".{name}.", dir=target.parent)
            os.close(descriptor)
            try:
                files.get_file(f"{folder}/{name}", beside)
                if file_sha256(Path(beside)) == expected:
                    Path(beside).replace(target)
                    return True
            finally:
                Path(beside).unlink(missing_ok=True)
        except FileNotFoundError:
            return False
        except Exception as error:
            if not is_of_network(error):
                raise
            _log.warning("%s/%s cannot be fetched (%s); computing it again", self.address, name, reason_of(error))
            return False
        _log.warning("%s/%s is not as it was stored; computing it again", self.address, name)
        return False

    def publish(self, path: Path) -> None:
        """Put a result there from the folder in front; where that fails it is logged, as the result is there."""
        try:
            files, folder = self._place()
            files.put_file(str(path), f"{folder}/{path.name}")
            files.pipe_file(f"{folder}/{path.name}{_DIGEST_SUFFIX}", file_sha256(path).encode("ascii"))
        except Exception as error:
            if not is_of_network(error):
                raise
            _log.warning(
                "%s/%s cannot be written (%s); only this machine can go on from it",
                self.address,
                path.name,
                reason_of(error),
            )

    def _place(self) -> tuple[Any, str]:
        return find_storage(_OPTION, self.address)


def store_of(cache_dir: Path) -> StageStore | None:
    """Find the store of a cache that is given by an address; None for a folder."""
    address = address_of(cache_dir)
    return None if address is None else StageStore(address=address)


def local_folder(cache_dir: Path) -> Path:
    """The cache's folder on this machine: itself, or the one in front of its address."""
    if (address := address_of(cache_dir)) is None:
        return cache_dir
    return _user_cache() / "mirrors" / hashlib.sha256(address.encode()).hexdigest()[:16]


def default_cache_dir() -> Path:
    """Where stage results are kept: COREINFER_CACHE, else coreinfer under the user's cache folder."""
    if folder := os.environ.get("COREINFER_CACHE"):
        return Path(folder)
    return _user_cache()


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coreinfer"
