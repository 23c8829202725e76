"""Results of finished stages on disk, under a key of everything that they depend on.

An interrupted compile continues after its last finished stage, and compiles that share a model and text share the
stages before the first difference. Values are JSON and safetensors, never pickles.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.pages import map_file
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .stage_store import StageStore

__all__ = ["Cache", "stage_key"]

_log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray[Any, Any]]
_DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
    "C64": "<c8",
}
"""What `save_file` writes -> how numpy names it."""


def stage_key(stage: str, **inputs: object) -> str:
    """Hash a stage's name and inputs; inputs are what `json.dumps` takes, with paths as text."""
    text = json.dumps({"stage": stage, **inputs}, sort_keys=True, default=str)
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


@dataclass(frozen=True)
class Cache:
    """A folder of stage results; with `folder` None nothing is kept, and everything is computed.

    Attributes:
        shared: what other machines have too, to which results go and from which those come that the folder lacks.
    """

    folder: Path | None
    shared: StageStore | None = None

    def find_arrays(self, key: str) -> Arrays | None:
        """Return the arrays stored under a key, or None if there are none that can be read.

        They are mapped, so that the system may drop from memory what is not in use. They can be written to, which
        changes neither the file nor what others read of it.
        """
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        if not self._find(path):
            return None
        try:
            return _map_arrays(path)
        except (OSError, SafetensorError, ValueError) as error:
            _log.warning("cache file %s cannot be read (%s); computing it again", path, error)
            return None

    def arrays(self, key: str, compute: Callable[[], Mapping[str, np.ndarray[Any, Any]]]) -> Arrays:
        """Return the arrays stored under a key, or compute and store them; mapped, as `find_arrays` returns them.

        Raises:
            ConfigError: they cannot be stored.
        """
        if self.folder is None:
            return dict(compute())
        if (stored := self.find_arrays(key)) is not None:
            return stored
        arrays = {name: np.ascontiguousarray(array) for name, array in compute().items()}
        self.store(key, arrays)
        mapped = self.find_arrays(key)
        return arrays if mapped is None else mapped

    def store(self, key: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Store arrays under a key, in place of what is there.

        Raises:
            ConfigError: they cannot be stored.
        """
        if self.folder is not None:
            whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            self._replace(self.folder / f"{key}.safetensors", lambda temporary: save_file(whole, temporary))

    def json(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value stored under a key, or compute and store it.

        Raises:
            ConfigError: it cannot be stored.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{key}.json"
        if self._find(path):
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                _log.warning("cache file %s cannot be read (%s); computing it again", path, error)
        value = compute()
        text = json.dumps(value, ensure_ascii=False)
        self._replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        # What is computed and what is read back must be the same, tuples and keys included.
        return json.loads(text)

    def _find(self, path: Path) -> bool:
        return path.exists() or (self.shared is not None and self.shared.fetch(path))

    def _replace(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file under a temporary name first, so that no half result is ever read."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(descriptor)
            temporary = Path(name)
            try:
                write(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--cache {path.parent}: cannot be written ({reason}); free some space, name another folder, "
                "or use --no-cache"
            ) from error
        if self.shared is not None:
            self.shared.publish(path)


def _map_arrays(path: Path) -> Arrays:
    """Map the arrays of a safetensors file privately (copy on write): torch warns of memory that it cannot write to.

    Raises:
        OSError, SafetensorError, ValueError: the file cannot be read, is damaged, or has what numpy has no arrays for.
    """
    with safe_open(path, framework="np"):
        # Opening checks the header: every range lies in the file and fits its shape.
        pass
    mapped = map_file(path)
    num_header_bytes = int.from_bytes(mapped[:8], "little")
    arrays = {}
    for name, entry in json.loads(mapped[8 : 8 + num_header_bytes]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"array {name!r} has the unknown dtype {entry['dtype']!r}")
        start = 8 + num_header_bytes + entry["data_offsets"][0]
        arrays[name] = np.ndarray(entry["shape"], dtype=_DTYPES[entry["dtype"]], buffer=mapped, offset=start)
    return arrays
