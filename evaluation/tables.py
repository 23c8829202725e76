"""Scores as Markdown tables."""

from collections.abc import Iterator, Mapping, Sequence

from .scores import Evaluation, MetricScore, Variant

__all__ = ["HEADLINES", "dataset_table", "mean_scores", "summary_table"]

HEADLINES: Mapping[str, str] = {
    "KL": "KL",
    "top-1": "top-1",
    "accuracy": "multiple choice",
    "exact match": "completion",
    "entity F1": "entities",
    "ROUGE-L": "summaries",
    "chrF": "translation",
}
"""Metric -> what the summary calls it: one a kind of task, two for texts."""


def dataset_table(name: str, rows: Sequence[Variant], scores: Sequence[MetricScore]) -> Iterator[str]:
    """A data set's scores: one line a row, one column a metric, with 95% intervals."""
    metrics = list(dict.fromkeys(score.metric for score in scores))
    count = scores[0].num_items if scores else 0
    yield f"### {name}, {count} items"
    yield ""
    yield from _table(["", *metrics], _dataset_lines(rows, metrics, scores))


def _dataset_lines(
    rows: Sequence[Variant], metrics: Sequence[str], scores: Sequence[MetricScore]
) -> Iterator[list[str]]:
    found = {(score.row, score.metric): score for score in scores}
    for row in rows:
        cells = [found.get((row.name, metric)) for metric in metrics]
        if any(cells):
            yield [row.name, *(_cell(score) for score in cells)]


def _cell(score: MetricScore | None) -> str:
    if score is None:
        return ""
    return f"{_short(score.value)} [{_short(score.low)}, {_short(score.high)}]"


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def summary_table(result: Evaluation) -> Iterator[str]:
    """Means over data sets, one column per kind of task, and the bytes that a token reads."""
    means = mean_scores(result)
    metrics = [metric for metric in HEADLINES if any(metric in values for values in means.values())]
    yield f"### Means over data sets; KL and top-1 against {result.reference}"
    yield ""
    yield from _table(
        ["", "MB a token", *(HEADLINES[metric] for metric in metrics)],
        [
            [row.name, _megabytes(row), *(_mean(means[row.name], metric) for metric in metrics)]
            for row in result.rows
            if row.name in means
        ],
    )


def _megabytes(row: Variant) -> str:
    return "" if row.bytes_per_token is None else f"{row.bytes_per_token / 1e6:.1f}"


def _mean(values: Mapping[str, float], metric: str) -> str:
    return _short(values[metric]) if metric in values else ""


def mean_scores(result: Evaluation) -> dict[str, dict[str, float]]:
    """Row name -> metric -> mean over the data sets that have the metric, each counting alike."""
    found: dict[str, dict[str, list[float]]] = {}
    for score in result.scores:
        found.setdefault(score.row, {}).setdefault(score.metric, []).append(score.value)
    return {
        row: {metric: sum(values) / len(values) for metric, values in metrics.items()} for row, metrics in found.items()
    }


def _table(header: Sequence[str], lines: Iterator[list[str]] | Sequence[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for line in lines:
        yield f"| {' | '.join(line)} |"
    yield ""
