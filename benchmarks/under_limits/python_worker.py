"""One contender of the memory benchmark, in a process of its own: python under_limits/python_worker.py JSON.

It loads, reads a prompt, decodes, and prints one JSON line. With "texts" it measures its KL instead, without a limit.
"""

import ctypes
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

BEGIN = time.perf_counter()
# Of what a process takes beside its weights, not yet there when it loads them: buffers of the engine, logits.
HEADROOM_BYTES = 26_000_000


class Contender(Protocol):
    """What is timed: logits of the last token of what it reads."""

    def read(self, token_ids: Sequence[int]) -> Any:
        """Forget everything and read a prompt in one call."""

    def step(self, token_id: int, *, greedy: bool) -> Any:
        """Decode one token."""


class CoreInfer:
    """The native engine, which reads prompts densely.

    Args:
        cluster: whose pack decodes; None for the dense FFN.
        limit_mb: of the whole process.
        cache_bytes: of the KV cache, under a limit.
    """

    def __init__(self, path: str, cluster: int | None, threads: int, limit_mb: float | None, cache_bytes: int) -> None:
        from coreinfer.bundles import open_bundle
        from coreinfer.runtime.engines.native.decoder import NativeDecoder
        from coreinfer.runtime.engines.protocol import DENSE, FfnChoice

        bundle = open_bundle(path, lazy_packs=True, spare_memory=limit_mb is not None)
        memory_bytes = None if limit_mb is None else int(limit_mb * 1e6) - own_bytes() - HEADROOM_BYTES
        kv_cache_bytes = None if limit_mb is None else cache_bytes
        self.decoder = NativeDecoder(bundle, threads=threads, memory_bytes=memory_bytes, kv_cache_bytes=kv_cache_bytes)
        self.dense, self.choice = DENSE, DENSE if cluster is None else FfnChoice(cluster=cluster)

    def read(self, token_ids: Sequence[int]) -> Any:
        """See `Contender`."""
        self.decoder.truncate(0)
        self.decoder.use(self.dense)
        if self.choice.cluster is not None:
            self.decoder.prepare(self.choice)
        logits = self.decoder.forward(token_ids, greedy=True)[-1]
        self.decoder.use(self.choice)
        return logits

    def step(self, token_id: int, *, greedy: bool) -> Any:
        """See `Contender`."""
        return self.decoder.forward([token_id], greedy=greedy)[-1]


class LlamaCpp:
    """llama.cpp through llama-cpp-python's own binding, which has the option for repacking."""

    def __init__(self, path: str, threads: int, *, mmap: bool, repack: bool) -> None:
        import numpy as np

        self.numpy, self.lib = np, importlib.import_module("llama_cpp")
        lib = self.lib
        self.silent = lib.llama_log_callback(lambda _level, _text, _data: None)
        lib.llama_log_set(self.silent, ctypes.c_void_p(0))
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.use_extra_bufts = repack
        if hasattr(lib, "LLAMA_LOAD_MODE_MMAP"):
            params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mmap else lib.LLAMA_LOAD_MODE_NONE
        else:
            # Before that it was a field; where there is none, setting it would do nothing.
            params.use_mmap = mmap
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        context = lib.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = 512, 256, 256
        context.n_threads = context.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, context)
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def read(self, token_ids: Sequence[int]) -> Any:
        """See `Contender`."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return self._decode(token_ids)

    def step(self, token_id: int, *, greedy: bool) -> Any:
        """See `Contender`."""
        return self._decode([token_id])

    def _decode(self, token_ids: Sequence[int]) -> Any:
        ids = (self.lib.llama_token * len(token_ids))(*token_ids)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, len(token_ids))) != 0:
            raise SystemExit("error: llama_decode failed")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return self.numpy.ctypeslib.as_array(logits, shape=(self.vocab_size,)).copy()


class Transformers:
    """transformers in bfloat16, with a KV cache, nothing compiled.

    Args:
        limit_mb: with `offload`, of the whole process.
        offload: accelerate decides which modules stay and reads the others from the file for each pass.
    """

    def __init__(self, path: str, threads: int, limit_mb: float | None, *, offload: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch, self.cache = torch, None
        options = offload_options(path, limit_mb) if offload and limit_mb else {}
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options).eval()

    def read(self, token_ids: Sequence[int]) -> Any:
        """See `Contender`."""
        self.cache = None
        return self._forward(token_ids)

    def step(self, token_id: int, *, greedy: bool) -> Any:
        """See `Contender`."""
        return self._forward([token_id])

    def _forward(self, token_ids: Sequence[int]) -> Any:
        with self.torch.inference_mode():
            out = self.model(
                self.torch.tensor([list(token_ids)]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        self.cache = out.past_key_values
        return out.logits[0, -1].float().numpy()


def offload_options(path: str, limit_mb: float) -> dict[str, Any]:
    """What makes accelerate keep as many modules as there is room for, and read the others from disk."""
    room_bytes = max(0, int(limit_mb * 1e6) - own_bytes() - HEADROOM_BYTES)
    return {
        "device_map": "auto",
        "max_memory": {"cpu": room_bytes},
        "offload_folder": str(Path(path).with_name("offloaded")),
        "offload_state_dict": True,
    }


def own_bytes() -> int:
    """Memory that this process has taken, libraries included."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile")))


def disk_bytes() -> int:
    """Bytes that this process has had read from disk, by reads and by touching mapped pages."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def make(spec: dict[str, Any]) -> Contender:
    """Load what a spec names."""
    path, threads = spec["path"], spec["threads"]
    if spec["engine"] == "coreinfer":
        cluster = None if spec["variant"] == "dense" else spec["cluster"]
        return CoreInfer(path, cluster, threads, spec["limit_mb"], spec["kv_bytes"])
    if spec["engine"] == "llamacpp":
        return LlamaCpp(path, threads, mmap=spec["mmap"], repack=spec["repack"])
    return Transformers(path, threads, spec["limit_mb"], offload=spec.get("offload", False))


def time_it(spec: dict[str, Any]) -> dict[str, Any]:
    """First token after a prompt, then decoding until there are enough tokens or no time is left."""
    contender = make(spec)
    loaded = time.perf_counter()
    next_id = int(contender.read(list(range(1000, 1000 + spec["prompt_tokens"]))).argmax())
    first = time.perf_counter()
    # The first tokens bring in what stays.
    for _ in range(spec["warm_tokens"]):
        next_id = int(contender.step(next_id, greedy=True).argmax())
    count, begin, bytes_before = 0, time.perf_counter(), disk_bytes()
    while count < spec["num_tokens"] and (count == 0 or time.perf_counter() - begin < spec["seconds"]):
        next_id = int(contender.step(next_id, greedy=True).argmax())
        count += 1
    seconds = time.perf_counter() - begin
    return {
        "decode_tok_s": count / seconds,
        "first_token_seconds": first - BEGIN,
        "load_seconds": loaded - BEGIN,
        "disk_mb_a_token": (disk_bytes() - bytes_before) / count / 1e6,
        "num_tokens": count,
    }


def measure_kl(spec: dict[str, Any]) -> dict[str, Any]:
    """Mean KL(reference || contender) over second halves of texts, whose first halves are read in one call."""
    import numpy as np

    contender, total, count = make(spec), 0.0, 0
    for ids, expected in read_reference(Path(spec["texts"])):
        middle = len(ids) // 2
        contender.read(ids[:middle])
        for row, token_id in zip(expected, ids[middle:], strict=True):
            p, q = (
                values - values.max() for values in (row.astype(np.float32), contender.step(token_id, greedy=False))
            )
            log_p, log_q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
            total += float((np.exp(log_p) * (log_p - log_q)).sum())
            count += 1
    return {"kl": total / count}


def read_reference(folder: Path) -> Any:
    """Yield token ids and the reference's logits (tokens of the second half, vocabulary) of each text."""
    import numpy as np

    for number, ids in enumerate(json.loads((folder / "ids.json").read_text(encoding="utf-8"))):
        yield ids, np.load(folder / f"{number}.npy", mmap_mode="r")


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(measure_kl(given) if given.get("texts") else time_it(given)))
