"""What the manifest says of a bundle's quality, and of what a decoded token may leave out."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["ClusterQuality", "PackChoice", "Quality", "Score", "ShareScore", "TokenSharesRecord", "TriedWeights"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Quality of one way to decode, on held-out text.

    Attributes:
        perplexity: over the second halves, decoded narrow after a dense prefill of the first halves.
        kl: mean KL(dense || narrow) a token, in nats.
        top1: share of tokens where both models rank the same token first.
    """

    name: str
    perplexity: float
    kl: float
    top1: float
    num_texts: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class ClusterQuality:
    """The score of one cluster's pack on the held-out text routed to it."""

    cluster: int
    score: Score


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Held-out quality of the bundle, the dense model and the controls; all controls have the same bytes."""

    dense: Score
    clusters: Score
    controls: tuple[Score, ...]
    per_cluster: tuple[ClusterQuality, ...]


@dataclass(frozen=True, kw_only=True)
class ShareScore:
    """What a token share costs, measured on held-out text.

    Attributes:
        weights: what decodes: the dense FFN, or each text's cluster.
        shares: "planned", or a control: equal shares of all layers and groups; of thin clusters also one share for all
            texts by thresholds of all text, and clusters that texts were dealt to by chance.
        asked: share of the layers' bytes, 1 for all; of clusters with shares of their own the mean over the text.
        read: share that was read: other text has other inputs than what thresholds were set by.
    """

    weights: Literal["dense", "clusters"]
    shares: Literal["planned", "equal", "one", "random"]
    asked: float
    read: float
    score: Score


@dataclass(frozen=True, kw_only=True)
class TriedWeights:
    """FFN weights that a cluster could decode with, measured on its held-out text as they are stored.

    Attributes:
        keep: kept neurons / all neurons; 1 for the dense FFN.
        share: smallest token share that was found to hold the quality.
        kl: mean KL(dense || these) a token, in nats, at this share.
        top1: share of tokens where both models rank the same token first.
        token_bytes: of weights that a decoded token read, head included; the mean over the text.
    """

    keep: float
    share: float
    kl: float
    top1: float
    token_bytes: int


@dataclass(frozen=True, kw_only=True)
class PackChoice:
    """What a cluster's weights were chosen from, by the fewest bytes a token (`--packs auto`).

    Attributes:
        judged_by: "cluster N", or what clusters with little text were judged together by.
        is_thin: whether it decodes with the dense FFN.
        thin: the dense FFN.
        own: of its own weights those with the fewest bytes; None where none of the keep ratios held the quality, or
            did no more as the packs were made in the end.
        tried_keeps: keep ratios that were tried, none where there was too little text to choose by.
    """

    cluster: int
    judged_by: str
    is_thin: bool
    thin: TriedWeights
    own: TriedWeights | None
    tried_keeps: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TokenSharesRecord:
    """How much of the layers' matrices a decoded token reads; see docs/format.md.

    Attributes:
        default: share of their bytes where a generation does not say; 1 reads all.
        clusters: the same of each cluster, with its pack or, where it is thin, with the dense FFN.
        num_levels, num_targets: lengths of `levels` and `targets` of the file.
        halves: whether inputs are read in half; the file has `half_ratios` then.
        scores: of the default; empty where it was not measured.
        choices: of each cluster, where thin clusters and packs of own weights were compared; else empty.
    """

    default: float
    clusters: tuple[float, ...]
    num_levels: int
    num_targets: int
    scores: tuple[ShareScore, ...] = ()
    halves: bool = False
    choices: tuple[PackChoice, ...] = ()
