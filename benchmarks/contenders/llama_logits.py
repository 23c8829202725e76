"""llama.cpp's own logits, by the C functions of llama.h.

The library is taken from an installed Python package: llama-cpp-python, which comes as source and takes half an hour to
build, or xllamacpp, which is a wheel; or from the file that the environment variable LLAMA_CPP_LIBRARY names.
"""

import ctypes
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LlamaModel", "find_llama_cpp"]

_LIBRARIES = {"llama_cpp": "lib/libllama.so", "xllamacpp": "xllamacpp.abi3.so"}
_INT, _POINTER, _BOOL = ctypes.c_int32, ctypes.c_void_p, ctypes.c_bool


class _Parameters(ctypes.Structure):
    """Parameters of any version: passed by value as they came, but for the first numbers of a context's.

    llama.h begins them with n_ctx, n_batch and n_ubatch; what is longer than the library's own is not looked at.
    """

    _fields_ = (("numbers", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", _INT),
        ("token", ctypes.POINTER(_INT)),
        ("embd", _POINTER),
        ("pos", ctypes.POINTER(_INT)),
        ("n_seq_id", ctypes.POINTER(_INT)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_INT))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_Log = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_errors: list[str] = []


def _keep_error(level: int, text: bytes, data: Any) -> None:
    if level == _ERROR:
        _errors.append(text.decode(errors="replace").strip())


_LOG = _Log(_keep_error)
"""The library has one log for all models, and calls it as long as any of them lives."""


# Function of llama.h -> what it returns, and what it takes.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_Log, _POINTER)),
    "llama_model_default_params": (_Parameters, ()),
    "llama_context_default_params": (_Parameters, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, _Parameters)),
    "llama_init_from_model": (_POINTER, (_POINTER, _Parameters)),
    "llama_set_n_threads": (None, (_POINTER, _INT, _INT)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
    "llama_tokenize": (
        _INT,
        (_POINTER, ctypes.c_char_p, _INT, ctypes.POINTER(_INT), _INT, _BOOL, _BOOL),
    ),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, _BOOL)),
    "llama_batch_init": (_Batch, (_INT, _INT, _INT)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (_INT, (_POINTER, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_POINTER,)),
}


def find_llama_cpp() -> Path | None:
    """Find the library; None where there is none."""
    if stated := os.environ.get("LLAMA_CPP_LIBRARY"):
        return Path(stated)
    for package, name in _LIBRARIES.items():
        found = find_spec(package)
        if found is not None and found.origin is not None and (path := Path(found.origin).parent / name).exists():
            return path
    return None


class LlamaModel:
    """A GGUF file in llama.cpp, on the CPU."""

    def __init__(self, path: Path, *, num_positions: int, threads: int) -> None:
        """Load a file.

        Args:
            num_positions: maximum number of tokens of a text.
        Raises:
            RuntimeError: llama.cpp is not installed, or does not load the file.
        """
        library_path = find_llama_cpp()
        if library_path is None:
            raise RuntimeError("llama.cpp is not installed: pip install xllamacpp")
        self._library = _bound(library_path)
        _errors.clear()
        self._library.llama_log_set(_LOG, None)
        self._library.llama_backend_init()
        model = self._library.llama_model_load_from_file(str(path).encode(), self._library.llama_model_default_params())
        parameters = self._library.llama_context_default_params()
        parameters.numbers[:3] = (num_positions,) * 3
        self._context = self._library.llama_init_from_model(model, parameters) if model else None
        if not self._context:
            raise RuntimeError(f"llama.cpp does not load {path}: {'; '.join(_errors)}")
        self._library.llama_set_n_threads(self._context, threads, threads)
        self._vocabulary = self._library.llama_model_get_vocab(model)
        self._num_tokens: int = self._library.llama_vocab_n_tokens(self._vocabulary)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Turn a text into token ids, beginning as the model's texts begin.

        Args:
            special: find control tokens in it.
        """
        raw = text.encode()
        ids = (_INT * (len(raw) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, raw, len(raw), ids, len(ids), True, special)
        return list(ids[:count])

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Read a text in one batch: (tokens, vocabulary).

        Raises:
            RuntimeError: llama.cpp does not decode it.
        """
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        batch = self._library.llama_batch_init(len(token_ids), 0, 1)
        batch.n_tokens = len(token_ids)
        for index, token_id in enumerate(token_ids):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token_id, index, 1
            batch.seq_id[index][0], batch.logits[index] = 0, 1
        if self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp does not decode {len(token_ids)} tokens")
        values = self._library.llama_get_logits(self._context)
        self._library.llama_batch_free(batch)
        return np.ctypeslib.as_array(values, (len(token_ids), self._num_tokens)).copy()


def _bound(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    for name, (returned, taken) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = returned, taken
    return library
