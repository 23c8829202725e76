"""Load a bundle and generate from it: the runtime's main path."""

import json
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError, Manifest, open_bundle
from coreinfer.bundles.layout import LAYOUT
from tokenizers import Tokenizer

from .chat import check_messages, render_chat, routing_text
from .decoder import DENSE, Decoder, FfnChoice
from .engines import CudaGraphs, EngineName, Weights, load_decoder
from .generation import MODES, FinishReason, Generation, Mode, Token
from .planning import ModePlan, decode_choice, plan_mode
from .router import Route, Router
from .sampling import Sampler, SamplingParams
from .text import TextStream

__all__ = ["Engine", "load"]

Prompt = str | Sequence[Mapping[str, str]]
T = TypeVar("T")


def load(
    bundle_dir: str | Path,
    *,
    engine: EngineName = "auto",
    device: str = "auto",
    mode: Mode = "auto",
    threads: int | None = None,
    dtype: str = "auto",
    isa: str = "auto",
    gpu_memory_mb: float | None = None,
    cuda_graphs: CudaGraphs = "auto",
    weights: Weights = "auto",
) -> "Engine":
    """Open a bundle, check it, and make it ready to generate.

    Everything is checked at once but the contents of cluster packs, each of which is hashed when it is first used.

    Args:
        bundle_dir: a folder that coreinfer-compile wrote.
        engine: "native" (C++, CPU), "torch" (any device), or "auto": native, but torch where there is a GPU or where
            `device` or `dtype` asks for it.
        device: a torch device, or "auto" for a GPU when there is one.
        mode: how FFN weights are chosen when `generate` is not told.
        threads: CPU threads; None for one a core.
        dtype: of the torch engine: "bfloat16", "float32", or "auto" for bfloat16 where the device computes it natively.
        isa: kernels of the native engine, such as "avx2"; "auto" for COREINFER_ISA, else the best that the CPU has.
        gpu_memory_mb: of the torch engine: megabytes of weights and KV cache on the GPU; None for what is free. Where
            the dense FFN does not fit, its layers are streamed while a prompt is read (docs/gpu.md).
        cuda_graphs: of the torch engine: decode in recorded steps of fixed shapes; "auto" on a GPU.
        weights: of the torch engine: "packed" multiplies by int4 weights as they are, "bfloat16" unpacks them; "auto"
            is packed for int4 on a GPU that can.
    Raises:
        BundleError: there is no bundle, or it is damaged; all damaged files are named.
        ConfigError: an argument is wrong, or the engine's packages are not installed.
        UnsupportedModelError: engine "native" does not compute this model.
    """
    _check_choice("mode", mode, MODES)
    _check_choice("engine", engine, get_args(EngineName))
    _check_choice("cuda_graphs", cuda_graphs, get_args(CudaGraphs))
    _check_choice("weights", weights, get_args(Weights))
    bundle = open_bundle(bundle_dir, lazy_packs=True)
    decoder = load_decoder(
        bundle,
        engine=engine,
        device=device,
        threads=threads,
        dtype=dtype,
        isa=isa,
        gpu_memory_mb=gpu_memory_mb,
        cuda_graphs=cuda_graphs,
        weights=weights,
    )
    return Engine(bundle, decoder, mode=mode)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A prompt that was read: its token ids, where it belongs, and how it is decoded."""

    token_ids: list[int]
    route: Route
    plan: ModePlan
    start_seconds: float


class Engine:
    """A loaded bundle. One generation runs at a time."""

    def __init__(self, bundle: Bundle, decoder: Decoder, *, mode: Mode = "auto") -> None:
        """Put an engine together; `load` is the way to get one."""
        self.bundle = bundle
        self.decoder = decoder
        self.mode: Mode = mode
        self.router = Router(bundle)
        self.tokenizer = _parse(bundle, LAYOUT.tokenizer, Tokenizer.from_str)
        self.chat_template = _parse(bundle, LAYOUT.chat_template, str) if bundle.has(LAYOUT.chat_template) else None
        self.eos_token_ids, self.special_tokens = _parse(bundle, LAYOUT.generation, _generation_defaults)
        self._busy = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        mode: Mode | None = None,
    ) -> Generation:
        """Generate text; the arguments are those of `stream`.

        Returns:
            The text, its token ids, and what was measured.
        """
        tokens = list(
            self.stream(
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop=stop,
                mode=mode,
            )
        )
        return collect(tokens)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        mode: Mode | None = None,
    ) -> Generator[Token, None, None]:
        """Generate token by token.

        Args:
            prompt: text to continue as it is, or chat messages ({"role", "content"}) for the chat template.
            max_new_tokens: decode at most so many tokens.
            temperature: 0 for greedy decoding.
            top_k, top_p, min_p: cut the distribution, in this order; 0, 1 and 0 leave it whole.
            repetition_penalty: above 1 makes tokens that came before less likely.
            seed: of sampling; the same seed gives the same text.
            stop: texts that end the generation; they are not part of it.
            mode: how FFN weights are chosen; None for the engine's own.
        Yields:
            A `Token` for each token; the last has a finish reason.
        Raises:
            ConfigError: an argument is wrong, the prompt is too long, or another generation is running.
        """
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected a whole number of at least 1, got {max_new_tokens!r}")
        _check_choice("mode", mode or self.mode, MODES)
        text = TextStream(self.tokenizer, stop)
        request = self._read(prompt, mode or self.mode)
        sampler = Sampler(params, request.token_ids)
        # Arguments are checked when `stream` is called, not when its first token is asked for.
        return self._decode(request, sampler, text, max_new_tokens)

    def _read(self, prompt: Prompt, mode: Mode) -> _Request:
        """Tokenize and route a prompt, and settle the mode."""
        start = time.perf_counter()
        if prompt == "":
            # Many tokenizers begin a text with a token of its own, so that this would be a prompt of 1 token.
            raise ConfigError("prompt: expected text or messages, got an empty text")
        if isinstance(prompt, str):
            source, token_ids = prompt, self._encode(prompt, add_special_tokens=True)
        else:
            check_messages(prompt)
            source, token_ids = routing_text(prompt), self.prompt_ids(prompt)
        limit = self.manifest.model.max_positions
        if not 0 < len(token_ids) < limit:
            raise ConfigError(f"prompt: expected 1 to {limit - 1} tokens, got {len(token_ids)}")
        route = self.router.route(source)
        plan = plan_mode(mode, self.manifest, route, len(token_ids))
        return _Request(token_ids=token_ids, route=route, plan=plan, start_seconds=start)

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template.

        Raises:
            ConfigError: the model has no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise ConfigError(f"{self.manifest.model.name} has no chat template; give the prompt as text")
        text = render_chat(self.chat_template, messages, special_tokens=self.special_tokens)
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # Python keeps bytes of the command line that are not UTF-8 as halves of surrogate pairs.
            raise ConfigError(f"prompt: expected Unicode text, got half a character at {error.start}") from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _decode(
        self, request: _Request, sampler: Sampler, text: TextStream, max_new_tokens: int
    ) -> Generator[Token, None, None]:
        if not self._busy.acquire(blocking=False):
            raise ConfigError(
                "another generation is running on this engine; finish or close it, or load a second engine"
            )
        try:
            logits = self._prefill(request, greedy=sampler.greedy)
            prefill_seconds = time.perf_counter() - request.start_seconds
            decode_start = time.perf_counter()
            room = self.manifest.model.max_positions - len(request.token_ids)
            last = min(max_new_tokens, room)
            for number in range(1, last + 1):
                token_id = sampler.sample(logits[-1])
                piece, reason = self._advance(text, token_id, is_last=number == last)
                yield self._token(
                    request,
                    token_id,
                    piece,
                    number=number,
                    prefill_seconds=prefill_seconds,
                    decode_seconds=time.perf_counter() - decode_start,
                    reason=reason,
                )
                if reason:
                    return
                logits = self.decoder.forward([token_id], greedy=sampler.greedy)
        finally:
            self._busy.release()

    def _prefill(self, request: _Request, *, greedy: bool) -> npt.NDArray[np.float32]:
        """Read the prompt, with the dense FFN where there is one, and put the decoding weights in place."""
        self.decoder.truncate(0)
        self.decoder.use(
            DENSE if self.bundle.dense else decode_choice(request.plan, request.route, self.bundle, None, 0)
        )
        # The pack comes while the prompt is read; it may take the place of the last generation's, now out of use.
        if request.plan.mode == "similarity":
            self.decoder.prepare(FfnChoice(cluster=request.route.cluster))
        statistic = None
        if request.plan.needs_statistic:
            selection = self.manifest.plan.selection
            logits, statistics = self.decoder.prompt_statistics(request.token_ids, (selection,))
            statistic = statistics[selection]
        else:
            logits = self.decoder.forward(request.token_ids, greedy=greedy)
        self.decoder.use(decode_choice(request.plan, request.route, self.bundle, statistic, len(request.token_ids)))
        return logits

    def _advance(self, text: TextStream, token_id: int, *, is_last: bool) -> tuple[str, FinishReason | None]:
        """Turn a token into text, and say whether the generation ends with it."""
        if token_id in self.eos_token_ids:
            return text.flush(), "stop"
        piece = text.push(token_id)
        if is_last and not text.stopped:
            # What was held back may complete a stop string.
            piece += text.flush()
            return piece, "stop" if text.stopped else "length"
        return piece, "stop" if text.stopped else None

    def _token(
        self,
        request: _Request,
        token_id: int,
        piece: str,
        *,
        number: int,
        prefill_seconds: float,
        decode_seconds: float,
        reason: FinishReason | None,
    ) -> Token:
        return Token(
            token_id=token_id,
            text=piece,
            cluster=request.route.cluster,
            cluster_label=self.manifest.clusters[request.route.cluster].label,
            distance=request.route.distance,
            familiar=request.route.familiar,
            mode=request.plan.mode,
            num_prompt_tokens=len(request.token_ids),
            num_tokens=number,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            finish_reason=reason,
        )


def collect(tokens: Sequence[Token]) -> Generation:
    """Put the tokens of a finished stream together."""
    last = tokens[-1]
    assert last.finish_reason is not None
    return Generation(
        text="".join(token.text for token in tokens),
        token_ids=tuple(token.token_id for token in tokens),
        cluster=last.cluster,
        cluster_label=last.cluster_label,
        distance=last.distance,
        familiar=last.familiar,
        mode=last.mode,
        num_prompt_tokens=last.num_prompt_tokens,
        prefill_seconds=last.prefill_seconds,
        decode_seconds=last.decode_seconds,
        decode_tokens_per_second=last.decode_tokens_per_second,
        finish_reason=last.finish_reason,
    )


def _parse(bundle: Bundle, name: str, parse: Callable[[str], T]) -> T:
    try:
        return parse(bundle.read_bytes(name).decode())
    except Exception as error:
        # tokenizers raises bare Exceptions.
        raise BundleCorrupt(f"{bundle.path / name}: cannot be parsed ({error}); compile the bundle again") from error


def _generation_defaults(text: str) -> tuple[frozenset[int], dict[str, str]]:
    """Read the tokens that end a text, and the special tokens that a chat template may name."""
    data = json.loads(text)
    eos_token_ids = frozenset(int(token_id) for token_id in data["eos_token_ids"])
    return eos_token_ids, {str(name): str(token) for name, token in data["special_tokens"].items()}


def _check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: expected {', '.join(allowed)}, got {value!r}")
