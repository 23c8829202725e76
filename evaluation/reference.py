"""Models of other programs: the original in transformers, and llama.cpp's quantizations of it."""

import ctypes
import importlib
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import ConfigError
from coreinfer.bundles.shared.extras import require_package
from coreinfer.bundles.shared.machine import usable_cores
from coreinfer.bundles.shared.signals import signals_held

__all__ = [
    "LLAMACPP_FORMATS",
    "LlamaCppSubject",
    "TransformersSubject",
    "check_original",
    "gguf_path",
    "has_llamacpp",
]

_log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float32]

LLAMACPP_FORMATS = ("Q8_0", "Q4_K_M", "IQ4_XS", "Q4_0", "Q3_K_M")


def check_original(model: str) -> None:
    """Refuse what cannot be the original, in the forms of coreinfer-compile, before anything is loaded.

    Raises:
        CoreInferError: it is missing or not supported, or the packages that load it are not installed.
    """
    require_package("torch", "--against", "'coreinfer[compile]'")
    # Here, not above: evaluating bundles needs no compiler.
    from coreinfer.compiler.models.sources import find_source
    from coreinfer.compiler.models.stated import stated_config

    stated_config(find_source(model, option="--against"))


class TransformersSubject:
    """The original model in transformers, float32."""

    modes: tuple[str, ...] = ("original",)

    def __init__(self, model: str, *, threads: int | None) -> None:
        """Load a model, in the forms of coreinfer-compile.

        Raises:
            ConfigError: it is not available.
        """
        # Here, not above: evaluating bundles needs neither torch nor the compiler.
        with signals_held():
            import torch
            from coreinfer.compiler.models.load import load_model, read_config
            from coreinfer.compiler.models.sources import find_source

        torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))
        source = find_source(model, option="--against")
        family, config = read_config(source)
        self._loaded = load_model(source, family, config, device="cpu", dtype="float32")
        self.name = source.name
        self.vocab_size = self._loaded.record.vocab_size
        self._prefix_length = 0
        self._cache: Any = None

    def bytes_per_token(self, mode: str) -> int | None:
        """2 bytes per weight: the model would run in bf16."""
        record, parameters = self._loaded.record, self._loaded.model.parameters()
        embedding = 0 if record.tied_head else record.vocab_size * record.hidden_size
        return 2 * (sum(parameter.numel() for parameter in parameters) - embedding)

    def read(self, prefix_ids: Sequence[int], routing_text: str) -> None:
        """Read the prefix."""
        from transformers import DynamicCache

        self._cache = DynamicCache()
        self._prefix_length = len(prefix_ids)
        if prefix_ids:
            self.append(prefix_ids)

    def begin(self, mode: str) -> None:
        """Go back to the end of the prefix."""
        if (extra := self._cache.get_seq_length() - self._prefix_length) > 0:
            self._cache.crop(-extra)

    def append(self, token_ids: Sequence[int], *, all_logits: bool = False, greedy: bool = False) -> Floats:
        """Append tokens; returns logits as `Decoder.forward` does."""
        import torch

        with torch.inference_mode():
            logits = self._loaded.forward(torch.tensor([list(token_ids)]), self._cache)[0]
        return np.asarray((logits if all_logits else logits[-1:]).float().numpy())


def has_llamacpp() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def gguf_path(model: str) -> Path | None:
    """The GGUF file behind a model argument, or None where it is none."""
    from coreinfer.compiler.models.sources import find_source

    source = find_source(model, option="--against")
    return source.path if source.gguf_file else None


class LlamaCppSubject:
    """One of llama.cpp's quantizations of a GGUF file, made temporarily."""

    def __init__(self, source: Path, kind: str, folder: Path, *, room: int, threads: int | None) -> None:
        """Quantize the file into `folder` and load it.

        Args:
            kind: such as "Q4_0"; the file's own quantization is undone first.
            room: tokens that the KV cache holds.
        Raises:
            ConfigError: llama.cpp refuses.
        """
        llama_cpp = importlib.import_module("llama_cpp")
        path = folder / f"{source.stem}-{kind}.gguf"
        silence(llama_cpp)
        _quantize(llama_cpp, source, kind, path)
        self.name = f"llama.cpp {kind}"
        self.modes: tuple[str, ...] = ("",)
        self._llama = llama_cpp.Llama(
            model_path=str(path), n_ctx=room, n_batch=min(room, 512), n_threads=threads, logits_all=True, verbose=False
        )
        self.vocab_size = int(self._llama.n_vocab())
        self._num_bytes = _read_bytes(path)
        self._prefix_length = 0

    def bytes_per_token(self, mode: str) -> int | None:
        """Bytes of all tensors but an embedding that is not the head too."""
        return self._num_bytes

    def read(self, prefix_ids: Sequence[int], routing_text: str) -> None:
        """Read the prefix."""
        self._llama.reset()
        self._prefix_length = len(prefix_ids)
        if prefix_ids:
            self._llama.eval(list(prefix_ids))

    def begin(self, mode: str) -> None:
        """Go back to the end of the prefix: what lies beyond is dropped by the next call."""
        self._llama.n_tokens = self._prefix_length

    def append(self, token_ids: Sequence[int], *, all_logits: bool = False, greedy: bool = False) -> Floats:
        """Append tokens; returns logits as `Decoder.forward` does."""
        first = self._llama.n_tokens
        self._llama.eval(list(token_ids))
        last = self._llama.n_tokens
        return np.array(self._llama.scores[first if all_logits else last - 1 : last], dtype=np.float32)


def silence(llama_cpp: Any) -> None:
    """Keep llama.cpp's own remarks off stderr, which are four lines per tensor."""
    # The callback has to outlive all calls, so the module keeps it.
    if not hasattr(llama_cpp, "_coreinfer_silent"):
        llama_cpp._coreinfer_silent = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(llama_cpp._coreinfer_silent, ctypes.c_void_p(0))


def _quantize(llama_cpp: Any, source: Path, kind: str, path: Path) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)) != 0:
        raise ConfigError(f"--against: llama.cpp cannot quantize {source.name} to {kind}; use --no-llamacpp")


def _read_bytes(path: Path) -> int:
    gguf = importlib.import_module("gguf")
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(str(path)).tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight")
    return sum(sizes.values())
