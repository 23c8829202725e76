"""The results of a generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .prompts.tools import CallReader, ToolCall

__all__ = [
    "MODES",
    "BytesRead",
    "DiskReads",
    "Drafting",
    "Fallback",
    "FinishReason",
    "Generation",
    "Mode",
    "PathStep",
    "Token",
    "TopLogprob",
    "collect",
]

PromptFfn = Literal["dense", "pack"]
"""What reads a prompt; see `GenerationOptions.prompt_ffn`."""
Mode = Literal["auto", "similarity", "stability", "fused", "dense", "lossless"]
MODES: tuple[Mode, ...] = ("auto", "similarity", "stability", "fused", "dense", "lossless")
FinishReason = Literal["stop", "length", "cancelled"]
Fallback = Literal["unfamiliar", "unsure"]
"""Why mode auto did not use the nearest pack: unlike calibration text, or almost as near to a second cluster."""


@dataclass(frozen=True, kw_only=True)
class PathStep:
    """A stretch of a generation that one cluster serves.

    Attributes:
        first_token: number of its first token; 1 is the first of the generation.
        cluster, label: the cluster and its most typical words.
        distance: 1 - cosine of the text that was routed to the cluster's centroid.
    """

    first_token: int
    cluster: int
    label: str
    distance: float


@dataclass(frozen=True, kw_only=True)
class TopLogprob:
    """One of the likeliest tokens at a position, with its natural log-probability."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class DiskReads:
    """What was read from disk while a generation ran, where memory is limited (`memory_mb`); for others that ran too.

    Attributes:
        num_bytes: of FFN layers or experts, and of rows of the base's tables in whole pages.
        num_hits: layers, of mixtures experts, that were in memory when a pass came to them, kept there or read ahead.
        num_misses: those that were not.
        waited_seconds: how long passes waited.
    """

    num_bytes: int
    num_hits: int
    num_misses: int
    waited_seconds: float

    def since(self, start: "DiskReads") -> "DiskReads":
        """What was read after `start`."""
        return DiskReads(
            num_bytes=self.num_bytes - start.num_bytes,
            num_hits=self.num_hits - start.num_hits,
            num_misses=self.num_misses - start.num_misses,
            waited_seconds=self.waited_seconds - start.waited_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class BytesRead:
    """Bytes of weights that the passes read which decoded a generation's tokens, of a token share below 1.

    A token that is decoded alone reads what it wants. Tokens that share a pass share a read of all weights, which is
    counted for each of them. Of an int8 head that greedy decoding screens, what is scored again is not counted.

    Attributes:
        mean, p95: over the tokens.
        num_tokens: that were decoded by passes; the first comes from the prompt's.
    """

    mean: int
    p95: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """Measurements of drafting in lossless decoding.

    Attributes:
        num_drafted: tokens that the pack drafted.
        num_tried, num_accepted: drafts that the dense model checked, and accepted; drafts after a rejected one are not
            checked.
        num_rounds: verifications.
        num_plain: tokens decoded without drafting.
        turned_off: whether drafting was paused, at least for a while, because plain dense decoding was faster.
    """

    num_drafted: int
    num_tried: int
    num_accepted: int
    num_rounds: int
    num_plain: int
    turned_off: bool

    @property
    def acceptance(self) -> float:
        """Share of the checked drafts that were accepted."""
        return self.num_accepted / self.num_tried if self.num_tried else 0.0

    @property
    def mean_length(self) -> float:
        """Mean number of tokens drafted in a round."""
        return self.num_drafted / self.num_rounds if self.num_rounds else 0.0


@dataclass(frozen=True, kw_only=True)
class Token:
    """One decoded token, with the measurements so far.

    Attributes:
        token_id: its id.
        text: text that became final with it; may be empty inside a character or a possible stop string.
        cluster: the cluster in use: the prompt's nearest one, the largest one after a fallback, or the one that the
            text drifted to.
        cluster_label: the cluster's most typical words.
        distance: 1 - cosine of the prompt to its nearest centroid.
        familiar: whether that distance is within the 99th percentile of calibration text.
        fallback: why mode auto did not use the nearest pack; None if it did.
        path: the clusters so far; more than one if the text drifted.
        mode: the mode that was used; never "auto".
        num_prompt_tokens, num_tokens: tokens of the prompt, tokens decoded so far.
        num_cached_tokens: tokens of the prompt that were in the KV cache already.
        prefill_seconds: time to route and read the prompt.
        decode_seconds: time since this generation was first decoded after its prompt was read; includes what was
            decoded for others in between.
        logprob: natural log of the model's probability of the token, before sampling options; None if not asked for.
        top_logprobs: the likeliest tokens, likeliest first; empty if not asked for.
        drafting: measurements so far in mode lossless; else None.
        disk_reads: what was read from disk since this generation began to be read; None where memory is not limited.
        finish_reason: on the last token "stop" (end of text or stop string), "length" or "cancelled", before it None.
        token_share: share of the layers' weights that each token reads; in mode lossless that of drafts.
        bytes_read: on the last token what tokens read; None before it, in mode lossless, where the engine does not
            count it, and at share 1 but with a FFN that is stored neuron by neuron.
    """

    token_id: int
    text: str
    cluster: int
    cluster_label: str
    distance: float
    familiar: bool
    fallback: Fallback | None
    path: tuple[PathStep, ...]
    mode: Mode
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    prefill_seconds: float
    decode_seconds: float
    logprob: float | None
    top_logprobs: tuple[TopLogprob, ...]
    drafting: Drafting | None
    disk_reads: DiskReads | None
    finish_reason: FinishReason | None
    token_share: float = 1.0
    bytes_read: BytesRead | None = None

    @property
    def decode_tokens_per_second(self) -> float:
        """Decoded tokens per second; the first token comes from the prompt's own logits and is not counted."""
        return (self.num_tokens - 1) / self.decode_seconds if self.num_tokens > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished generation. The fields are those of its last `Token`; text and token ids are those of all tokens.

    Attributes:
        logprobs: log-probability of each token; empty if not asked for.
        top_logprobs: the likeliest tokens at each token's position; empty if not asked for.
        tool_calls: the model's calls of tools that it was offered; the text contains them as they were written.
    """

    text: str
    token_ids: tuple[int, ...]
    cluster: int
    cluster_label: str
    distance: float
    familiar: bool
    fallback: Fallback | None
    path: tuple[PathStep, ...]
    mode: Mode
    num_prompt_tokens: int
    num_cached_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_tokens_per_second: float
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[TopLogprob, ...], ...]
    drafting: Drafting | None
    disk_reads: DiskReads | None
    finish_reason: FinishReason
    tool_calls: tuple[ToolCall, ...] = ()
    token_share: float = 1.0
    bytes_read: BytesRead | None = None


def collect(tokens: Sequence[Token], calls: CallReader | None = None) -> Generation:
    """Join the tokens of a finished stream into a generation.

    Args:
        calls: reads the calls of offered tools; None if none were offered.
    """
    last = tokens[-1]
    assert last.finish_reason is not None
    text = "".join(token.text for token in tokens)
    if calls is not None:
        calls.push(text)
        calls.finish()
    return Generation(
        text=text,
        tool_calls=tuple(calls.calls) if calls else (),
        token_ids=tuple(token.token_id for token in tokens),
        cluster=last.cluster,
        cluster_label=last.cluster_label,
        distance=last.distance,
        familiar=last.familiar,
        fallback=last.fallback,
        path=last.path,
        mode=last.mode,
        num_prompt_tokens=last.num_prompt_tokens,
        num_cached_tokens=last.num_cached_tokens,
        prefill_seconds=last.prefill_seconds,
        decode_seconds=last.decode_seconds,
        decode_tokens_per_second=last.decode_tokens_per_second,
        logprobs=tuple(token.logprob for token in tokens if token.logprob is not None),
        top_logprobs=tuple(token.top_logprobs for token in tokens if token.logprob is not None),
        drafting=last.drafting,
        disk_reads=last.disk_reads,
        finish_reason=last.finish_reason,
        token_share=last.token_share,
        bytes_read=last.bytes_read,
    )
