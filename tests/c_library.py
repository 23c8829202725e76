"""The C library, built from the tree, and its functions as Python calls them."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .bundle_factory import one_at_a_time

__all__ = [
    "DENSE",
    "CError",
    "CModel",
    "build_library",
    "build_program",
    "has_compilers",
    "load_library",
    "run_program",
]

ROOT = Path(__file__).parent.parent
DENSE = -1
COMPILERS = tuple(os.environ.get(name, usual).split() for name, usual in (("CXX", "g++"), ("CC", "cc")))
"""Of C++ and C: commands, which may have several words."""
STATUSES = (
    *("OK", "ARGUMENT", "NOT_FOUND", "VERSION", "CORRUPT", "UNSUPPORTED", "NO_ROOM", "MEMORY", "BUSY"),
    *("NOT_FINITE", "INTERNAL", "STOPPED", "NO_ADDRESS_SPACE"),
)
_GETTERS = ["vocab_size", "num_clusters", "has_dense", "num_threads", "num_tokens", "max_tokens", "bytes_read"]


class Options(ctypes.Structure):
    """coreinfer_options."""

    _fields_ = [
        ("struct_bytes", ctypes.c_size_t),
        ("num_threads", ctypes.c_int),
        ("isa", ctypes.c_char_p),
        ("kv_cache_bytes", ctypes.c_uint64),
        ("skip_checksums", ctypes.c_int),
        ("memory_bytes", ctypes.c_uint64),
    ]


class CError(Exception):
    """A status other than OK, by name, and the message."""


def has_compilers() -> bool:
    return all(shutil.which(compiler[0]) for compiler in COMPILERS)


def build_library() -> Path:
    """Build what has changed; returns the folder with include/ and lib/."""
    out = ROOT / "build" / "capi"
    out.mkdir(parents=True, exist_ok=True)
    command = ["bash", str(ROOT / "tools" / "build-capi.sh"), str(out)]
    with one_at_a_time(out / "lock"):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    # A warning in the library is one in the tree.
    assert not run.stderr, run.stderr
    return out


def build_program(library: Path, source: Path, program: Path) -> Path:
    """Build a program of C that uses the library, in strict C99."""
    command = [*COMPILERS[1], "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", str(source)]
    command += [f"-I{library / 'include'}", f"-L{library / 'lib'}", "-lcoreinfer", f"-Wl,-rpath,{library / 'lib'}"]
    run = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return program


def run_program(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def load_library(folder: Path) -> Any:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = ctypes.CDLL(str(folder / "lib" / f"libcoreinfer.{suffix}"))
    for name in _GETTERS:
        getattr(library, f"coreinfer_{name}").argtypes = [ctypes.c_void_p]
    for name in ("last_error", "cluster_label", "isa"):
        getattr(library, f"coreinfer_{name}").restype = ctypes.c_char_p
    library.coreinfer_cluster_label.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.coreinfer_isa.argtypes = [ctypes.c_void_p]
    library.coreinfer_is_end.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.coreinfer_open.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
    library.coreinfer_bytes_read.restype = ctypes.c_uint64
    for name in ("use", "prepare", "truncate"):
        getattr(library, f"coreinfer_{name}").argtypes = [ctypes.c_void_p, ctypes.c_int]
    feed: list[Any] = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.coreinfer_feed.argtypes = library.coreinfer_feed_greedy.argtypes = feed
    library.coreinfer_close.argtypes = [ctypes.c_void_p]
    return library


class CModel:
    """A model of the C library."""

    def __init__(self, folder: Path, bundle: Path, **options: Any) -> None:
        """Open a bundle; `options` are fields of coreinfer_options, none for NULL."""
        self._library = self._load(folder)
        self._model = ctypes.c_void_p()
        given = Options(**{"struct_bytes": ctypes.sizeof(Options), **options})
        pointer = ctypes.byref(given) if options else None
        self._check(self._library.coreinfer_open(str(bundle).encode(), pointer, ctypes.byref(self._model)))

    @staticmethod
    def _load(folder: Path) -> Any:
        return load_library(folder)

    def __del__(self) -> None:
        with suppress(AttributeError):
            self._library.coreinfer_close(self._model)

    def __getattr__(self, name: str) -> int:
        if name not in _GETTERS:
            raise AttributeError(name)
        return int(getattr(self._library, f"coreinfer_{name}")(self._model))

    def _check(self, status: int) -> None:
        if status:
            raise CError(f"{STATUSES[status]}: {self._library.coreinfer_last_error().decode()}")

    @property
    def isa(self) -> str:
        return str(self._library.coreinfer_isa(self._model).decode())

    def label(self, cluster: int) -> str | None:
        label = self._library.coreinfer_cluster_label(self._model, cluster)
        return None if label is None else str(label.decode())

    def is_end(self, token_id: int) -> bool:
        return bool(self._library.coreinfer_is_end(self._model, token_id))

    def use(self, cluster: int) -> None:
        self._check(self._library.coreinfer_use(self._model, cluster))

    def prepare(self, cluster: int) -> None:
        self._check(self._library.coreinfer_prepare(self._model, cluster))

    def truncate(self, num_tokens: int) -> None:
        self._check(self._library.coreinfer_truncate(self._model, num_tokens))

    def feed(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of the token after the last one, (vocab,)."""
        given, logits = np.asarray(ids, dtype=np.int32), np.empty(self.vocab_size, dtype=np.float32)
        self._check(self._library.coreinfer_feed(self._model, given.ctypes.data, len(given), logits.ctypes.data))
        return logits

    def feed_greedy(self, ids: Sequence[int]) -> int:
        given, chosen = np.asarray(ids, dtype=np.int32), ctypes.c_int32()
        pointer = ctypes.byref(chosen)
        self._check(self._library.coreinfer_feed_greedy(self._model, given.ctypes.data, len(given), pointer))
        return chosen.value
