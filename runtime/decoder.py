"""What executes a model: the seam between `Engine` and its decoders (torch now, native C++ later)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.statistics import Selection

__all__ = ["DENSE", "Decoder", "FfnChoice"]


@dataclass(frozen=True, kw_only=True)
class FfnChoice:
    """Which FFN weights to run with: a cluster's pack, a prompt's own neurons, or, with neither, the dense FFN.

    Attributes:
        cluster: number of a cluster pack.
        neuron_ids: ascending ids for each layer, gathered from the dense FFN.
    """

    cluster: int | None = None
    neuron_ids: tuple[npt.NDArray[np.int32], ...] | None = None


DENSE = FfnChoice()


class Decoder(Protocol):
    """A model with a KV cache and exchangeable FFN weights."""

    @property
    def name(self) -> str:
        """Name of the engine, such as "torch"."""

    @property
    def num_cached(self) -> int:
        """Tokens in the KV cache."""

    def prepare(self, choice: FfnChoice) -> None:
        """Begin to bring a pack that will soon be used to where it is needed; returns at once, changes no result.

        Called once the router has spoken, while the prompt is still to be read. Weights in use are left alone.
        """

    def use(self, choice: FfnChoice) -> None:
        """Run with other FFN weights from the next token on."""

    def truncate(self, num_tokens: int) -> None:
        """Keep only the first `num_tokens` tokens of the KV cache."""

    def forward(
        self, token_ids: Sequence[int], *, all_logits: bool = False, greedy: bool = False
    ) -> npt.NDArray[np.float32]:
        """Append tokens to the KV cache.

        Args:
            all_logits: give the logits of all tokens.
            greedy: only the likeliest token will be asked for: logits of others may be approximate.

        Returns:
            (tokens, vocabulary) float32 logits with `all_logits`, else (1, vocabulary) of the last token.
        """

    def prompt_statistics(
        self, token_ids: Sequence[int], selections: Sequence[Selection]
    ) -> tuple[npt.NDArray[np.float32], dict[Selection, npt.NDArray[np.float32]]]:
        """Append a prompt like `forward` and sum up its FFN activations.

        Args:
            selections: ways to sum them up; see `document_statistic`.

        Returns:
            Logits (1, vocabulary), and for each selection statistics (layers, ffn_dim) float32.
        """
