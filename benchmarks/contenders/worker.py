"""One contender of the side-by-side benchmark, in a process of its own: python contenders/worker.py NAME PATH N.

It loads, then answers each line on standard input ("decode 128", "prefill 512", "figures", "read 536870912") with a
line of JSON on standard output, so that whoever asks decides who runs when.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

START_IDS = list(range(1, 17))


class Contender(Protocol):
    """What is timed."""

    def read(self, token_ids: list[int]) -> None:
        """Forget everything and read a prompt."""

    def decode(self, num_tokens: int) -> None:
        """Decode greedily from where it is."""

    def bytes_per_token(self) -> int:
        """Weights (and cache, where it is known) that a token reads."""


class CoreInfer:
    """The native engine; `variant` is dense or pack."""

    def __init__(self, path: str, variant: str, threads: int) -> None:
        from coreinfer.bundles import open_bundle
        from coreinfer.runtime.engines.native.decoder import NativeDecoder
        from coreinfer.runtime.engines.protocol import DENSE, FfnChoice

        self.decoder = NativeDecoder(open_bundle(path, lazy_packs=True), threads=threads)
        self.decoder.use(DENSE if variant == "dense" else FfnChoice(cluster=0))
        self.next_id = 1

    def read(self, token_ids: list[int]) -> None:
        """See `Contender`."""
        self.decoder.truncate(0)
        self.next_id = int(self.decoder.forward(token_ids)[-1].argmax())

    def decode(self, num_tokens: int) -> None:
        """See `Contender`."""
        for _ in range(num_tokens):
            self.next_id = int(self.decoder.forward([self.next_id], greedy=True)[-1].argmax())

    def bytes_per_token(self) -> int:
        """See `Contender`."""
        return int(self.decoder.bytes_per_token(80, greedy=True))


class Transformers:
    """transformers in bfloat16, `generate` as it comes, nothing compiled."""

    def __init__(self, path: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.ids = START_IDS

    def read(self, token_ids: list[int]) -> None:
        """See `Contender`."""
        self.ids = token_ids
        with self.torch.inference_mode():
            self.model(self.torch.tensor([token_ids]), use_cache=True, logits_to_keep=1)

    def decode(self, num_tokens: int) -> None:
        """See `Contender`."""
        ids = self.torch.tensor([self.ids])
        self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    def bytes_per_token(self) -> int:
        """See `Contender`."""
        embedding = self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings().weight
        lookup = 0 if head is embedding else embedding.numel()
        return int(2 * (sum(parameter.numel() for parameter in self.model.parameters()) - lookup))


class LlamaCpp:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, path: str, threads: int) -> None:
        import numpy as np

        self.numpy, self.api, self.path = np, importlib.import_module("llama_cpp"), path
        self.model = self.api.Llama(
            path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.vocab_size = self.model.n_vocab()
        self.next_id = 1

    def read(self, token_ids: list[int]) -> None:
        """See `Contender`."""
        self.model.n_tokens = 0
        self.model.eval(token_ids)
        self.next_id = self._best()

    def decode(self, num_tokens: int) -> None:
        """See `Contender`."""
        for _ in range(num_tokens):
            self.model.eval([self.next_id])
            self.next_id = self._best()

    def _best(self) -> int:
        logits = self.api.llama_get_logits_ith(self.model.ctx, -1)
        return int(self.numpy.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())

    def bytes_per_token(self) -> int:
        """See `Contender`."""
        return gguf_bytes(self.path)


class OpenVino:
    """OpenVINO GenAI on the GGUF file that llama.cpp reads, as it comes."""

    def __init__(self, path: str, threads: int) -> None:
        import numpy as np

        self.numpy, self.path = np, path
        self.openvino, self.api = importlib.import_module("openvino"), importlib.import_module("openvino_genai")
        self.pipeline = self.api.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
        self.ids = START_IDS

    def read(self, token_ids: list[int]) -> None:
        """See `Contender`; its first token is sampled as well."""
        self.ids = token_ids
        self.decode(1)

    def decode(self, num_tokens: int) -> None:
        """See `Contender`; reads the prompt again, as `generate` of transformers does."""
        config = self.api.GenerationConfig(max_new_tokens=num_tokens, min_new_tokens=num_tokens, ignore_eos=True)
        ids = self.openvino.Tensor(self.numpy.array([self.ids], dtype=self.numpy.int64))
        mask = self.openvino.Tensor(self.numpy.ones((1, len(self.ids)), dtype=self.numpy.int64))
        self.pipeline.generate(self.api.TokenizedInputs(ids, mask), config)

    def bytes_per_token(self) -> int:
        """See `Contender`: the file's bytes; what they are repacked to is not told."""
        return gguf_bytes(self.path)


def gguf_bytes(path: str) -> int:
    """All tensors of a file, without a token embedding that is only looked up in."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    return sum(int(t.n_bytes) for t in tensors if not (untied and t.name == "token_embd.weight"))


class PlainRead:
    """The plain read bandwidth of the machine."""

    def __init__(self, threads: int) -> None:
        from coreinfer.runtime.engines.native import _native

        self.native, self.threads = _native, threads

    def gbps(self, num_bytes: int) -> float:
        """Read so many bytes; GB/s."""
        return float(self.native.read_bandwidth(self.threads, num_bytes))


def build(name: str, path: str, threads: int) -> Any:
    """Load a contender by its name in the results."""
    if name == "read":
        return PlainRead(threads)
    if name.startswith("coreinfer"):
        return CoreInfer(path, name.rpartition("-")[2], threads)
    kinds = {"transformers": Transformers, "llama.cpp": LlamaCpp, "openvino": OpenVino}
    return kinds[name.partition("-")[0]](path, threads)


def answer(contender: Any, command: str, amount: int, number: int) -> dict[str, float]:
    """Run one command, the process's `number`th."""
    if command == "read":
        return {"gbps": contender.gbps(amount)}
    if command == "figures":
        # In this order: some contenders' bytes are counted by a library that takes memory itself.
        return {"peak_rss_mb": peak_rss_mb(), "bytes_per_token": contender.bytes_per_token()}
    if command == "decode":
        contender.read(START_IDS)
    start = time.perf_counter()
    if command == "decode":
        contender.decode(amount)
    else:
        # Each time another prompt, so that nobody finds its beginning in a cache.
        contender.read([1 + (7 * number + position) % 100 for position in range(amount)])
    return {"seconds": time.perf_counter() - start}


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main() -> None:
    """Answer commands until the end of input."""
    # Libraries of contenders write to standard output as they like: answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    name, path, threads = sys.argv[1:]
    contender = build(name, path, int(threads))
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for number, line in enumerate(sys.stdin):
        command, amount = line.split()
        answers.write(json.dumps(answer(contender, command, int(amount), number)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
