"""The native engine: decoding on the CPU with packed weights, without torch."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError, CoreInferError, UnsupportedModelError
from coreinfer.bundles.contract import kept_experts
from coreinfer.bundles.formats import NEURON_FORMAT
from coreinfer.bundles.shared.machine import usable_cores
from coreinfer.bundles.statistics import Selection
from coreinfer.runtime.engines.cached import CachedTokens
from coreinfer.runtime.engines.kv_limits import count_pages
from coreinfer.runtime.engines.prompt_sums import PromptSums
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice, KvPoolFull
from coreinfer.runtime.generation import DiskReads
from coreinfer.runtime.load_options import InputSkipping

from . import _native
from .memory_plan import MemoryPlan, plan_memory
from .residency import disk_reads, hold_base, weight_sizes
from .skipping import Skipping

__all__ = ["NativeDecoder"]

Floats = npt.NDArray[np.float32]


class NativeDecoder:
    """Runs a bundle's mapped weights in place; changing the FFN is a pointer swap."""

    name = "native"
    block_tokens: int = _native.BLOCK_TOKENS
    page_tokens: int = _native.PAGE_TOKENS
    calls_alike = True
    cheap_swaps = True

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        isa: str = "auto",
        kv_cache_bytes: int | None = None,
        memory_bytes: int | None = None,
        input_skipping: InputSkipping = "auto",
    ) -> None:
        """Put the model together; nothing is copied but norms, and weights of which tokens leave inputs out.

        Args:
            threads: None for one a physical core that the process may use, see `usable_cores`.
            isa: kernels to use, one of `_native.available_isas()`; "auto" for COREINFER_ISA, else the best ones.
            kv_cache_bytes: bound of all sequences' keys and values, taken page by page; see `count_pages`.
            memory_bytes: bound of weights in memory, reads and KV cache together; None for none. See memory_plan.py.
            input_skipping: what token shares leave out; see `LoadOptions`.
        Raises:
            ConfigError: the CPU has no such kernels, the number of threads is wrong, or the KV cache is too small.
            BundleCorrupt: the base does not hold what the model needs.
            UnsupportedModelError: the native engine does not compute this model.
        """
        self._bundle = bundle
        model = bundle.manifest.model
        num_threads = usable_cores() if threads is None else threads
        isa = os.environ.get("COREINFER_ISA") or "auto" if isa == "auto" else isa
        if not 1 <= num_threads <= _MAX_THREADS:
            raise ConfigError(f"threads: expected 1 to {_MAX_THREADS}, got {threads!r}")
        if isa not in ("auto", *_native.available_isas()):
            known = ", ".join(_native.available_isas())
            raise ConfigError(f"isa (or COREINFER_ISA): expected auto, {known} on this CPU, got {isa!r}")

        plans: list[MemoryPlan] = []

        def num_pages(page_bytes: int, table_bytes: tuple[int, int]) -> int:
            limit = kv_cache_bytes
            if memory_bytes is not None:
                plans.append(plan_memory(memory_bytes, weight_sizes(bundle, page_bytes, *table_bytes), kv_cache_bytes))
                limit = plans[0].kv_cache
            return count_pages(limit, page_bytes=page_bytes, max_positions=model.max_positions)

        with _corrupt(bundle, "base"):
            # The native module knows the families: see assembly/families.cpp.
            self._record = json.dumps(asdict(model), allow_nan=False)
            self._model = _native.Model(
                self._record, str(bundle.base.path), bundle.base.mapped_bytes, isa, num_threads, num_pages
            )
        self._residency = hold_base(bundle, self._model, plans[0]) if plans else None
        self._ffns: dict[int | None, Any] = {}
        self._loading = threading.Lock()
        self._choice: FfnChoice | None = None
        self._records = {0: CachedTokens()}
        self.sequence = 0
        self._skipping = Skipping(bundle, input_skipping, limited=memory_bytes is not None)
        # Packs of a bundle that is elsewhere come when a prompt needs them.
        if bundle.dense or 0 in bundle.mapped:
            self.use(DENSE if bundle.dense else FfnChoice(cluster=0))

    @property
    def device(self) -> str:
        """Where it runs: always the CPU."""
        return "cpu"

    @property
    def isa(self) -> str:
        """Name of the kernels in use, such as "avx512vnni"."""
        return str(self._model.isa)

    @property
    def num_threads(self) -> int:
        """Threads that decode together."""
        return int(self._model.num_threads)

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache, for all sequences together."""
        return self._model.num_pages

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has; see `Decoder.num_free_pages`."""
        return self._model.num_free_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of a page's keys and values."""
        return self._model.page_bytes

    @property
    def wide_layers(self) -> list[int]:
        """Layers whose keys and values are kept in float32, because fp16 does not hold them."""
        return self._model.wide_layers

    @property
    def gathers(self) -> bool:
        """Whether a prompt's own neurons can be gathered: they come from a dense FFN that is in memory."""
        return self._residency is None

    @property
    def token_shares_pay(self) -> bool:
        """Whether tokens leave inputs out; see `LoadOptions.input_skipping`. Not known before an FFN is in use."""
        return self._choice is not None and self._skipping.is_on(self._model)

    @property
    def disk_reads(self) -> DiskReads | None:
        """What was read from disk since the bundle was loaded; None where memory is not limited."""
        return disk_reads(self._model)

    @property
    def num_cached(self) -> int:
        """Tokens in the KV cache."""
        return self._model.num_cached(self.sequence)

    @property
    def cached(self) -> CachedTokens:
        """Which tokens are in the KV cache of the selected sequence."""
        return self._records[self.sequence]

    def bytes_per_token(self, num_cached: int, *, greedy: bool = False) -> int:
        """Bytes of weights and of `num_cached` tokens' keys and values that the next token reads at least.

        With `greedy` of a screened head what is read for all tokens; what is scored again is not counted.
        """
        return int(self._model.bytes_per_token(num_cached, greedy))

    @property
    def skips_neurons(self) -> bool:
        """Whether the bundle's FFN is stored neuron by neuron."""
        return self._bundle.manifest.quantization["ffn"].format == NEURON_FORMAT

    def weight_bytes(self, *, greedy: bool, alone: bool) -> int | None:
        """Bytes of weights that the last pass over decoded tokens read; see `Decoder.weight_bytes`."""
        return int(self._model.bytes_per_token(0, greedy, alone))

    def prepare(self, choice: FfnChoice) -> None:
        """Have a pack read ahead; under a limit, into the place of the pack that decodes no more."""
        if self._residency is not None:
            # A pack is hashed when it is first used, which takes as long as some tokens.
            threading.Thread(target=self._announce, args=(choice.cluster,), daemon=True).start()
        elif choice.cluster is not None:
            self._bundle.prefetch(choice.cluster)

    def use(self, choice: FfnChoice) -> None:
        """Run with other FFN weights from the next token on.

        Raises:
            ConfigError: the choice needs the dense FFN and the bundle has none.
            BundleCorrupt: the pack is damaged.
        """
        if choice.neuron_ids is None and choice == self._choice:
            return
        if choice.neuron_ids is not None and not self.gathers:
            raise ConfigError("memory_mb: a prompt's own neurons need the whole dense FFN in memory; use packs")
        ffn = self._ffn(choice.cluster)
        if choice.neuron_ids is not None:
            ffn = self._model.gather(ffn, list(choice.neuron_ids))
        self._model.use(ffn)
        self._choice = choice
        if choice.token_share < 1 and self.token_shares_pay:
            self._model.use(ffn, self._skipping.thresholds(choice))

    def _announce(self, cluster: int | None) -> None:
        with suppress(CoreInferError):  # what is wrong with a pack is said to whoever uses it
            self._model.announce(self._ffn(cluster))

    def _ffn(self, cluster: int | None) -> Any:
        """The weights of a cluster, or with None of the dense FFN, ready to be pointed at."""
        with self._loading:
            return self._loaded_ffn(self._bundle.weights_of(cluster))

    def _loaded_ffn(self, cluster: int | None) -> Any:
        if cluster not in self._ffns:
            manifest = self._bundle.manifest
            if cluster is None or manifest.model.experts is None or manifest.narrows_experts:
                self._ffns[cluster] = self._read_ffn(cluster)
            else:
                self._ffns[cluster] = self._some_experts(cluster)
        return self._ffns[cluster]

    def _some_experts(self, cluster: int) -> Any:
        """Those of the dense FFN's experts that a pack names."""
        every, pack = self._loaded_ffn(None), self._bundle.pack(cluster)
        with _corrupt(self._bundle, pack.path.name):
            return every.keeping(kept_experts(pack, self._bundle.manifest))

    def _read_ffn(self, cluster: int | None) -> Any:
        manifest = self._bundle.manifest
        if cluster is not None:
            file, num_neurons = self._bundle.pack(cluster), manifest.clusters[cluster].layer_budgets
        elif self._bundle.dense is not None:
            file, num_neurons = self._bundle.dense, (manifest.model.ffn_dim,) * manifest.model.num_layers
        else:
            raise ConfigError(f"bundle {self._bundle.path} has no dense FFN; compile it with --dense or use a cluster")
        read = _native.Ffn if manifest.model.experts is None else _native.Ffn.of_experts
        with _corrupt(self._bundle, file.path.name):
            ffn = read(self._record, str(file.path), file.mapped_bytes, num_neurons)
            return ffn if self._residency is None else self._residency.in_layers(ffn, file)

    def truncate(self, num_tokens: int) -> None:
        """Keep only the first tokens; see `Decoder.truncate`."""
        self._model.truncate(num_tokens, self.sequence)
        self.cached.truncate(num_tokens)

    def add_sequence(self) -> int:
        """Begin another sequence; see `Decoder.add_sequence`."""
        number = self._model.add_sequence()
        self._records[number] = CachedTokens()
        return number

    def fork_sequence(self, source: int, num_tokens: int) -> int:
        """Begin another sequence with the first tokens of one that is there; see `Decoder.fork_sequence`."""
        try:
            number = self._model.fork_sequence(source, num_tokens)
        except _REFUSALS as error:
            raise _refusal(error) from error
        self._records[number] = self._records[source].fork(num_tokens)
        return number

    def drop_sequence(self, sequence: int) -> None:
        """Free a sequence's pages; see `Decoder.drop_sequence`."""
        try:
            self._model.drop_sequence(sequence)
        except _REFUSALS as error:
            raise _refusal(error) from error
        del self._records[sequence]
        if sequence == self.sequence:
            self.sequence = 0

    def select(self, sequence: int) -> None:
        """Choose the sequence to work on; see `Decoder.select`."""
        try:
            self._model.num_cached(sequence)
        except _REFUSALS as error:
            raise _refusal(error) from error
        self.sequence = sequence

    def forward(self, token_ids: Sequence[int], *, all_logits: bool = False, greedy: bool = False) -> Floats:
        """Append tokens to the KV cache; see `Decoder.forward`.

        With `greedy` an int8 head is screened: tokens that can hardly be the likeliest are scored by the high halves
        of the weights only.

        Raises:
            ConfigError: a token id is out of range, or there is no position left.
            KvPoolFull: too few pages are free.
        """
        return self._forward(token_ids, all_logits=all_logits, greedy=greedy, watcher=None)

    def forward_rows(self, sequences: Sequence[int], token_ids: Sequence[int], *, greedy: bool = False) -> Floats:
        """Append tokens to several sequences in one pass over the weights; see `Decoder.forward_rows`.

        A row's logits are bit-identical to those of `forward` for the token alone; `greedy` screens the head as there.

        Raises:
            ConfigError: there is no such sequence, a token id is out of range, or there is no position left.
            KvPoolFull: too few pages are free.
        """
        try:
            rows, ids = np.asarray(sequences, dtype=np.int32), np.asarray(token_ids, dtype=np.int32)
            logits = self._model.forward_rows(rows, ids, greedy)
        except _REFUSALS as error:
            raise _refusal(error) from error
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            self._records[sequence].append([token_id], self._choice)
        return logits

    def forward_beside(
        self,
        block_ids: Sequence[int],
        sequences: Sequence[int],
        token_ids: Sequence[int],
        *,
        last_logits: bool,
        greedy: bool = False,
    ) -> Floats:
        """Read a block of a prompt and a token of each of several sequences; see `Decoder.forward_beside`.

        Raises:
            ConfigError: a block of one token, and what `forward_rows` refuses.
            KvPoolFull: too few pages are free.
        """
        try:
            block, rows, ids = (np.asarray(numbers, dtype=np.int32) for numbers in (block_ids, sequences, token_ids))
            logits = self._model.forward_beside(self.sequence, block, last_logits, rows, ids, greedy)
        except _REFUSALS as error:
            raise _refusal(error) from error
        self.cached.append(block_ids, self._choice)
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            self._records[sequence].append([token_id], self._choice)
        return logits

    def prompt_statistics(
        self, token_ids: Sequence[int], selections: Sequence[Selection]
    ) -> tuple[Floats, dict[Selection, Floats]]:
        """Append a prompt and sum its FFN activations; see `Decoder.prompt_statistics`."""
        sums = PromptSums(self._bundle.manifest, selections)
        return self._forward(token_ids, all_logits=False, greedy=False, watcher=sums.add), sums.statistics

    def _forward(
        self,
        token_ids: Sequence[int],
        *,
        all_logits: bool,
        greedy: bool,
        watcher: Callable[[int, int, Floats, Floats | None], None] | None,
    ) -> Floats:
        try:
            ids = np.asarray(token_ids, dtype=np.int32)
            logits = self._model.forward(ids, all_logits, greedy, watcher, self.sequence)
        except _REFUSALS as error:
            raise _refusal(error) from error
        self.cached.append(token_ids, self._choice)
        return logits


_MAX_THREADS = 256
# What the native module raises. It is caught in place: a context manager takes several microseconds of every token.
_REFUSALS = (RuntimeError, ValueError, OverflowError)


def _refusal(error: RuntimeError | ValueError | OverflowError) -> CoreInferError:
    """Turn what the native module refuses into an error of the package."""
    if isinstance(error, (ValueError, OverflowError)):
        return ConfigError(str(error))
    if isinstance(error, _native.PoolFull):
        return KvPoolFull(f"{error}; raise kv_cache_mb, or let other generations end")
    return CoreInferError(str(error))


@contextmanager
def _corrupt(bundle: Bundle, part: str) -> Iterator[None]:
    """Turn what the native module refuses into an error that names the bundle."""
    try:
        yield
    except _native.NoAddressSpace as error:
        raise ConfigError(f"kv_cache_mb: {error}; give a smaller limit") from error
    except _native.Unsupported as error:
        raise UnsupportedModelError(f"{error}; use engine='torch'") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BundleCorrupt(f"bundle {bundle.path}: {part}: {error}; compile the bundle again") from error
