"""llama.cpp's own logits, through whichever of its Python packages is installed.

llama-cpp-python comes as source and takes half an hour to build; llama-cpp-py-sync is a wheel with the same library.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LlamaReader", "has_llama_cpp", "open_llama"]

Logits = npt.NDArray[np.float32]
LlamaReader = Callable[[Sequence[int]], Logits]
"""Token ids of a text -> (tokens, vocabulary)."""


def has_llama_cpp() -> bool:
    """Whether one of the packages is installed."""
    return any(find_spec(name) for name in ("llama_cpp", "llama_cpp_py_sync"))


def open_llama(path: Path, *, num_positions: int, threads: int = 2) -> tuple[LlamaReader, Callable[[str], list[int]]]:
    """Load a GGUF file.

    Returns:
        What computes logits, and llama.cpp's tokenizer: a text as it stands -> token ids.
    """
    if find_spec("llama_cpp"):
        return _by_llama_cpp_python(path, num_positions, threads)
    return _by_py_sync(path, num_positions, threads)


def _by_llama_cpp_python(path: Path, num_positions: int, threads: int) -> Any:
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=num_positions, logits_all=True, verbose=False, n_threads=threads)

    def read(token_ids: Sequence[int]) -> Logits:
        model.reset()
        model.eval(list(token_ids))
        return np.array(model.scores[: len(token_ids)], dtype=np.float32)

    return read, lambda text: list(model.tokenize(text.encode(), add_bos=True, special=False))


def _by_py_sync(path: Path, num_positions: int, threads: int) -> Any:
    from llama_cpp_py_sync import Llama

    model = Llama(str(path), n_ctx=num_positions, n_batch=num_positions, n_threads=threads)
    library, context, vocabulary = model._lib, model._ctx, model.n_vocab

    def read(token_ids: Sequence[int]) -> Logits:
        model._clear_context_state()
        batch = library.llama_batch_init(len(token_ids), 0, 1)
        batch.n_tokens = len(token_ids)
        for index, token_id in enumerate(token_ids):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token_id, index, 1
            batch.seq_id[index][0], batch.logits[index] = 0, 1
        if library.llama_decode(context, batch):
            raise RuntimeError(f"llama.cpp does not decode {path}")
        # Once for all: the call reorders what it was asked for.
        values = model._ffi.buffer(library.llama_get_logits(context), 4 * len(token_ids) * vocabulary)
        found = np.frombuffer(values, dtype=np.float32).reshape(len(token_ids), vocabulary).copy()
        library.llama_batch_free(batch)
        return found

    return read, lambda text: list(model.tokenize(text, add_special=True, parse_special=False))
