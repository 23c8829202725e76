"""A model card, README.md of a repository: what it is, how good it is, where it comes from, how to load it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from .manifest import Manifest, Score

__all__ = ["ModelCard", "write_card"]


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card says in addition to the bundle's manifest.

    Attributes:
        tags: of the Hub, such as "gguf".
        summary: what it is, a paragraph.
        usage: lines of Markdown that say how to load it.
        facts: name -> value, of the files.
        cluster: the only one whose pack is there; None for all or none.
    """

    title: str
    tags: tuple[str, ...]
    summary: str
    usage: tuple[str, ...]
    facts: dict[str, str] = field(default_factory=dict)
    cluster: int | None = None


def write_card(manifest: Manifest, card: ModelCard) -> str:
    """Write a card in Markdown, with the Hub's header."""
    return "\n".join(_lines(manifest, card)) + "\n"


def _lines(manifest: Manifest, card: ModelCard) -> Iterator[str]:
    yield from ("---", "tags:", *(f"- {tag}" for tag in ("coreinfer", *card.tags)), "---", "")
    yield from (f"# {card.title}", "", card.summary, "", *card.usage, "")
    if card.facts:
        yield from ("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in card.facts.items()), "")
    yield from _quality(manifest, card.cluster)
    yield from _clusters(manifest, card.cluster)
    yield from _provenance(manifest)


def _quality(manifest: Manifest, cluster: int | None) -> Iterator[str]:
    quality = manifest.quality
    yield from ("## Quality", "")
    if quality is None:
        yield from ("Not measured when the bundle was compiled.", "")
        return
    scores = {"dense model": quality.dense, "all packs, each on its own text": quality.clusters}
    own = [entry.score for entry in quality.per_cluster if entry.cluster == cluster]
    if own:
        scores["this pack, on held-out text of its cluster"] = own[0]
    yield from ("On held-out text, measured when the bundle was compiled.", "")
    yield "| | perplexity | KL to the dense model | top-1 agreement | tokens |"
    yield "|---|---|---|---|---|"
    yield from (_score_row(name, score) for name, score in scores.items())
    yield ""


def _score_row(name: str, score: Score) -> str:
    return f"| {name} | {score.perplexity:.2f} | {score.kl:.3f} | {score.top1:.3f} | {score.num_tokens} |"


def _clusters(manifest: Manifest, here: int | None) -> Iterator[str]:
    yield from ("## Clusters", "", "| | label | keep ratio | calibration tokens |", "|---|---|---|---|")
    for number, cluster in enumerate(manifest.clusters):
        place = f"{number} (here)" if number == here else str(number)
        kept = "thin" if cluster.file is None else f"{cluster.keep_ratio:.2f}"
        yield f"| {place} | {cluster.label} | {kept} | {cluster.num_tokens} |"
    yield ""


def _provenance(manifest: Manifest) -> Iterator[str]:
    origin = manifest.provenance
    yield from ("## Provenance", "", "| | |", "|---|---|")
    yield f"| coreinfer | {origin.coreinfer} |"
    yield f"| model | {manifest.model.name}, sha256 {origin.model_sha256 or 'not recorded'} |"
    yield f"| calibration text | sha256 {origin.corpus_sha256 or 'not recorded'} |"
    yield f"| packages | {', '.join(f'{name} {version}' for name, version in origin.packages.items())} |"
