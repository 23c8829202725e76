"""The report that ships in a bundle: one self-contained page."""

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from coreinfer.bundles.manifest import Manifest

__all__ = ["write_report"]

_WIDTH, _HEIGHT, _MARGIN = 400, 240, 30


def write_report(path: Path, manifest: Manifest) -> None:
    """Write what was compiled as a page: quality, clusters and their map, layer budgets, origin."""
    template = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    # Cluster examples are other people's text: autoescape keeps it text.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    quality = manifest.quality
    scores = [quality.dense, quality.clusters, *quality.controls] if quality else []
    page = environment.from_string(template).render(
        m=manifest,
        scores=scores,
        points=_points(manifest),
        kl={entry.cluster: f"{entry.score.kl:.3f}" for entry in quality.per_cluster} if quality else {},
    )
    path.write_text(page, encoding="utf-8")


def _points(manifest: Manifest) -> list[dict[str, Any]]:
    """Place the clusters on the map, with an area by their number of sentences."""
    xs = [cluster.map_x for cluster in manifest.clusters]
    ys = [cluster.map_y for cluster in manifest.clusters]
    most = max(cluster.num_sentences for cluster in manifest.clusters)
    return [
        {
            "id": index,
            "label": cluster.label,
            "x": round(_scale(cluster.map_x, xs, _WIDTH), 1),
            "y": round(_scale(cluster.map_y, ys, _HEIGHT), 1),
            "r": round(6 + 16 * (cluster.num_sentences / most) ** 0.5, 1),
        }
        for index, cluster in enumerate(manifest.clusters)
    ]


def _scale(value: float, values: list[float], size: int) -> float:
    low, high = min(values), max(values)
    share = (value - low) / (high - low) if high > low else 0.5
    return _MARGIN + share * (size - 2 * _MARGIN)
