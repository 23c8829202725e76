"""llama.cpp with continuous batching, through llama-cpp-python's low-level interface.

One thread calls `llama_decode` with the next token of every running sequence and, while prompts wait, a piece of them.
"""

import importlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["LlamaServer"]

_BATCH_TOKENS = 512
_CONTEXT_TOKENS = 2304


@dataclass(kw_only=True)
class _Slot:
    """A sequence of the context and what it is at."""

    number: int
    prompt_ids: list[int] = field(default_factory=list)
    num_read: int = 0
    num_left: int = 0
    next_id: int = -1
    on_token: Callable[[], None] | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def is_free(self) -> bool:
        return self.on_token is None

    @property
    def decodes(self) -> bool:
        return not self.is_free and self.next_id >= 0


class LlamaServer:
    """Answers requests from any thread; `num_slots` sequences run at once."""

    def __init__(self, path: Path, num_slots: int, threads: int) -> None:
        """Load a GGUF file."""
        self._lib: Any = importlib.import_module("llama_cpp")
        lib = self._lib
        self._silent = lib.llama_log_callback(lambda _level, _text, _data: None)
        lib.llama_log_set(self._silent, None)
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = num_slots * _CONTEXT_TOKENS, _BATCH_TOKENS, _BATCH_TOKENS
        params.n_seq_max, params.n_threads, params.n_threads_batch = num_slots, threads, threads
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"error: llama.cpp cannot open {path} with {num_slots} sequences")
        vocab = lib.llama_model_get_vocab(self._model)
        self._vocab_size, self._eos_id = lib.llama_vocab_n_tokens(vocab), lib.llama_vocab_eos(vocab)
        self._batch = lib.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self._slots = [_Slot(number=number) for number in range(num_slots)]
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._closed = False
        self._work = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def answer(self, prompt_ids: Sequence[int], num_new_tokens: int, on_token: Callable[[], None]) -> None:
        """Decode greedily; returns when the answer is over."""
        done = threading.Event()
        self._waiting.put((list(prompt_ids), num_new_tokens, on_token, done))
        self._work.set()
        done.wait()

    def close(self) -> None:
        """End the thread and give all memory back."""
        self._closed = True
        self._work.set()
        self._thread.join()
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
        self._lib.llama_log_set(self._lib.llama_log_callback(0), None)

    def _run(self) -> None:
        while not self._closed:
            self._admit()
            if all(slot.is_free for slot in self._slots):
                self._work.wait()
                self._work.clear()
                continue
            self._step()

    def _admit(self) -> None:
        for slot in self._slots:
            if slot.is_free and not self._waiting.empty():
                slot.prompt_ids, slot.num_left, slot.on_token, slot.done = self._waiting.get()
                slot.num_read, slot.next_id = 0, -1
                self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), slot.number, -1, -1)

    def _step(self) -> None:
        """Decode one token of all that run, and read what fits of the prompts that wait."""
        self._batch.n_tokens = 0
        ends: list[tuple[_Slot, int]] = []
        for slot in (slot for slot in self._slots if slot.decodes):
            ends.append((slot, self._add(slot, slot.next_id, wanted=True)))
        for slot in (slot for slot in self._slots if not slot.is_free and not slot.decodes):
            while slot.num_read < len(slot.prompt_ids) and self._batch.n_tokens < _BATCH_TOKENS:
                is_last = slot.num_read == len(slot.prompt_ids) - 1
                index = self._add(slot, slot.prompt_ids[slot.num_read], wanted=is_last)
                if is_last:
                    ends.append((slot, index))
        if self._lib.llama_decode(self._context, self._batch) != 0:
            raise SystemExit("error: llama_decode failed")
        for slot, index in ends:
            self._choose(slot, index)

    def _add(self, slot: _Slot, token_id: int, *, wanted: bool) -> int:
        batch, index = self._batch, self._batch.n_tokens
        batch.token[index], batch.pos[index], batch.n_seq_id[index] = token_id, slot.num_read, 1
        batch.seq_id[index][0], batch.logits[index] = slot.number, wanted
        batch.n_tokens += 1
        slot.num_read += 1
        return int(index)

    def _choose(self, slot: _Slot, index: int) -> None:
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, index), shape=(self._vocab_size,))
        slot.next_id = int(logits.argmax())
        slot.num_left -= 1
        assert slot.on_token is not None
        slot.on_token()
        if slot.num_left == 0 or slot.next_id == self._eos_id:
            slot.on_token, done = None, slot.done
            done.set()
