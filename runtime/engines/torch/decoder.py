"""The torch engine: any device and every family of the table, through transformers."""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles import Bundle, ConfigError, CoreInferError
from coreinfer.bundles.families import cache_argument, family_by_name
from coreinfer.bundles.statistics import Selection
from coreinfer.runtime.engines.cached import CachedTokens
from coreinfer.runtime.engines.kv_limits import PAGE_TOKENS, count_pages, pages_of
from coreinfer.runtime.engines.prompt_sums import PromptSums
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice, KvPoolFull
from coreinfer.runtime.load_options import InputSkipping
from torch import nn

from .column_choice import pick_columns
from .host_weights import FfnReader, HostWeights
from .input_masks import make_masks
from .memory_plan import kv_bytes_per_token
from .model import (
    decoder_layers,
    empty_model,
    fill_model,
    pick_device,
    pick_dtype,
    watch_activations,
)
from .needs import device_needs, plan_device
from .packed_linear import pick_packed
from .placement import DevicePlacement, MappedPlacement, Placement
from .sequences import TorchSequences
from .static_step import StaticStep, pick_static
from .transfer import Transfer, needed_transfer

__all__ = ["TorchDecoder", "device_needs"]

_log = logging.getLogger(__name__)


class TorchDecoder:
    """Runs the transformers model of a bundle, with FFN weights that change by pointer swap.

    On the CPU in bfloat16 the weights are the mapped file itself. A GPU holds the base, one pack, and the dense FFN
    where it fits; see `placement`.
    """

    name = "torch"
    block_tokens = 256
    page_tokens = PAGE_TOKENS
    calls_alike = False
    disk_reads = None
    gathers = True
    cheap_swaps = False  # on a GPU, which holds one pack

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str,
        dtype: str,
        gpu_memory_mb: float | None = None,
        cuda_graphs: str = "auto",
        weights: str = "auto",
        kv_cache_bytes: int | None = None,
        input_skipping: InputSkipping = "auto",
        transfer: Transfer | None = None,
    ) -> None:
        """Build the model on the device.

        Args:
            gpu_memory_mb: maximum megabytes of weights and KV cache on the device; None for what is free. On the CPU,
                weights are then copied as they would be to a GPU, and the copies are limited.
            cuda_graphs: "on" decodes in steps of fixed shapes, recorded where the device is a GPU; "auto": on a GPU.
            weights: "packed" multiplies by int4 weights as they are, "bfloat16" unpacks them to `dtype`; "auto" is
                packed for int4 on a GPU that can.
            kv_cache_bytes: bound of all sequences' keys and values; see `count_pages`. A device may have less room.
            input_skipping: what token shares leave out; see `LoadOptions`.
            transfer: the seam to the device; None for the device's own.
        Raises:
            ConfigError: the device or an option cannot be had, or the weights do not fit.
            BundleCorrupt: the base does not hold what the model needs.
        """
        self._bundle, self._process_id = bundle, os.getpid()
        self._family = family_by_name(bundle.manifest.model.family)
        self._device = pick_device(device)
        self._dtype = pick_dtype(dtype, self._device)
        packed = pick_packed(bundle, weights, self._device, self._dtype)
        self._reader = FfnReader(
            bundle=bundle, family=self._family, dtype=self._dtype, device=self._device, packed=packed
        )
        self._model = empty_model(bundle, self._device, self._dtype, packed=packed)
        self._layers: list[nn.Module] = decoder_layers(self._model, self._family)
        self._kv_bytes_per_token = kv_bytes_per_token(bundle.manifest.model, self._dtype.itemsize)
        self._most_pages = count_pages(
            kv_cache_bytes, page_bytes=self._page_bytes, max_positions=bundle.manifest.model.max_positions
        )
        transfer = needed_transfer(self._device, asked=device, gpu_memory_mb=gpu_memory_mb, given=transfer)
        self._input_skipping = input_skipping
        self._has_columns = pick_columns(
            bundle,
            self._family,
            self._layers,
            input_skipping,
            device=self._device,
            dtype=self._dtype,
            packed=packed,
            limited=gpu_memory_mb is not None,
        )
        self._placement = self._place_weights(transfer, gpu_memory_mb)
        self._sequences = TorchSequences(self._pick_static(cuda_graphs, transfer))
        parts = self._layers, self._family, bundle, self._device, self._dtype
        self.masks = make_masks(*parts, packed=packed, has_columns=self._has_columns)
        self._choice: FfnChoice | None = None
        self.use(DENSE if bundle.dense else FfnChoice(cluster=0))

    def _place_weights(self, transfer: Transfer | None, gpu_memory_mb: float | None) -> Placement:
        """Fill the model's base, and decide where FFN weights live."""
        if transfer is None:
            if gpu_memory_mb is not None:
                raise ConfigError(f"gpu_memory_mb: expected a CUDA device, got device {str(self._device)!r}")
            fill_model(self._model, self._bundle, self._dtype, lambda tensor: tensor.to(self._device))
            return MappedPlacement(self._layers, self._family, self._reader)
        host = HostWeights(self._reader, transfer)
        needs, plan = plan_device(
            self._model,
            self._reader,
            columns=self._has_columns,
            required=self._input_skipping == "on",
            limit_mb=gpu_memory_mb,
            free_bytes=transfer.free_bytes(),
        )
        self._has_columns = needs.columns > 0
        if plan.stream_dense:
            _log.info("the dense FFN (%.0f MB) is streamed layer by layer", needs.dense / 1e6)

        def place(tensor: torch.Tensor) -> torch.Tensor:
            target = transfer.allocate("base", tensor.shape, tensor.dtype)
            transfer.wait(transfer.copy([(tensor, target)]))
            return target

        fill_model(self._model, self._bundle, self._dtype, place)
        return DevicePlacement(self._layers, self._family, host, transfer, plan, needs)

    def _pick_static(self, cuda_graphs: str, transfer: Transfer | None) -> StaticStep | None:
        record = self._bundle.manifest.model
        return pick_static(
            self._model,
            cuda_graphs,
            transfer,
            num_layers=record.num_layers,
            device=self._device,
            mixes=record.experts is not None,
            shares_caches=self._family.shared_caches_field is not None,
        )

    @property
    def device(self) -> str:
        """The torch device."""
        return str(self._device)

    @property
    def _page_bytes(self) -> int:
        return PAGE_TOKENS * self._kv_bytes_per_token

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache, for all sequences together."""
        room = self._placement.kv_room_bytes
        return self._most_pages if room is None else min(self._most_pages, max(room, 0) // self._page_bytes)

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has; see `Decoder.num_free_pages`."""
        return max(0, self.num_pages - self._sequences.num_pages)

    @property
    def num_cached(self) -> int:
        """Tokens in the KV cache of the selected sequence."""
        return self._sequences.num_cached

    @property
    def cached(self) -> CachedTokens:
        """Which tokens are in the KV cache of the selected sequence."""
        return self._sequences.record

    @property
    def sequence(self) -> int:
        """Number of the selected sequence."""
        return self._sequences.selected

    @property
    def token_shares_pay(self) -> bool:
        """Whether it goes by token shares: on most devices not to gain time, but as the reference."""
        return self._input_skipping != "off"

    @property
    def skips_neurons(self) -> bool:
        """Never: it computes with zeros."""
        return False

    def weight_bytes(self, *, greedy: bool, alone: bool) -> int | None:
        """Not counted: it computes with zeros and reads all, or would have to wait for the device's count."""
        return None

    def prepare(self, choice: FfnChoice) -> None:
        """Begin to load a pack that will soon be used; see `Decoder.prepare`."""
        self._placement.prepare(self._reader.weights_of(choice))

    def use(self, choice: FfnChoice) -> None:
        """Run with other FFN weights from the next token on.

        Raises:
            ConfigError: the choice needs the dense FFN and the bundle has none, there is no room on the device, or the
                bundle has no such token share.
            BundleCorrupt: the pack is damaged.
        """
        # Arrays do not compare as one, so neuron ids are always gathered.
        if choice.neuron_ids is None and choice == self._choice:
            return
        thresholds = self.masks.thresholds(choice)
        weights = self._reader.weights_of(choice)
        if self._choice is None or not weights.is_same(self._reader.weights_of(self._choice)):
            self._placement.use(weights)
        self.masks.use(choice, thresholds)
        self._choice = choice

    def truncate(self, num_tokens: int) -> None:
        """Keep only the first `num_tokens` tokens of the KV cache."""
        with torch.inference_mode():
            self._sequences.truncate(num_tokens)

    def add_sequence(self) -> int:
        """Begin another sequence; see `Decoder.add_sequence`."""
        return self._sequences.add()

    def fork_sequence(self, source: int, num_tokens: int) -> int:
        """Begin another sequence with a copy of the first tokens of one; see `Decoder.fork_sequence`."""
        most = self._sequences.length(source)
        if not 0 <= num_tokens <= most:
            raise ConfigError(f"num_tokens: expected 0 to {most} of the sequence, got {num_tokens}")
        self._need_pages(pages_of(num_tokens), self.num_free_pages)
        with torch.inference_mode():
            return self._sequences.fork(source, num_tokens)

    def _need_pages_to_extend(self, num_tokens: Mapping[int, int]) -> None:
        """Refuse to append tokens to sequences if too few pages are free; for a device `_make_room` knows more."""
        free = self._most_pages - self._sequences.num_pages
        self._need_pages(self._sequences.pages_to_extend(num_tokens), free)

    @staticmethod
    def _need_pages(num_needed: int, num_free: int) -> None:
        if num_needed > num_free:
            raise KvPoolFull(
                f"KV cache: expected {num_needed} free pages of {PAGE_TOKENS} tokens, got {num_free}; raise "
                "kv_cache_mb, or let other generations end"
            )

    def drop_sequence(self, sequence: int) -> None:
        """Free a sequence's memory; see `Decoder.drop_sequence`."""
        self._sequences.drop(sequence)

    def select(self, sequence: int) -> None:
        """Choose the sequence to work on; see `Decoder.select`."""
        self._sequences.select(sequence)

    def forward_rows(
        self, sequences: Sequence[int], token_ids: Sequence[int], *, greedy: bool = False
    ) -> npt.NDArray[np.float32]:
        """Append tokens to several sequences, one sequence after another; see `Decoder.forward_rows`.

        All logits are exact, `greedy` or not.
        """
        rows: dict[int, list[int]] = {}
        for row, sequence in enumerate(sequences):
            rows.setdefault(sequence, []).append(row)
        selected = self.sequence
        logits = np.empty((len(token_ids), self._bundle.manifest.model.vocab_size), dtype=np.float32)
        try:
            for sequence in rows:
                self.select(sequence)
            self._need_pages_to_extend({sequence: len(places) for sequence, places in rows.items()})
            for sequence, places in rows.items():
                self.select(sequence)
                logits[places] = self.forward([token_ids[row] for row in places], all_logits=True)
        finally:
            self.select(selected)
        return logits

    def forward_beside(
        self,
        block_ids: Sequence[int],
        sequences: Sequence[int],
        token_ids: Sequence[int],
        *,
        last_logits: bool,
        greedy: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Append a block of a prompt, then tokens to other sequences; see `Decoder.forward_beside`."""
        counts = Counter(sequences)
        counts[self.sequence] += len(block_ids)
        self._need_pages_to_extend(counts)
        block = self.forward(block_ids)
        rows = self.forward_rows(sequences, token_ids)
        return np.concatenate([block, rows]) if last_logits else rows

    def forward(
        self, token_ids: Sequence[int], *, all_logits: bool = False, greedy: bool = False
    ) -> npt.NDArray[np.float32]:
        """Append tokens to the KV cache; see `Decoder.forward`. All logits are exact, `greedy` or not.

        Raises:
            KvPoolFull: the KV cache would not fit next to the weights, or has too few free pages.
        """
        return self._append(token_ids, logits_to_keep=0 if all_logits else 1)

    def _append(
        self, token_ids: Sequence[int], *, logits_to_keep: int, watched: bool = False
    ) -> npt.NDArray[np.float32]:
        """Append tokens; returns logits (tokens or 1, vocabulary).

        Args:
            watched: hooks of the model are to run, which a recorded step leaves out.
        """
        with torch.inference_mode():
            logits = self._pass(token_ids, logits_to_keep=logits_to_keep, watched=watched)
        values: npt.NDArray[np.float32] = logits[0].float().cpu().numpy()
        self.cached.append(token_ids, self._choice)
        return values

    def _pass(self, token_ids: Sequence[int], *, logits_to_keep: int, watched: bool) -> torch.Tensor:
        if os.getpid() != self._process_id and (torch.get_num_threads() > 1 or self._device.type != "cpu"):
            # Torch would wait for threads that only the parent has.
            raise CoreInferError(
                "the torch engine cannot work in a forked process; start processes by 'spawn' and load the bundle in "
                "each, or use one thread (threads=1) or the native engine"
            )
        self._need_pages_to_extend({self.sequence: len(token_ids)})
        capacity = self._make_room(self.num_cached + len(token_ids))
        self._placement.settle()
        static = self._sequences.static
        if static is not None:
            static.reserve(capacity)
            addresses = self._placement.addresses
            if len(token_ids) == 1 and addresses is not None and not watched:
                return static.decode(token_ids[0], (addresses, self.masks.key))
        ids = torch.tensor([list(token_ids)], dtype=torch.long, device=self._device)
        if static is not None:
            return static.read(ids, logits_to_keep=logits_to_keep)
        cache = cache_argument(self._model, self._sequences.cache)
        output: Any = self._model(ids, **cache, use_cache=True, logits_to_keep=logits_to_keep)
        logits: torch.Tensor = output.logits
        return logits

    def _make_room(self, num_tokens: int) -> int:
        """Find out for how many tokens the selected sequence's KV cache is to have room.

        Raises:
            KvPoolFull: they do not fit next to the weights and the other sequences.
        """
        room, static = self._placement.kv_room_bytes, self._sequences.static
        elsewhere = self._sequences.num_elsewhere
        most = self._bundle.manifest.model.max_positions
        if room is not None:
            most = min(most, room // self._kv_bytes_per_token - elsewhere)
            if num_tokens > most and (num_tokens + elsewhere) * self._kv_bytes_per_token > room:
                raise KvPoolFull(
                    f"gpu_memory_mb: a KV cache of {num_tokens} tokens does not fit, there is room for {max(most, 0)} "
                    "beside the weights; raise it, or generate less"
                )
        capacity = num_tokens if static is None else static.capacity_for(num_tokens, most=most)
        self._placement.hold_kv((capacity + elsewhere) * self._kv_bytes_per_token)
        return capacity

    def prompt_statistics(
        self, token_ids: Sequence[int], selections: Sequence[Selection]
    ) -> tuple[npt.NDArray[np.float32], dict[Selection, npt.NDArray[np.float32]]]:
        """Append a prompt and sum its FFN activations; see `Decoder.prompt_statistics`."""
        sums = PromptSums(self._bundle.manifest, selections)

        with watch_activations(self._layers, self._family, sums.add):
            logits = self._append(token_ids, logits_to_keep=1, watched=True)
        return logits, sums.statistics
