"""Functions of coreinfer_engine.h, as Python calls them."""

import ctypes
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import Bundle
from coreinfer.bundles.tensors import TensorFile

from .c_library import CModel, load_library

__all__ = [
    "ALL_LOGITS",
    "HALVES",
    "LAST_LOGITS",
    "SCREENED",
    "CEngine",
    "EngineOptions",
    "LentFile",
    "Watched",
    "record_of",
]

Int32s = npt.NDArray[np.int32]

ALL_LOGITS, LAST_LOGITS, SCREENED = 1, 2, 4
NUM_GROUPS = 4
HALVES = 16
_RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
# Of functions that return a status, after the model or FFN.
_ARGUMENTS: dict[str, list[Any]] = {
    "open_files": [_POINTER, _POINTER, _POINTER],
    "limit_memory": [ctypes.c_char_p, _SIZE, _SIZE],
    "read_ffn": [_POINTER, _POINTER, _SIZE, _POINTER],
    "read_experts": [_POINTER, _POINTER, _SIZE, _POINTER],
    "pack": [_INT, _POINTER],
    "keep_experts": [_POINTER, _SIZE, _POINTER],
    "gather_neurons": [_POINTER, _SIZE, _POINTER],
    "read_in_layers": [ctypes.c_char_p, _POINTER],
    "use_ffn": [_POINTER, _POINTER, _SIZE],
    "announce_ffn": [_POINTER],
    "holds_ffn": [_POINTER, _POINTER],
    "add_sequence": [_POINTER],
    "fork_sequence": [_INT, _INT, _POINTER],
    "drop_sequence": [_INT],
    "truncate_sequence": [_INT, _INT],
    "num_cached": [_INT, _POINTER],
    "forward": [_INT, _POINTER, _SIZE, _INT, _POINTER, _POINTER, _POINTER],
    "forward_rows": [_POINTER, _POINTER, _SIZE, _INT, _POINTER],
    "forward_beside": [_INT, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _INT, _POINTER],
    "lay_out_columns": [_INT, _SIZE],
    "try_columns": [ctypes.c_double, _INT, _POINTER],
    "bytes_per_token": [_INT, _INT, _INT, _POINTER],
}
_SIZES = ("page_bytes", "logits_stride", "column_bytes", "layer_bytes_used")
_COUNTS = ("num_pages", "num_free_pages", "num_layers")


class File(ctypes.Structure):
    """coreinfer_file."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", _POINTER),
        ("num_bytes", _SIZE),
        ("release", _RELEASE),
        ("owner", _POINTER),
    ]


class LentFile:
    """A tensor file that is lent to the library, which counts how often it comes back."""

    def __init__(self, file: TensorFile) -> None:
        """Lend a bundle's file; the object must stay until it has come back."""
        self.num_released = 0
        self._bytes = file.mapped_bytes
        self._release = _RELEASE(self._released)
        self.path = str(file.path).encode()
        self.file = File(self.path, self._bytes.ctypes.data, len(self._bytes), self._release, None)

    def _released(self, _: object) -> None:
        self.num_released += 1


class Sizes(ctypes.Structure):
    """coreinfer_sizes."""

    _fields_ = [("page", _SIZE), ("tables", _SIZE), ("table_block", _SIZE)]


COUNT_PAGES = ctypes.CFUNCTYPE(_INT, _POINTER, ctypes.POINTER(Sizes))


class EngineOptions(ctypes.Structure):
    """coreinfer_engine_options."""

    _fields_ = [
        ("struct_bytes", _SIZE),
        ("num_threads", _INT),
        ("isa", ctypes.c_char_p),
        ("count_pages", COUNT_PAGES),
        ("user", _POINTER),
    ]


class Ids(ctypes.Structure):
    """coreinfer_ids."""

    _fields_ = [("ids", _POINTER), ("num_ids", _SIZE)]


class Watched(ctypes.Structure):
    """coreinfer_watched."""

    _fields_ = [
        *((name, _INT) for name in ("layer", "expert", "num_tokens", "stride")),
        *((name, ctypes.POINTER(ctypes.c_float)) for name in ("activations", "weights")),
    ]


WATCHER = ctypes.CFUNCTYPE(_INT, _POINTER, ctypes.POINTER(Watched))


class Reads(ctypes.Structure):
    """coreinfer_reads."""

    _fields_ = [
        ("layer_bytes", ctypes.c_uint64),
        ("num_hits", ctypes.c_uint64),
        ("num_misses", ctypes.c_uint64),
        ("waited_seconds", ctypes.c_double),
        ("table_bytes", ctypes.c_uint64),
    ]


def record_of(bundle: Bundle) -> bytes:
    """The manifest's record of the model, as JSON."""
    return json.dumps(asdict(bundle.manifest.model)).encode()


def _as_ids(ids: Sequence[int] | Int32s) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(ids, dtype=np.int32)


@contextmanager
def _layers(layers: Iterable[Sequence[int] | Int32s]) -> Iterator[tuple[Any, int]]:
    arrays = [_as_ids(ids) for ids in layers]
    yield (Ids * len(arrays))(*(Ids(ids.ctypes.data, len(ids)) for ids in arrays)), len(arrays)


class CEngine(CModel):
    """A model of the C library, with all that coreinfer_engine.h does."""

    @classmethod
    def of_files(cls, folder: Path, record: bytes, base: LentFile, **options: Any) -> "CEngine":
        """Open a base by `coreinfer_open_files`; `options` are fields of coreinfer_engine_options, none for NULL."""
        model = cls.__new__(cls)
        model._library = cls._load(folder)
        model._model = ctypes.c_void_p()
        model._hold(base)
        given = EngineOptions(**{"struct_bytes": ctypes.sizeof(EngineOptions), **options})
        pointer = ctypes.byref(given) if options else None
        model._check(
            model._library.coreinfer_open_files(record, ctypes.byref(base.file), pointer, ctypes.byref(model._model))
        )
        return model

    def _hold(self, file: LentFile) -> None:
        """Keep what is lent: closing the model may call it."""
        self.__dict__.setdefault("_lent", []).append(file)

    @staticmethod
    def _load(folder: Path) -> Any:
        library = load_library(folder)
        for name, arguments in _ARGUMENTS.items():
            getattr(library, f"coreinfer_{name}").argtypes = [_POINTER, *arguments]
        for name in (*_SIZES, *_COUNTS):
            getattr(library, f"coreinfer_{name}").argtypes = [_POINTER]
        for name in _SIZES:
            getattr(library, f"coreinfer_{name}").restype = _SIZE
        library.coreinfer_is_wide.argtypes = [_POINTER, _INT]
        library.coreinfer_read_figures.argtypes = [_POINTER, _POINTER]
        library.coreinfer_max_neurons.argtypes = library.coreinfer_close_ffn.argtypes = [_POINTER]
        return library

    def __getattr__(self, name: str) -> int:
        if name in (*_SIZES, *_COUNTS):
            return int(getattr(self._library, f"coreinfer_{name}")(self._model))
        return super().__getattr__(name)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status, by its name without the prefix."""
        self._check(getattr(self._library, f"coreinfer_{name}")(*arguments))

    def close(self) -> None:
        """Free the model."""
        self._library.coreinfer_close(self._model)
        self._model = ctypes.c_void_p()

    # FFNs

    def _made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        ffn = ctypes.c_void_p()
        self.call(name, *arguments, ctypes.byref(ffn))
        return ffn

    def read_ffn(
        self, record: bytes, file: LentFile, num_neurons: Sequence[int], name: str = "read_ffn"
    ) -> ctypes.c_void_p:
        counts = _as_ids(num_neurons)
        self._hold(file)
        return self._made(name, record, ctypes.byref(file.file), counts.ctypes.data, len(counts))

    def pack(self, cluster: int) -> ctypes.c_void_p:
        return self._made("pack", self._model, cluster)

    def keep_experts(self, ffn: ctypes.c_void_p, experts: Iterable[Sequence[int]]) -> ctypes.c_void_p:
        with _layers(experts) as layers:
            return self._made("keep_experts", ffn, *layers)

    def gather_neurons(self, ffn: ctypes.c_void_p, neuron_ids: Iterable[Sequence[int] | Int32s]) -> ctypes.c_void_p:
        with _layers(neuron_ids) as layers:
            return self._made("gather_neurons", ffn, *layers)

    def read_in_layers(self, ffn: ctypes.c_void_p, path: bytes) -> ctypes.c_void_p:
        return self._made("read_in_layers", ffn, path)

    def close_ffn(self, ffn: ctypes.c_void_p) -> None:
        self._library.coreinfer_close_ffn(ffn)

    def max_neurons(self, ffn: ctypes.c_void_p) -> int:
        return int(self._library.coreinfer_max_neurons(ffn))

    def use_ffn(self, ffn: ctypes.c_void_p, thresholds: npt.NDArray[np.float32] | None = None) -> None:
        given = (None, 0) if thresholds is None else (thresholds.ctypes.data, len(thresholds))
        self.call("use_ffn", self._model, ffn, *given)

    def announce_ffn(self, ffn: ctypes.c_void_p) -> None:
        self.call("announce_ffn", self._model, ffn)

    def holds_ffn(self, ffn: ctypes.c_void_p) -> bool:
        return bool(self._number("holds_ffn", ffn))

    # Sequences

    def _number(self, name: str, *arguments: Any, kind: Any = _INT) -> int:
        number = kind()
        self.call(name, self._model, *arguments, ctypes.byref(number))
        return int(number.value)

    def add_sequence(self) -> int:
        return self._number("add_sequence")

    def fork_sequence(self, source: int, num_tokens: int) -> int:
        return self._number("fork_sequence", source, num_tokens)

    def drop_sequence(self, sequence: int) -> None:
        self.call("drop_sequence", self._model, sequence)

    def truncate_sequence(self, sequence: int, num_tokens: int) -> None:
        self.call("truncate_sequence", self._model, sequence, num_tokens)

    def num_cached(self, sequence: int) -> int:
        return self._number("num_cached", sequence)

    # Passes; logits are (rows, vocabulary).

    def forward(
        self,
        sequence: int,
        ids: Sequence[int],
        flags: int = 0,
        watcher: Callable[[Watched], int] | None = None,
    ) -> npt.NDArray[np.float32]:
        given, rows = _as_ids(ids), self._rows(len(ids) if flags & ALL_LOGITS else 1)
        watch = WATCHER(lambda _, seen: watcher(seen.contents)) if watcher else None
        self.call(
            *("forward", self._model, sequence, given.ctypes.data, len(given), flags, rows.ctypes.data),
            *(ctypes.cast(watch, _POINTER) if watch else None, None),
        )
        return rows[:, : self.vocab_size]

    def forward_rows(self, sequences: Sequence[int], ids: Sequence[int], flags: int = 0) -> npt.NDArray[np.float32]:
        numbers, given, rows = _as_ids(sequences), _as_ids(ids), self._rows(len(ids))
        self.call(
            *("forward_rows", self._model, numbers.ctypes.data, given.ctypes.data, len(given), flags, rows.ctypes.data)
        )
        return rows[:, : self.vocab_size]

    def forward_beside(
        self, sequence: int, block_ids: Sequence[int], sequences: Sequence[int], ids: Sequence[int], flags: int = 0
    ) -> npt.NDArray[np.float32]:
        block, numbers, given = _as_ids(block_ids), _as_ids(sequences), _as_ids(ids)
        rows = self._rows(len(ids) + bool(flags & LAST_LOGITS))
        self.call(
            *("forward_beside", self._model, sequence, block.ctypes.data, len(block)),
            *(numbers.ctypes.data, given.ctypes.data, len(given), flags, rows.ctypes.data),
        )
        return rows[:, : self.vocab_size]

    def _rows(self, count: int) -> npt.NDArray[np.float32]:
        return np.full((count, self.logits_stride), np.nan, dtype=np.float32)

    # Figures

    def try_columns(self, share: float, *, halves: bool = False) -> list[float]:
        gains = (ctypes.c_double * NUM_GROUPS)()
        self.call("try_columns", self._model, share, HALVES if halves else 0, gains)
        return list(gains)

    def reads(self) -> Reads | None:
        reads = Reads()
        return reads if self._library.coreinfer_read_figures(self._model, ctypes.byref(reads)) else None

    def bytes_per_token(self, num_tokens: int, flags: int = 0, *, alone: bool = True) -> int:
        return self._number("bytes_per_token", num_tokens, flags, int(alone), kind=_SIZE)

    def is_wide(self, layer: int) -> bool:
        return bool(self._library.coreinfer_is_wide(self._model, layer))
