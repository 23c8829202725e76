"""What is evaluated: anything that reads a prefix and continues it, in one or several modes."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import ConfigError
from coreinfer.bundles.statistics import SELECTIONS, Selection
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.bundles.token_shares import default_share, mean_ffn_bytes, mean_share
from coreinfer.runtime import load
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.generation import Mode
from coreinfer.runtime.load_options import Arithmetic, EngineName, InputSkipping
from coreinfer.runtime.routing.modes import ModePlan, decode_choice
from coreinfer.runtime.routing.own_neurons import any_neurons, choose_neurons, equal_budgets, prompt_scores
from coreinfer.runtime.routing.token_shares import check_token_share

__all__ = ["MODES", "BundleSubject", "Subject"]

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]

PACK_PROMPT = "pack-prompt"
"""Mode similarity, whose prompts are read with the pack too (`GenerationOptions.prompt_ffn`)."""
MODES = ("dense", "similarity", PACK_PROMPT, "stability", "fused", "random", "griffin", "coreinfer")
"""How a bundle's FFN weights are chosen: the runtime's modes, and controls at the same bytes: a pack by chance, and
GRIFFIN's (arXiv 2404.01365) and the paper's stability-guided (arXiv 2410.18311) choice by the prompt, unrepaired."""

_OF_PROMPTS = ("stability", "fused", "griffin", "coreinfer")
"""Modes in which a prompt chooses its own neurons."""
_STATISTICS: dict[str, Selection] = {"griffin": "griffin", "coreinfer": "coreinfer"}


class Subject(Protocol):
    """A model that is evaluated.

    Attributes:
        name: in the tables.
        modes: the ways it is run; each is a row.
        vocab_size: of its logits.
    """

    name: str
    modes: tuple[str, ...]
    vocab_size: int

    def bytes_per_token(self, mode: str) -> int | None:
        """Bytes of weights that one decoded token reads; None where unknown."""

    def read(self, prefix_ids: Sequence[int], routing_text: str) -> None:
        """Begin a text: read its prefix as the runtime reads prompts, dense where there is a dense FFN.

        Args:
            prefix_ids: may be empty.
            routing_text: what the runtime would see of the text.
        """

    def begin(self, mode: str) -> None:
        """Go back to the end of the prefix, and put a mode's weights in place."""

    def append(self, token_ids: Sequence[int], *, all_logits: bool = False, greedy: bool = False) -> Floats:
        """Append tokens; returns logits as `Decoder.forward` does."""


class BundleSubject:
    """A bundle in the runtime's own engine, in several modes."""

    def __init__(
        self,
        bundle_dir: Path,
        *,
        modes: Sequence[str],
        engine: EngineName = "auto",
        dtype: Arithmetic = "auto",
        threads: int | None = None,
        memory_mb: float | None = None,
        token_shares: Sequence[float] = (),
    ) -> None:
        """Load a bundle.

        Args:
            modes: of `MODES`; those that this bundle cannot have (no dense FFN, one cluster only) are left out, and
                named in the log.
            token_shares: at which dense and similarity are run too; none for the bundle's own, where it has any.
        Raises:
            BundleError: there is no bundle, or it is damaged.
            ConfigError: none of the modes is left.
        """
        # What a share costs is measured on machines that do not gain by it, too.
        skipping: InputSkipping = "auto" if memory_mb is not None else "masked"
        self.engine = load(
            bundle_dir, engine=engine, dtype=dtype, threads=threads, memory_mb=memory_mb, input_skipping=skipping
        )
        self.name = bundle_dir.name
        self.vocab_size = self.engine.manifest.model.vocab_size
        self.modes = tuple(mode for mode in modes if self._has(mode))
        if not self.modes:
            known = ", ".join(mode for mode in MODES if self._has(mode))
            raise ConfigError(f"bundle {bundle_dir}: expected modes of {known}, got {', '.join(modes)}")
        if lacking := [mode for mode in modes if mode not in self.modes]:
            _log.warning("bundle %s: left out modes that it cannot have: %s", bundle_dir, ", ".join(lacking))
        self._shares = {
            f"{mode}, {f'share {share:g}' if share is not None else 'own shares'}": (mode, share)
            for mode in self.modes
            for share in token_shares or self._own_share(mode)
            if mode in ("dense", "similarity")
        }
        self._check_shares()
        if self._shares and not self.engine.manifest.pack_files:
            # A thin cluster that reads all is the dense FFN.
            self.modes = tuple(mode for mode in self.modes if mode != "similarity")
        self.modes += tuple(self._shares)
        self._prefix: list[int] = []
        self._read_with = DENSE
        self._text = ""
        self._statistics: dict[Selection, Floats] = {}

    def _own_share(self, mode: str) -> tuple[float | None, ...]:
        """The bundle's share; None where clusters have different ones, of which each text's counts."""
        record = self.engine.manifest.token_shares
        if record is None or not self.engine.decoder.token_shares_pay:
            return ()
        if mode != "dense" and len(set(record.clusters)) > 1:
            return (None,)
        share = record.default if mode == "dense" else record.clusters[0]
        return (share,) if share < 1 else ()

    def _check_shares(self) -> None:
        for mode, (base, share) in self._shares.items():
            check_token_share(self.engine.bundle, ModePlan(mode=cast(Mode, base)), share)
            if not self.engine.decoder.token_shares_pay:
                raise ConfigError(f"{mode}: with memory_mb all that a token reads is read from files; leave it out")

    def _has(self, mode: str) -> bool:
        manifest = self.engine.manifest
        if manifest.has_thin:
            return mode in ("dense", "similarity")
        if mode in _OF_PROMPTS and not self.engine.decoder.gathers:
            return False
        if mode == "random":
            return len(manifest.clusters) > 1
        return mode == "similarity" or manifest.has_dense

    def bytes_per_token(self, mode: str) -> int | None:
        """Bytes of weights that one decoded token reads, the mean over the packs; known of the native engine.

        At a token share what is asked for: texts differ.
        """
        decoder = self.engine.decoder
        if not isinstance(decoder, NativeDecoder):
            return None
        if mode in self._shares:
            base, asked = self._shares[mode]
            share = mean_share(self.engine.manifest) if asked is None else asked
            counts, whole = token_bytes(self.engine.manifest), self.bytes_per_token(base)
            ffn = counts.dense_ffn if base == "dense" else counts.pack_ffn
            own = base != "dense" and asked is None
            read_ffn = mean_ffn_bytes(self.engine.manifest) if own else share * ffn
            less = counts.attention - counts.attention_at(share) + ffn - read_ffn
            return None if whole is None else round(whole - less)
        decoder.truncate(0)
        if mode == "dense":
            decoder.use(DENSE)
            return decoder.bytes_per_token(0)
        decoder.use(FfnChoice(cluster=0))
        manifest = self.engine.manifest
        beside = decoder.bytes_per_token(0) - manifest.clusters[0].ffn_bytes
        if mode in ("similarity", PACK_PROMPT, "random"):
            return beside + manifest.mean_pack_bytes
        # Of neurons that a prompt chooses only the numbers count, and that they are gathered as the engine does it.
        decoder.use(FfnChoice(neuron_ids=any_neurons(manifest)))
        return decoder.bytes_per_token(0)

    def read(self, prefix_ids: Sequence[int], routing_text: str) -> None:
        """Read the prefix, and sum up its activations for the modes that choose neurons by them."""
        decoder, manifest = self.engine.decoder, self.engine.manifest
        self._prefix, self._text = list(prefix_ids), routing_text
        self._route = self.engine.router.route(routing_text)
        decoder.truncate(0)
        self._read_with = self._reader(manifest.has_dense)
        decoder.use(self._read_with)
        if selections := {self._selection(mode) for mode in self.modes} - {None}:
            if not self._prefix:
                raise ConfigError(f"modes {', '.join(self.modes)}: expected a context of at least 2 tokens, got 1")
            ordered = tuple(selection for selection in SELECTIONS if selection in selections)
            _, self._statistics = decoder.prompt_statistics(self._prefix, ordered)
        elif self._prefix:
            decoder.forward(self._prefix)

    def _reader(self, dense: bool) -> FfnChoice:
        return DENSE if dense else FfnChoice(cluster=self._route.cluster)

    def _selection(self, mode: str) -> Selection | None:
        if mode in ("stability", "fused"):
            return self.engine.manifest.plan.selection
        return _STATISTICS.get(mode)

    def begin(self, mode: str) -> None:
        """Go back to the end of the prefix, and put a mode's weights in place."""
        decoder, reader = self.engine.decoder, self._reader(self.engine.manifest.has_dense and mode != PACK_PROMPT)
        if reader != self._read_with and self._prefix:
            decoder.truncate(0)
            decoder.use(reader)
            decoder.forward(self._prefix)
            self._read_with = reader
        decoder.truncate(len(self._prefix))
        decoder.use(self._choice(mode))

    def _choice(self, mode: str) -> FfnChoice:
        manifest = self.engine.manifest
        if mode == "random":
            # By the text, so that a run repeated, or a part of one, draws the same packs.
            drawn = int.from_bytes(hashlib.sha256(self._text.encode()).digest()[:8], "little")
            return FfnChoice(cluster=drawn % len(manifest.clusters))
        if mode in self._shares:
            base, share = self._shares[mode]
            choice = self._choice(base)
            share = default_share(manifest, choice.cluster) if share is None else share
            return replace(choice, token_share=share)
        if mode == PACK_PROMPT:
            mode = "similarity"
        if mode in _STATISTICS:
            return FfnChoice(neuron_ids=self._unrepaired(_STATISTICS[mode]))
        plan = ModePlan(mode=cast(Mode, mode))
        statistic = self._statistics[manifest.plan.selection] if plan.needs_statistic else None
        return decode_choice(plan, self._route, self.engine.bundle, statistic, len(self._prefix))

    def _unrepaired(self, selection: Selection) -> tuple[npt.NDArray[np.int32], ...]:
        """A paper's own choice by the prompt: as many neurons in each layer, with the model's own weights."""
        bundle, manifest = self.engine.bundle, self.engine.manifest
        # Neither paper weighs neurons by the down projection's columns, and by these ways of selection nothing does.
        scores = prompt_scores(bundle, selection, self._statistics[selection], len(self._prefix))
        return choose_neurons(manifest, scores, equal_budgets(manifest))

    def append(self, token_ids: Sequence[int], *, all_logits: bool = False, greedy: bool = False) -> Floats:
        """Append tokens; returns logits as `Decoder.forward` does."""
        return self.engine.decoder.forward(token_ids, all_logits=all_logits, greedy=greedy)
