"""Stage `evaluate`: what narrowing costs, on text that nothing was calibrated on.

Each text's first half is read with the dense FFN, the second half is decoded narrow under teacher forcing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.families import assign_ffn, ffn_tensors
from coreinfer.bundles.manifest import ClusterQuality, Quality, Score
from torch import nn
from transformers import DynamicCache

from .corpus import split_point
from .models import LoadedModel
from .narrowing import CLUSTERS, NarrowModel, narrow_layer
from .progress import Advance, Progress

GROUP_TEXTS = 16
"""Texts whose dense logits are held in memory at a time."""

__all__ = ["GROUP_TEXTS", "Tally", "compare_logits", "evaluate", "narrow_ffn"]


@dataclass(kw_only=True)
class Tally:
    """Sums over decoded tokens."""

    nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    num_tokens: int = 0
    texts: set[int] = field(default_factory=set)

    def add(self, other: "Tally") -> None:
        """Add another tally's sums."""
        self.nll += other.nll
        self.kl += other.kl
        self.agreements += other.agreements
        self.num_tokens += other.num_tokens
        self.texts |= other.texts

    def score(self, name: str) -> Score:
        """Turn sums into means."""
        count = max(1, self.num_tokens)
        return Score(
            name=name,
            perplexity=round(math.exp(min(self.nll / count, 50.0)), 4),
            kl=round(self.kl / count, 5),
            top1=round(self.agreements / count, 5),
            num_texts=len(self.texts),
            num_tokens=self.num_tokens,
        )


def compare_logits(dense: torch.Tensor, narrow: torch.Tensor, targets: torch.Tensor, text: int) -> Tally:
    """Compare two models' predictions of the same tokens.

    Args:
        dense, narrow: (tokens, vocabulary) logits.
        targets: (tokens,) the tokens that came.
        text: number of the text, to count texts.
    """
    log_p = dense.float().log_softmax(dim=-1)
    log_q = narrow.float().log_softmax(dim=-1)
    return Tally(
        nll=-float(log_q.gather(1, targets[:, None]).double().sum()),
        kl=float((log_p.exp() * (log_p - log_q)).double().sum()),
        agreements=int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum()),
        num_tokens=len(targets),
        texts={text},
    )


@contextmanager
def narrow_ffn(loaded: LoadedModel, narrow: NarrowModel, cluster: int) -> Iterator[None]:
    """Run the block with one cluster's narrow FFN in the model, which a layer has only while it runs.

    It is cut once, but each time where weights stay in their file: all layers' together would be too much then.
    """
    with ExitStack() as stack:
        for index, layer in enumerate(loaded.layers):
            cut: Callable[[], dict[str, torch.Tensor]] = partial(narrow_layer, loaded, narrow, index, cluster)
            stack.enter_context(_put_in_use(loaded, layer, cut if loaded.mapped else cache(cut)))
        yield


@contextmanager
def _put_in_use(loaded: LoadedModel, layer: nn.Module, cut: Callable[[], dict[str, torch.Tensor]]) -> Iterator[None]:
    dense: dict[str, torch.Tensor] = {}

    def enter(_layer: nn.Module, _inputs: object) -> None:
        dense.update(ffn_tensors(layer, loaded.family))
        assign_ffn(layer, loaded.family, cut())

    def leave(*_: object) -> None:
        if dense:
            assign_ffn(layer, loaded.family, dense)
            dense.clear()

    # First of all that is done to a layer as it is entered, and last as it is left.
    handles = [layer.register_forward_pre_hook(enter, prepend=True), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        leave()
        for handle in handles:
            handle.remove()


@dataclass(kw_only=True)
class _Text:
    """A held-out text after its dense pass.

    Attributes:
        token_ids: (1, tokens).
        start: where narrow decoding starts.
        logits: (tokens - start - 1, vocabulary) of the dense model, in its dtype.
        cache: keys and values of the first `start` tokens.
    """

    token_ids: torch.Tensor
    start: int
    logits: torch.Tensor
    cache: DynamicCache


def evaluate(
    loaded: LoadedModel,
    texts: Sequence[Sequence[int]],
    models: dict[str, tuple[NarrowModel, npt.NDArray[np.int64]]],
    progress: Progress,
) -> Quality:
    """Measure the clusters' packs and the controls beside the dense model.

    Args:
        texts: token ids of the held-out texts.
        models: assignment name -> narrow model and (texts,) cluster of each text.
    """
    tallies: dict[str, dict[int, Tally]] = {name: {} for name in models}
    dense = Tally()
    with progress.stage("evaluate", len(texts) * (1 + len(models))) as advance, torch.inference_mode():
        for first in range(0, len(texts), GROUP_TEXTS):
            group = {}
            for number in range(first, min(first + GROUP_TEXTS, len(texts))):
                group[number] = _dense_pass(loaded, texts[number])
                dense.add(_score_text(group[number], group[number].logits, number))
                advance()
            for name, (narrow, clusters) in models.items():
                for cluster in sorted({int(clusters[number]) for number in group}):
                    members = {number: text for number, text in group.items() if clusters[number] == cluster}
                    tally = tallies[name].setdefault(cluster, Tally())
                    tally.add(_narrow_pass(loaded, narrow, cluster, members, advance))
    return _quality(dense, tallies)


def _dense_pass(loaded: LoadedModel, token_ids: Sequence[int]) -> _Text:
    ids = torch.tensor([list(token_ids)], device=loaded.device)
    start = split_point(len(token_ids))
    cache = DynamicCache()
    logits = loaded.forward(ids, cache)[0, start:-1]
    cache.crop(start - len(token_ids))
    return _Text(token_ids=ids, start=start, logits=logits.clone(), cache=cache)


def _narrow_pass(
    loaded: LoadedModel,
    narrow: NarrowModel,
    cluster: int,
    texts: dict[int, _Text],
    advance: Advance,
) -> Tally:
    tally = Tally()
    with narrow_ffn(loaded, narrow, cluster):
        for number, text in texts.items():
            logits = loaded.forward(text.token_ids[:, text.start :], text.cache)
            text.cache.crop(text.start - text.token_ids.shape[1])
            tally.add(_score_text(text, logits[0, :-1], number))
            advance()
    return tally


def _score_text(text: _Text, logits: torch.Tensor, number: int) -> Tally:
    return compare_logits(text.logits, logits, text.token_ids[0, text.start + 1 :], number)


def _quality(dense: Tally, tallies: dict[str, dict[int, Tally]]) -> Quality:
    totals = {}
    for name, by_cluster in tallies.items():
        totals[name] = Tally()
        for tally in by_cluster.values():
            totals[name].add(tally)
    return Quality(
        dense=dense.score("dense"),
        clusters=totals[CLUSTERS].score(CLUSTERS),
        controls=tuple(total.score(name) for name, total in totals.items() if name != CLUSTERS),
        per_cluster=tuple(
            ClusterQuality(cluster=cluster, score=tally.score(f"cluster {cluster}"))
            for cluster, tally in tallies[CLUSTERS].items()
        ),
    )
