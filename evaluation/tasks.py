"""One item, one subject, each of its modes: what was observed.

Every token that is scored is predicted by the mode's own FFN: the context's last token is read with it too, all before
as the runtime reads prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from coreinfer.bundles.shared.beginnings import text_ids
from tokenizers import Tokenizer

from .answer_metrics import entity_f1, exact_match, token_f1
from .logits import Divergence, Predictions, diverge, greedy_ids, log_likelihood, predictions
from .records import Item, Kind
from .scores import Ratio
from .subjects import Subject

__all__ = ["Observation", "Text", "Tools", "compare_text", "is_task", "predict_text", "score_task"]

_NEW_TOKENS: Mapping[Kind, int] = {"completion": 24, "entities": 64, "summarization": 96, "translation": 96}


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What all subjects of a run share.

    Attributes:
        eos_ids: tokens that end a text.
        room: tokens that fit, context and answer together.
    """

    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    room: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that will be continued, with the tokens that begin every text of the model."""
        return text_ids(self.tokenizer, text)

    def encode_more(self, text: str) -> list[int]:
        """Token ids of a text that continues another one, without the tokens that begin a text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return str(self.tokenizer.decode(list(ids)))


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text to predict: the tokens after `start` are scored.

    Attributes:
        routing_text: what the runtime would see of it.
    """

    ids: tuple[int, ...]
    start: int
    routing_text: str


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What was seen of one item.

    Attributes:
        shares: metric -> the item's share.
        answer: generated text, for metrics of the whole corpus.
    """

    shares: Mapping[str, Ratio] = field(default_factory=dict)
    answer: str = ""


def is_task(kind: Kind) -> bool:
    """Whether items have right answers, so that no reference model is needed."""
    return kind not in ("text", "prompt")


def predict_text(subject: Subject, mode: str, text: Text) -> Predictions:
    """Let the reference read a text."""
    subject.read(text.ids[: text.start], text.routing_text)
    subject.begin(mode)
    return predictions(subject.append(text.ids[text.start : -1], all_logits=True))


def compare_text(subject: Subject, text: Text, reference: Predictions) -> dict[str, Observation]:
    """Let a subject read a text in each mode."""
    subject.read(text.ids[: text.start], text.routing_text)
    seen = {}
    for mode in subject.modes:
        subject.begin(mode)
        logits = subject.append(text.ids[text.start : -1], all_logits=True)
        seen[mode] = Observation(shares=_text_shares(diverge(reference, logits, text.ids[text.start + 1 :])))
    return seen


def _text_shares(found: Divergence) -> dict[str, Ratio]:
    count = len(found.kl)
    # Long generations are where narrow models drift: the last quarter tells.
    tail = found.kl[-max(1, count // 4) :]
    return {
        "KL": Ratio(numerator=float(found.kl.sum()), denominator=count),
        "KL, last quarter": Ratio(numerator=float(tail.sum()), denominator=len(tail)),
        "top-1": Ratio(numerator=float(found.agrees.sum()), denominator=count),
        "perplexity": Ratio(numerator=float(found.nll.sum()), denominator=count),
    }


def score_task(subject: Subject, kind: Kind, item: Item, tools: Tools) -> dict[str, Observation] | None:
    """Let a subject do one item in each mode; None where it does not fit."""
    if kind == "choice":
        return _choose(subject, item, tools)
    ids = tools.encode(item.context)
    if not 2 <= len(ids) <= tools.room - _NEW_TOKENS[kind]:
        return None
    subject.read(ids[:-1], item.context)
    seen = {}
    for mode in subject.modes:
        subject.begin(mode)
        answer = _generate(subject, ids[-1], tools, _NEW_TOKENS[kind])
        seen[mode] = Observation(shares=_GRADERS[kind](answer, item.answers), answer=answer)
    return seen


def _generate(subject: Subject, last_id: int, tools: Tools, max_new_tokens: int) -> str:
    """Answer in one line, greedily."""
    ids = greedy_ids(
        partial(subject.append, greedy=True),
        last_id,
        max_new_tokens=max_new_tokens,
        eos_ids=tools.eos_ids,
        stopped=lambda ids: "\n" in tools.decode(ids).lstrip(),
    )
    return tools.decode(ids).lstrip().split("\n")[0].strip()


def _grade_completion(answer: str, accepted: Sequence[str]) -> dict[str, Ratio]:
    return {
        "exact match": Ratio(numerator=exact_match(answer, accepted)),
        "F1": Ratio(numerator=token_f1(answer, accepted)),
    }


def _grade_entities(answer: str, accepted: Sequence[str]) -> dict[str, Ratio]:
    return {"entity F1": Ratio(numerator=entity_f1(answer, accepted))}


def _grade_summary(answer: str, accepted: Sequence[str]) -> dict[str, Ratio]:
    # Its import takes a second that the other tasks need not wait for.
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    scores = RougeScorer(list(names), use_stemmer=True).score(accepted[0], answer)
    return {label: Ratio(numerator=scores[name].fmeasure) for name, label in names.items()}


def _grade_nothing(_answer: str, _accepted: Sequence[str]) -> dict[str, Ratio]:
    """Translations are graded all together."""
    return {}


_GRADERS: Mapping[Kind, Callable[[str, Sequence[str]], dict[str, Ratio]]] = {
    "completion": _grade_completion,
    "entities": _grade_entities,
    "summarization": _grade_summary,
    "translation": _grade_nothing,
}


def _choose(subject: Subject, item: Item, tools: Tools) -> dict[str, Observation] | None:
    """Score each choice by its log-likelihood over its length in bytes, as lm-evaluation-harness does for acc_norm."""
    pairs = [encode_pair(tools, *pair) for pair in zip(item.contexts, item.answers, strict=True)]
    if any(len(context) < 2 or len(context) + len(answer) > tools.room for context, answer in pairs):
        return None
    likelihoods: dict[str, list[float]] = {mode: [] for mode in subject.modes}
    read = None
    for (context, answer), words, text in zip(pairs, item.answers, item.contexts, strict=True):
        if context != read:
            subject.read(context[:-1], text)
            read = context
        for mode in subject.modes:
            subject.begin(mode)
            logits = subject.append([context[-1], *answer[:-1]], all_logits=True)
            likelihoods[mode].append(log_likelihood(logits, answer)[0] / len(words.encode()))
    return {
        mode: Observation(shares={"accuracy": Ratio(numerator=float(values.index(max(values)) == item.gold))})
        for mode, values in likelihoods.items()
    }


def encode_pair(tools: Tools, context: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it, split where the context's own tokens end."""
    ids = tools.encode(context)
    return ids, tools.encode(context + answer)[len(ids) :] or tools.encode_more(answer)
