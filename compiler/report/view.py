"""What the report's template shows: figures, places and widths, from the manifest and the map."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coreinfer.bundles.expert_packs import units_of
from coreinfer.bundles.manifest import Manifest, Quality, Score
from coreinfer.bundles.pack_choices import choice_in_words
from coreinfer.bundles.token_bytes import TokenBytes, token_bytes
from coreinfer.bundles.token_shares import default_share, mean_ffn_bytes, mean_share

from .map_points import MapPoint

__all__ = ["report_view"]

_MAP_WIDTH, _MAP_HEIGHT, _MARGIN = 400, 280, 24
_CHART_WIDTH, _CHART_HEIGHT, _CHART_TOP, _CHART_FULL = 400, 120, 4, 100
_GOLDEN_DEGREES = 137.508
_RATES = (10, 20, 40, 80)
"""Read bandwidths in GB/s: from a small board with one memory channel to a desktop's two fast ones."""
_HIDDEN = "(sentence not in this report)"
_PARTS = ("FFN", "attention", "head", "other")


def report_view(manifest: Manifest, points: Sequence[MapPoint], file_bytes: Mapping[str, int]) -> dict[str, Any]:
    """Return the template's variables."""
    weights, quality = token_bytes(manifest), manifest.quality
    return {
        "m": manifest,
        "map": _map(manifest, points),
        "clusters": list(_clusters(manifest)),
        "metrics": list(_metrics(manifest, quality)) if quality else [],
        "chart": _chart(manifest),
        "noun": _noun(manifest),
        "unit": manifest.unit_neurons,
        "kept": units_of(manifest, manifest.plan),
        "ridges": [_ridge(value) for value in manifest.plan.ridges],
        "weights": weights,
        "screened": manifest.quantization["head"].format == "int8-planes",
        "reads": _reads(manifest, weights),
        "part_names": _part_names(weights),
        "rates": _RATES,
        "files": sorted(file_bytes.items()),
        "total": sum(file_bytes.values()),
    }


def _hue(cluster: int) -> str:
    """Colours of neighbouring numbers lie far apart."""
    return f"{cluster * _GOLDEN_DEGREES % 360:.0f}"


def _map(manifest: Manifest, points: Sequence[MapPoint]) -> dict[str, Any]:
    clusters = manifest.clusters
    xs = [cluster.map_x for cluster in clusters] + [point.x for point in points]
    ys = [cluster.map_y for cluster in clusters] + [point.y for point in points]
    most = max(cluster.num_sentences for cluster in clusters)
    rings = [
        {
            "cluster": index,
            "hue": _hue(index),
            "said": "\n".join([f"{index}. {cluster.label}", *cluster.examples]),
            "x": _scale(cluster.map_x, xs, _MAP_WIDTH),
            "y": _scale(cluster.map_y, ys, _MAP_HEIGHT),
            "radius": round(8 + 10 * (cluster.num_sentences / most) ** 0.5, 1),
        }
        for index, cluster in enumerate(clusters)
    ]
    dots = [
        {
            "cluster": point.cluster,
            "hue": _hue(point.cluster),
            "said": f"{point.cluster}. {clusters[point.cluster].label}\n{point.text or _HIDDEN}",
            "x": _scale(point.x, xs, _MAP_WIDTH),
            "y": _scale(point.y, ys, _MAP_HEIGHT),
        }
        for point in points
    ]
    hidden = sum(point.text is None for point in points)
    return {"width": _MAP_WIDTH, "height": _MAP_HEIGHT, "rings": rings, "dots": dots, "hidden": hidden}


def _scale(value: float, values: Sequence[float], size: int) -> float:
    low, high = min(values), max(values)
    share = (value - low) / (high - low) if high > low else 0.5
    return round(_MARGIN + share * (size - 2 * _MARGIN), 1)


def _clusters(manifest: Manifest) -> Iterator[dict[str, Any]]:
    kl = {entry.cluster: entry.score.kl for entry in manifest.quality.per_cluster} if manifest.quality else {}
    for index, record in enumerate(manifest.clusters):
        share = _share(kl.get(index, 0.0), max(kl.values(), default=0.0))
        token_share = default_share(manifest, index) if record.file is None else None
        found = {"record": record, "hue": _hue(index), "kl": kl.get(index), "share": share}
        choices = () if manifest.token_shares is None else manifest.token_shares.choices
        why = choice_in_words(choices[index]) if choices else None
        yield {**found, "token_share": token_share, "why": why}


def _metrics(manifest: Manifest, quality: Quality) -> Iterator[dict[str, Any]]:
    """Return one bar chart a metric: the clusters between the dense model and the controls, then token shares."""
    shares = () if manifest.token_shares is None else manifest.token_shares.scores
    scores = (quality.dense, quality.clusters, *quality.controls, *(found.score for found in shares))
    for name, note, field, form, greatest in (
        ("KL to the model", "nats a token; lower is better", "kl", "{:.3f}", None),
        ("Perplexity", "lower is better", "perplexity", "{:.2f}", None),
        ("Top-1 agreement with the model", "share of tokens; higher is better", "top1", "{:.3f}", 1.0),
    ):
        yield {"name": name, "note": note, "rows": _bars(scores, quality.clusters, field, form, greatest)}


def _bars(scores: Sequence[Score], own: Score, field: str, form: str, greatest: float | None) -> list[dict[str, Any]]:
    values = [float(getattr(score, field)) for score in scores]
    greatest = max(values) if greatest is None else greatest
    return [
        {"name": score.name, "value": form.format(value), "share": _share(value, greatest), "own": score is own}
        for score, value in zip(scores, values, strict=True)
    ]


def _share(value: float, greatest: float) -> float:
    return value / greatest if greatest > 0 else 0.0


def _chart(manifest: Manifest) -> dict[str, Any]:
    unit, noun = manifest.unit_neurons, _noun(manifest)
    budgets = [budget // unit for budget in manifest.plan.layer_budgets]
    ffn_dim = manifest.model.ffn_dim // unit
    pitch = _CHART_WIDTH / len(budgets)
    every = -(-len(budgets) // 12)
    columns = [
        {
            "layer": layer,
            "said": f"layer {layer}: {budget} of {ffn_dim} {noun}, keep ratio {budget / ffn_dim:.2f}",
            "x": round(layer * pitch, 2),
            "y": round(_CHART_TOP + _CHART_FULL * (1 - budget / ffn_dim), 1),
            "width": round(0.8 * pitch, 2),
            "height": round(_CHART_FULL * budget / ffn_dim, 1),
            "named": layer % every == 0,
        }
        for layer, budget in enumerate(budgets)
    ]
    sizes = {"width": _CHART_WIDTH, "height": _CHART_HEIGHT, "top": _CHART_TOP, "full": _CHART_FULL}
    return {**sizes, "columns": columns}


def _noun(manifest: Manifest) -> str:
    if manifest.lists_experts:
        return "neurons of all experts"
    if manifest.narrows_experts:
        return "neurons of each expert"
    return "neurons" if manifest.model.experts is None else "experts"


def _ridge(value: float | None) -> str:
    return "no repair" if value is None else f"{value:g}"


def _reads(manifest: Manifest, weights: TokenBytes) -> list[dict[str, Any]]:
    """Return bytes and speeds with a pack, or a thin cluster's share, and dense, as shares of the larger of both."""
    beside = weights.head + weights.other
    widest = max(weights.pack, weights.dense)
    share = mean_share(manifest) if manifest.has_thin else 1.0
    ffn = mean_ffn_bytes(manifest) if manifest.has_thin else float(weights.pack_ffn)
    own = "a cluster, thin or with a pack" if manifest.pack_files else "a thin cluster"
    name = f"With {own}, which reads {share:.2f} of the layers on average" if share < 1 else "With a cluster pack"
    dense = "with the dense FFN" if manifest.plan.dense else "with the dense FFN (not in this bundle)"
    return [
        {
            "name": name,
            "short": short,
            "total": ffn + attention + beside,
            "parts": [
                {"bytes": size, "share": size / widest} for size in (ffn, attention, weights.head, weights.other)
            ],
            "speeds": [_speed(rate * 1e9 / (ffn + attention + beside)) for rate in _RATES],
        }
        for name, short, ffn, attention in (
            (name, "cluster" if manifest.has_thin else "pack", ffn, weights.attention_at(share)),
            (dense.capitalize().replace("ffn", "FFN"), "dense", weights.dense_ffn, weights.attention),
        )
    ]


def _part_names(weights: TokenBytes) -> tuple[str, ...]:
    return _PARTS if weights.other else _PARTS[:-1]


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.0f}" if tokens_per_second >= 10 else f"{tokens_per_second:.1f}"
