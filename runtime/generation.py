"""What a generation gives back."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["MODES", "FinishReason", "Generation", "Mode", "Token"]

Mode = Literal["auto", "similarity", "stability", "fused", "dense", "lossless"]
MODES: tuple[Mode, ...] = ("auto", "similarity", "stability", "fused", "dense", "lossless")
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One decoded token, with the measurements so far.

    Attributes:
        token_id: its id.
        text: text that became final with it; may be empty inside a character or a possible stop string.
        cluster: cluster of the prompt.
        cluster_label: the cluster's most typical words.
        distance: 1 - cosine of the prompt to the cluster's centroid.
        familiar: whether that distance is within the 99th percentile of calibration text.
        mode: the mode that was used; never "auto".
        num_prompt_tokens, num_tokens: tokens read, tokens decoded so far.
        prefill_seconds: routing and reading of the prompt.
        decode_seconds: since the prompt was read.
        finish_reason: on the last token "stop" (end of text or stop string) or "length", before it None.
    """

    token_id: int
    text: str
    cluster: int
    cluster_label: str
    distance: float
    familiar: bool
    mode: Mode
    num_prompt_tokens: int
    num_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finish_reason: FinishReason | None

    @property
    def decode_tokens_per_second(self) -> float:
        """Decoded tokens a second; the first token comes from the prompt's own logits and is not counted."""
        return (self.num_tokens - 1) / self.decode_seconds if self.num_tokens > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished generation; the fields are those of its last `Token`, for the whole of it."""

    text: str
    token_ids: tuple[int, ...]
    cluster: int
    cluster_label: str
    distance: float
    familiar: bool
    mode: Mode
    num_prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_tokens_per_second: float
    finish_reason: FinishReason
