"""`coreinfer-inspect`: show what a bundle contains, and verify it."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .expert_packs import units_of
from .layout import LAYOUT
from .manifest import Manifest, ModelRecord, Quality, Score, read_manifest
from .pack_choices import choice_in_words
from .reader import find_problems
from .shared.command import EXIT_ERROR, command_errors
from .token_shares import default_share, shares_in_words

__all__ = ["describe", "main", "unlisted_files"]


@click.command()
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Check every checksum, shape and dtype; exit 2 if anything is wrong.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest (and the problems found) as JSON.")
@click.version_option(package_name="coreinfer")
@command_errors
def main(bundle_dir: Path, verify: bool, as_json: bool) -> None:
    """Show the model, clusters, layer budgets, quality, sizes and origin of the bundle in DIR."""
    manifest = read_manifest(bundle_dir)
    problems = find_problems(bundle_dir, manifest) + unlisted_files(bundle_dir, manifest) if verify else []
    if as_json:
        click.echo(json.dumps(_as_json(manifest, problems if verify else None), ensure_ascii=False))
    else:
        click.echo("\n".join(describe(manifest)))
        if verify and not problems:
            click.echo(f"verified   {len(manifest.files)} files, no problems")
    if not as_json:
        for problem in problems:
            click.echo(f"problem: {problem}", err=True)
    if problems:
        sys.exit(EXIT_ERROR)


def unlisted_files(bundle_dir: Path, manifest: Manifest) -> list[str]:
    """Name the files in a bundle's folder that its manifest does not list."""
    paths = sorted(path.relative_to(bundle_dir).as_posix() for path in bundle_dir.rglob("*") if path.is_file())
    return [f"{name}: not listed in the manifest" for name in paths if name not in {*manifest.files, LAYOUT.manifest}]


def describe(manifest: Manifest) -> Iterator[str]:
    """Describe a bundle in lines of text."""
    model, plan = manifest.model, manifest.plan
    yield f"model      {model.name}"
    yield f"           {model.family}, {model.num_layers} layers, hidden {model.hidden_size}, {_ffn(model)}"
    formats = ", ".join(f"{group} {record.format}" for group, record in manifest.quantization.items())
    yield f"formats    {formats}"
    if not manifest.pack_files:
        yield "plan       thin clusters: each decodes with the dense FFN, by thresholds and a share of its own"
    else:
        yield (
            f"plan       {plan.selection}, keep {plan.keep:g}, budgets {plan.budgets}, "
            f"cluster weight {plan.cluster_weight:g}, {'repaired' if plan.reconstruct else 'not repaired'}, "
            f"{'with' if plan.dense else 'without'} the dense FFN"
        )
        own = ", on average; clusters have their own" if manifest.has_own_budgets else ""
        yield f"budgets    {' '.join(units_of(manifest, plan))} of {_all_units(manifest)}{own}"
        if manifest.has_thin:
            num_thin = len(manifest.clusters) - len(manifest.pack_files)
            yield f"           {num_thin} of {len(manifest.clusters)} clusters are thin: they decode with the dense FFN"
    yield from _describe_clusters(manifest)
    yield from _describe_token_shares(manifest)
    yield from _describe_quality(manifest.quality)
    yield from _describe_spread(manifest)
    yield from _describe_files(manifest)
    origin = manifest.provenance
    yield f"origin     coreinfer {origin.coreinfer}, model sha256 {origin.model_sha256[:12]}, encoder {origin.encoder}"
    yield f"           {', '.join(f'{name} {version}' for name, version in origin.packages.items())}"


def _ffn(model: ModelRecord) -> str:
    if model.experts is None:
        return f"ffn {model.ffn_dim}"
    return f"{model.experts.num_experts} experts of {model.expert_neurons}, {model.experts.num_chosen} a token"


def _all_units(manifest: Manifest) -> str:
    model = manifest.model
    if manifest.lists_experts and model.experts is not None:
        return f"{model.experts.num_experts} experts x {model.expert_neurons} neurons"
    if manifest.narrows_experts:
        return f"{model.expert_neurons} neurons of each expert"
    return str(model.ffn_dim) if model.experts is None else f"{model.experts.num_experts} experts"


def _describe_clusters(manifest: Manifest) -> Iterator[str]:
    router = manifest.router
    agreement = "" if router.agreement is None else f", routes {router.agreement:.0%} like the sentence encoder"
    yield f"router     {router.encoder}, distance p99 {router.distance_p99:.3f}{agreement}"
    yield f"clusters   {len(manifest.clusters)}"
    for index, cluster in enumerate(manifest.clusters):
        yield (
            f"  {index:3d}  {cluster.label}: {cluster.num_sentences} sentences, {cluster.num_tokens} tokens, "
            f"{_what_decodes(manifest, index)}"
        )
        if manifest.token_shares is not None and manifest.token_shares.choices:
            yield f"         {choice_in_words(manifest.token_shares.choices[index])}"
        if manifest.has_own_budgets and cluster.file is not None:
            yield f"         budgets {' '.join(units_of(manifest, cluster))}"
        yield from (f"         - {example}" for example in cluster.examples)


def _what_decodes(manifest: Manifest, index: int) -> str:
    cluster = manifest.clusters[index]
    if cluster.file is None:
        return f"thin, share {default_share(manifest, index):g}"
    return f"keep {cluster.keep_ratio:.2f}, {cluster.ffn_bytes / 1e6:.1f} MB"


def _describe_token_shares(manifest: Manifest) -> Iterator[str]:
    if (record := manifest.token_shares) is not None:
        yield f"token      {shares_in_words(manifest, record)}"
        if record.scores:
            yield f"  {'':30s} {'perplexity':>10s} {'KL':>7s} {'top-1':>6s}   read"
        yield from (f"{_score_line(found.score)}  {found.read:.3f}" for found in record.scores)


def _describe_quality(quality: Quality | None) -> Iterator[str]:
    if quality is None:
        yield "quality    not measured"
        return
    yield f"quality    on {quality.clusters.num_texts} held-out texts, {quality.clusters.num_tokens} tokens"
    yield f"  {'':30s} {'perplexity':>10s} {'KL':>7s} {'top-1':>6s}"
    yield from (_score_line(score) for score in (quality.dense, quality.clusters, *quality.controls))
    yield from (_score_line(entry.score) for entry in quality.per_cluster)


def _describe_spread(manifest: Manifest) -> Iterator[str]:
    """Where clusters are thin, whose shares are to keep each within a quality: the mean over them, and the worst."""
    if manifest.has_thin and manifest.quality is not None and manifest.quality.per_cluster:
        worst = max(manifest.quality.per_cluster, key=lambda entry: entry.score.kl)
        mean = sum(entry.score.kl for entry in manifest.quality.per_cluster) / len(manifest.quality.per_cluster)
        yield f"           KL over clusters: mean {mean:.3f}, worst {worst.score.kl:.3f} (cluster {worst.cluster})"


def _score_line(score: Score) -> str:
    return f"  {score.name[:30]:30s} {score.perplexity:10.2f} {score.kl:7.3f} {score.top1:6.3f}"


def _describe_files(manifest: Manifest) -> Iterator[str]:
    total = sum(record.bytes for record in manifest.files.values())
    yield f"files      {len(manifest.files)}, {total / 1e6:.1f} MB"
    yield from (f"  {record.bytes / 1e6:9.2f} MB  {name}" for name, record in manifest.files.items())


def _as_json(manifest: Manifest, problems: list[str] | None) -> dict[str, Any]:
    data = asdict(manifest)
    return data if problems is None else {**data, "problems": problems}
