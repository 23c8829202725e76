"""`coreinfer-compile`: the compiler's command."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import click
from coreinfer.bundles.command import command_errors, start_logging
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.manifest import Manifest
from coreinfer.bundles.statistics import SELECTIONS

from . import compile_model
from .config import BUILTIN, Budgets, CompileConfig, DType, Format, HealOptimizer, Removal
from .primitives import keep_few_primitives
from .progress import Progress, TqdmProgress

__all__ = ["NumberOr", "default_cache_dir", "main", "summary"]


class NumberOr(click.ParamType[Any]):
    """A number, or one given word."""

    def __init__(self, number: type[int] | type[float], word: str) -> None:
        self.number, self.word = number, word
        self.name = f"{number.__name__}|{word}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Take the word as it is, and anything else as a number; click says so where it is none."""
        if value == self.word:
            return value
        try:
            return self.number(value)
        except ValueError:
            return self.fail(f"expected a number or {self.word}, got {value!r}", param, ctx)


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True, help="Hub id, folder, .gguf file, or package:NAME/PATH.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write the bundle to.")
@click.option(
    "--clusters", type=NumberOr(int, "auto"), default=32, help="How many; auto: fewest of nearly the best KL."
)
@click.option("--keep", type=float, default=0.7, help="Kept neurons / all neurons, in (0, 1].")
@click.option(
    "--budget-mb", type=float, default=None, help="Instead of --keep: MB of weights read for a token.  [default: none]"
)
@click.option(
    "--max-kl",
    type=float,
    default=None,
    help="Instead of --keep: each cluster's greatest KL on held-out text.  [default: none]",
)
@click.option(
    "--min-top1",
    type=float,
    default=None,
    help="Instead of --keep: each cluster's least top-1 agreement there.  [default: none]",
)
@click.option("--encoder", default=None, help="Sentence encoder that clusters.  [default: all-MiniLM-L6-v2]")
@click.option(
    "--calibration",
    multiple=True,
    default=(BUILTIN,),
    help="builtin, a .jsonl, .parquet or text file, a folder of them, or hf:NAME[:split[:field]]; repeatable.",
)
@click.option("--text-field", default="text", help="Field that holds the text in JSON Lines and Parquet.")
@click.option("--calibration-tokens", type=int, default=100_000, help="Calibrate on at most so many tokens.")
@click.option("--document-tokens", type=int, default=256, help="Cut longer texts into pieces of so many tokens.")
@click.option("--selection", type=click.Choice(SELECTIONS), default="output-aware", help="How neurons are scored.")
@click.option("--alpha", type=float, default=0.4, help="coreinfer: share of positive activations that are core.")
@click.option("--beta", type=float, default=0.4, help="coreinfer: share of neurons that are core for a sentence.")
@click.option(
    "--cluster-weight",
    type=NumberOr(float, "auto"),
    default=None,
    help="Weight of a cluster's own moments, auto: chosen for the repair.  [default: 0.3 for output-aware, else 1]",
)
@click.option(
    "--budgets", type=click.Choice(get_args(Budgets)), default="sensitivity", help="How layers share the neurons."
)
@click.option("--min-layer-keep", type=float, default=0.15, help="Least keep ratio of a layer, unless uniform.")
@click.option(
    "--removal",
    type=click.Choice(get_args(Removal)),
    default=None,
    help="Which neurons go.  [default: second-order for output-aware with a repair, else top-k]",
)
@click.option("--reconstruct/--no-reconstruct", default=True, help="Repair the down projections.")
@click.option("--carry/--no-carry", default=True, help="Repair each layer on what narrowed layers hand on.")
@click.option(
    "--repair-rounding/--no-repair-rounding", default=False, help="Repair each layer on what rounded weights hand on."
)
@click.option("--ridge", type=NumberOr(float, "auto"), default="auto", help="Relative ridge of the repair, or auto.")
@click.option(
    "--heal-steps",
    type=int,
    default=0,
    help="Distil the dense model into the packs for so many steps, on text beyond the calibration tokens, if any.",
)
@click.option("--heal-cluster-steps", type=int, default=0, help="Then so many steps of each cluster's own.")
@click.option(
    "--heal-rate",
    type=float,
    default=2e-3,
    help="Greatest learning rate of these steps, relative to each matrix's root mean square.",
)
@click.option(
    "--heal-optimizer",
    type=click.Choice(get_args(HealOptimizer)),
    default="adamw",
    help="What takes these steps; muon computes in bfloat16, which not every CPU does fast.",
)
@click.option("--quantize", type=click.Choice(get_args(Format)), default="int4", help="Format of FFN and attention.")
@click.option(
    "--head-quantize",
    type=click.Choice(get_args(Format)),
    default=None,
    help="Format of embedding and head.  [default: int8, bf16 with --quantize bf16]",
)
@click.option("--dense/--no-dense", default=True, help="Put the dense FFN into the bundle.")
@click.option("--evaluate/--no-evaluate", default=True, help="Measure quality on held-out text.")
@click.option("--controls/--no-controls", default=True, help="Compile and measure controls beside it; twice the time.")
@click.option(
    "--report-sentences",
    type=int,
    default=None,
    help="Calibration sentences that report.html shows on its map.  [default: 400, text of builtin ones only]",
)
@click.option("--seed", type=int, default=0, help="Seed of sampling, splitting and clustering.")
@click.option("--threads", type=int, default=None, help="CPU threads.  [default: all cores]")
@click.option("--device", default="cpu", help="torch device that runs the model.")
@click.option("--dtype", type=click.Choice(get_args(DType)), default="auto", help="Arithmetic of the forward passes.")
@click.option(
    "--max-memory",
    type=float,
    default=None,
    help="Gigabytes to get by with: weights stay in their file (safetensors).  [default: the model is loaded]",
)
@click.option(
    "--cache",
    "cache_dir",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder of stage results.  [default: COREINFER_CACHE, else coreinfer in the cache folder]",
)
@click.option("--no-cache", is_flag=True, help="Keep no stage results.")
@click.option("--force", is_flag=True, help="Replace an existing bundle, once the new one is whole.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Log remarks on stderr.")
@click.version_option(package_name="coreinfer")
@command_errors
@click.pass_context
def main(context: click.Context, /, **_options: object) -> None:
    """Compile a language model into a bundle of narrow, cluster-specific FFNs."""
    options = context.params
    start_logging(verbose=options["verbose"])
    keep_few_primitives()
    config = _config(options)
    progress = TqdmProgress()
    manifest = compile_model(config, progress)
    if options["as_json"]:
        stages = {"stage_seconds": progress.stage_seconds, "stage_peak_bytes": progress.stage_peak_bytes}
        click.echo(json.dumps({**asdict(manifest), **stages}, ensure_ascii=False))
    else:
        click.echo("\n".join(summary(config.output, manifest, progress)))


def _config(options: Mapping[str, Any]) -> CompileConfig:
    """Take the options that are fields of `CompileConfig`; each has its field's name."""
    values = {field.name: options[field.name] for field in fields(CompileConfig)}
    source = click.get_current_context().get_parameter_source("keep")
    aims = [name for name in ("budget_mb", "max_kl", "min_top1") if values[name] is not None]
    if aims and source is not click.core.ParameterSource.DEFAULT:
        option = f"--{aims[0].replace('_', '-')}"
        raise ConfigError(f"--keep and {option}: expected one of them, got both")
    if options["no_cache"] and values["cache_dir"]:
        raise ConfigError("--cache and --no-cache: expected one of them, got both")
    values["cache_dir"] = None if options["no_cache"] else values["cache_dir"] or default_cache_dir()
    return CompileConfig(**values)


def default_cache_dir() -> Path:
    """Folder of stage results: COREINFER_CACHE, else coreinfer under the user's cache folder."""
    if folder := os.environ.get("COREINFER_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coreinfer"


def summary(output: Path, manifest: Manifest, progress: Progress) -> Iterator[str]:
    """Say what was compiled: sizes, quality, seconds and memory a stage."""
    total = sum(record.bytes for record in manifest.files.values())
    keeps = [cluster.keep_ratio for cluster in manifest.clusters]
    mean_keep = manifest.mean_pack_bytes / manifest.ffn_bytes
    spread = "" if min(keeps) == max(keeps) else f", clusters {min(keeps):.3f} to {max(keeps):.3f}"
    yield f"bundle     {output}, {total / 1e6:.1f} MB, {len(manifest.clusters)} clusters"
    yield (
        f"FFN        {manifest.mean_pack_bytes / 1e6:.1f} MB a token with a pack, {manifest.ffn_bytes / 1e6:.1f} MB "
        f"dense (keep {mean_keep:.3f}{spread})"
    )
    if manifest.quality:
        yield f"           {'':20s} {'perplexity':>10s} {'KL':>7s} {'top-1':>6s}"
        for score in (manifest.quality.dense, manifest.quality.clusters, *manifest.quality.controls):
            yield f"           {score.name:20s} {score.perplexity:10.2f} {score.kl:7.3f} {score.top1:6.3f}"
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in progress.stage_seconds.items())
    yield f"seconds    {sum(progress.stage_seconds.values()):.1f}: {stages}"
    peaks = ", ".join(f"{name} {peak / 1e9:.2f}" for name, peak in progress.stage_peak_bytes.items())
    if peaks:
        yield f"GB         {max(progress.stage_peak_bytes.values()) / 1e9:.2f} resident at most; by the end of {peaks}"
