"""Stage `evaluate`: what narrowing costs, on text that was not calibrated on.

Each text's first half is read with the dense FFN, the second half is decoded narrow under teacher forcing. The
reference is the model with its own weights.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.errors import ModelOutputError
from coreinfer.bundles.manifest import ClusterQuality, Quality, Score
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.progress import Advance, Progress
from coreinfer.compiler.prune.narrow import CLUSTERS, Cut
from coreinfer.compiler.samples import GROUP_TEXTS
from coreinfer.compiler.text.corpus import split_point
from transformers import DynamicCache

from .stored import StoredModel, base_in_use, dense_cut

__all__ = ["Tally", "compare_logits", "evaluate"]


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
    Raises:
        ModelOutputError: the logits are not finite.
    """
    log_p = dense.float().log_softmax(dim=-1)
    log_q = narrow.float().log_softmax(dim=-1)
    nll = -float(log_q.gather(1, targets[:, None]).double().sum())
    kl = float((log_p.exp() * (log_p - log_q)).double().sum())
    if not (math.isfinite(nll) and math.isfinite(kl)):
        raise ModelOutputError(
            f"held-out text {text}: expected finite logits, got a mean of {float(dense.float().mean())} from the dense "
            f"model and {float(narrow.float().mean())} from the narrow one; compile with --dtype float32, or check the "
            "model's weights"
        )
    return Tally(
        nll=nll,
        kl=kl,
        agreements=int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum()),
        num_tokens=len(targets),
        texts={text},
    )


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
    models: Mapping[str, tuple[Cut, npt.NDArray[np.int64]]],
    progress: Progress,
    stored: StoredModel | None = None,
) -> Quality:
    """Measure the clusters' packs, the controls and the dense model.

    Args:
        texts: token ids of the held-out texts.
        models: assignment name -> its FFN and (texts,) cluster of each text.
        stored: what runs with the narrow FFN (attention, embedding, head, and the dense FFN for the first halves) is
            as stored there, and so is the dense model that is scored; None for the model's own weights.
    """
    tallies: dict[str, dict[int, Tally]] = {name: {} for name in models}
    dense = Tally()
    # Texts of a cluster together, so that its FFN is put into the model once or twice.
    order = np.argsort(models[CLUSTERS][1], kind="stable").tolist()
    with progress.stage("evaluate", len(texts) * (1 + len(models))) as advance, torch.inference_mode():
        for first in range(0, len(texts), GROUP_TEXTS):
            group = {number: _dense_pass(loaded, texts[number]) for number in order[first : first + GROUP_TEXTS]}
            with _as_stored(stored):
                dense.add(_score_dense(loaded, group, stored, advance))
                for name, (cut, labels) in models.items():
                    _score_narrow(loaded, group, cut, labels, tallies[name], advance)
    return _quality(dense, tallies)


def _as_stored(stored: StoredModel | None) -> AbstractContextManager[None]:
    return nullcontext() if stored is None else base_in_use(stored)


def _dense_pass(loaded: LoadedModel, token_ids: Sequence[int]) -> _Text:
    ids = torch.tensor([list(token_ids)], device=loaded.device)
    start = split_point(len(token_ids))
    cache = DynamicCache()
    logits = loaded.forward(ids, cache)[0, start:-1]
    cache.crop(start - len(token_ids))
    return _Text(token_ids=ids, start=start, logits=logits.clone(), cache=cache)


def _score_dense(loaded: LoadedModel, texts: dict[int, _Text], stored: StoredModel | None, advance: Advance) -> Tally:
    """Score the dense model; a stored one has read the first halves from then on."""
    tally = Tally()
    with nullcontext() if stored is None else ffn_in_use(loaded, dense_cut(stored), 0):
        for number, text in texts.items():
            own = text if stored is None else _dense_pass(loaded, text.token_ids[0].tolist())
            tally.add(_score_text(text, own.logits, number))
            text.cache = own.cache
            advance()
    return tally


def _score_narrow(
    loaded: LoadedModel,
    texts: dict[int, _Text],
    cut: Cut,
    labels: npt.NDArray[np.int64],
    tallies: dict[int, Tally],
    advance: Advance,
) -> None:
    """Score texts by the FFN of each one's cluster, and add to the clusters' tallies."""
    for cluster in sorted({int(labels[number]) for number in texts}):
        members = {number: text for number, text in texts.items() if labels[number] == cluster}
        tallies.setdefault(cluster, Tally()).add(_narrow_pass(loaded, cut, cluster, members, advance))


def _narrow_pass(loaded: LoadedModel, cut: Cut, cluster: int, texts: dict[int, _Text], advance: Advance) -> Tally:
    tally = Tally()
    with ffn_in_use(loaded, cut, cluster):
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
