"""What executes a model: the interface between `Engine` and its decoders."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import ConfigError
from coreinfer.bundles.statistics import Selection
from coreinfer.runtime.generation import DiskReads

if TYPE_CHECKING:
    from .cached import CachedTokens

__all__ = ["DENSE", "Decoder", "FfnChoice", "KvPoolFull"]


class KvPoolFull(ConfigError):
    """Too few pages of the KV cache are free for what was asked; nothing was done."""


@dataclass(frozen=True, kw_only=True)
class FfnChoice:
    """The weights to run with: a cluster's pack, a prompt's own neurons, or, with neither, the dense FFN.

    Attributes:
        cluster: number of a cluster pack.
        neuron_ids: ascending ids for each layer, gathered from the dense FFN. Those of a layer's experts are numbered
            through: all of the first come first. Each expert has as many; those that have none are left out.
        token_share: what share of the bytes of the layers' matrices each token reads, by its own inputs; see
            `token_thresholds`. It is for decoding: a prompt is read with all, and so are a prompt's own neurons.
    """

    cluster: int | None = None
    neuron_ids: tuple[npt.NDArray[np.int32], ...] | None = None
    token_share: float = 1.0

    @property
    def whole(self) -> "FfnChoice":
        """The same weights, all of which are read."""
        return self if self.token_share == 1 else replace(self, token_share=1.0)

    def is_same(self, other: "FfnChoice") -> bool:
        """Whether two choices compute alike. Neuron ids are a prompt's own; as arrays they do not compare as one."""
        both_named = self.neuron_ids is None and other.neuron_ids is None
        return self is other or (both_named and self.cluster == other.cluster and self.token_share == other.token_share)


DENSE = FfnChoice()


class Decoder(Protocol):
    """A model with a KV cache and exchangeable FFN weights."""

    @property
    def name(self) -> str:
        """Name of the engine, such as "torch"."""

    @property
    def num_cached(self) -> int:
        """Tokens in the KV cache of the selected sequence."""

    @property
    def sequence(self) -> int:
        """Number of the selected sequence, the one that `forward`, `prompt_statistics` and `truncate` work on."""

    @property
    def page_tokens(self) -> int:
        """Tokens that fit into a page of the KV cache; a sequence has whole pages, the last one partly filled."""

    @property
    def num_pages(self) -> int:
        """Total number of pages of the KV cache, for all sequences together."""

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has.

        A call that appends tokens takes as many of them as its sequences grow by. A sequence that grows in the middle
        of a page that it shares with another one takes one more page.
        """

    def add_sequence(self) -> int:
        """Begin another sequence, empty.

        Returns:
            Its number; sequence 0 exists from the start.
        """

    def fork_sequence(self, source: int, num_tokens: int) -> int:
        """Begin another sequence with the first tokens of an existing one, which stays as it is.

        The native engine shares the pages that they fill, and copies the last one where they do not fill it, which
        takes a free page. The torch engine copies all of them.

        Returns:
            The new sequence's number.

        Raises:
            ConfigError: there is no such sequence, or it has fewer tokens.
            KvPoolFull: too few pages are free.
        """

    def drop_sequence(self, sequence: int) -> None:
        """Forget a sequence and free its pages; if it is the selected one, 0 is selected.

        Raises:
            ConfigError: there is no such sequence, or it is 0, which stays.
        """

    def select(self, sequence: int) -> None:
        """Choose the sequence to work on.

        Raises:
            ConfigError: there is no such sequence.
        """

    @property
    def block_tokens(self) -> int:
        """How many tokens of a prompt a call should read: enough to share a read of the weights."""

    @property
    def calls_alike(self) -> bool:
        """Whether a token's results are bit-identical in all calls of two or more tokens."""

    @property
    def cheap_swaps(self) -> bool:
        """Whether changing from one pack to another takes so little time that it need not be avoided."""

    @property
    def gathers(self) -> bool:
        """Whether it can run with a prompt's own neurons."""

    @property
    def token_shares_pay(self) -> bool:
        """Whether it leaves inputs out where the choice says so; else it reads all as fast, and is not asked to."""

    @property
    def skips_neurons(self) -> bool:
        """Whether it reads no weights of neurons that are zero, so that tokens read more or less."""

    def weight_bytes(self, *, greedy: bool, alone: bool) -> int | None:
        """Bytes of weights that the last pass over decoded tokens read; None where they are not counted.

        Args:
            greedy: as the pass was called.
            alone: whether it had one token; several share a read of all weights.
        """

    @property
    def disk_reads(self) -> DiskReads | None:
        """What it has read from disk since it was loaded; None where its memory is not limited."""

    @property
    def cached(self) -> "CachedTokens":
        """The tokens in the selected sequence's KV cache, and what computed them; the decoder keeps this up to date."""

    def prepare(self, choice: FfnChoice) -> None:
        """Begin to load a pack that will soon be used; returns at once, changes no result.

        Called after the router has chosen it and before the prompt is read. Weights in use are not touched.
        """

    def use(self, choice: FfnChoice) -> None:
        """Run with other FFN weights from the next token on."""

    def truncate(self, num_tokens: int) -> None:
        """Keep only the first `num_tokens` tokens of the selected sequence, and free the other pages."""

    def forward(
        self, token_ids: Sequence[int], *, all_logits: bool = False, greedy: bool = False
    ) -> npt.NDArray[np.float32]:
        """Append tokens to the KV cache.

        Args:
            all_logits: return the logits of all tokens.
            greedy: only the likeliest token will be used: logits of others may be approximate.

        Returns:
            (tokens, vocabulary) float32 logits with `all_logits`, else (1, vocabulary) of the last token.

        Raises:
            KvPoolFull: too few pages are free; the sequence is as it was.
        """

    def forward_rows(
        self, sequences: Sequence[int], token_ids: Sequence[int], *, greedy: bool = False
    ) -> npt.NDArray[np.float32]:
        """Append tokens to several sequences, all with the FFN weights in use.

        Args:
            sequences: the sequence of each token; those of one sequence are appended in their order.
            token_ids: as many.
            greedy: only the likeliest token of each row will be used: logits of others may be approximate.

        Returns:
            (tokens, vocabulary) float32: each token's logits. The native engine reads the weights once for all
            rows, and a row is bit-identical to what `forward` returns for the token alone; the torch engine runs
            sequence by sequence, and a row of several tokens of one sequence differs from that by float rounding.

        Raises:
            KvPoolFull: too few pages are free; the sequences are as they were.
        """

    def forward_beside(
        self,
        block_ids: Sequence[int],
        sequences: Sequence[int],
        token_ids: Sequence[int],
        *,
        last_logits: bool,
        greedy: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Append a block of a prompt to the selected sequence and tokens to others, all with the FFN weights in use.

        The native engine reads the weights once for all of them. Results are to the bit those of `forward` for the
        block and of `forward_rows` for the others.

        Args:
            block_ids: two tokens or more.
            sequences, token_ids, greedy: as for `forward_rows`; what is greedy is the block's last token as well.
            last_logits: whether the logits of the block's last token are wanted.

        Returns:
            (tokens, vocabulary) float32: with `last_logits` first those of the block's last token, then each row's.

        Raises:
            KvPoolFull: too few pages are free; the sequences are as they were.
        """

    def prompt_statistics(
        self, token_ids: Sequence[int], selections: Sequence[Selection]
    ) -> tuple[npt.NDArray[np.float32], dict[Selection, npt.NDArray[np.float32]]]:
        """Append a prompt like `forward`, and sum its FFN activations; see `PromptSums`.

        Args:
            selections: ways to sum them; see `document_statistic`.

        Returns:
            Logits (1, vocabulary), and for each selection statistics (layers, ffn_dim) float32.

        Raises:
            KvPoolFull: too few pages are free; the sequence is as it was.
        """
