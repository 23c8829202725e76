"""`coreinfer-compile`: the compiler's command."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import click
from coreinfer.bundles.errors import ConfigError, CoreInferError
from coreinfer.bundles.manifest import Manifest
from coreinfer.bundles.pack_choices import choice_in_words
from coreinfer.bundles.shared.command import command_errors, start_logging
from coreinfer.bundles.shared.command_options import GroupedCommand, GroupedOption, click_options
from coreinfer.bundles.shared.extras import needs_extra
from coreinfer.bundles.token_shares import shares_in_words

from . import compile_model
from .checks import find_inputs
from .config import GROUPS, MACHINE, CompileConfig
from .drawing import command_progress
from .estimate.machine import measure_worker
from .estimate.plan import make_plan
from .estimate.view import plan_fields, plan_lines
from .models.primitives import keep_few_primitives
from .progress import Progress
from .stage_store import default_cache_dir

__all__ = ["default_cache_dir", "main", "summary"]

_log = logging.getLogger(__name__)
_LEAST_SECONDS = 0.05
"""Of a stage, to be listed for a worker."""
_FORECAST_SECONDS = 0.6
"""For measuring the machine at the beginning of a compile that draws a bar."""


@click.command(
    cls=GroupedCommand,
    groups=GROUPS,
    params=click_options(CompileConfig),
    context_settings={"show_default": True, "max_content_width": 120},
)
@click.option("--no-cache", cls=GroupedOption, group=MACHINE, is_flag=True, help="Do not keep stage results.")
@click.option(
    "--dry-run",
    cls=GroupedOption,
    group=MACHINE,
    is_flag=True,
    help="Compile nothing: print seconds, memory, disk, bytes a token and tok/s to expect, within about ten seconds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Log progress on stderr.")
@click.version_option(package_name="coreinfer")
@command_errors
@click.pass_context
def main(context: click.Context, /, **_options: object) -> None:
    """Compile a language model into a bundle of narrow, cluster-specific FFNs."""
    options = context.params
    start_logging(verbose=options["verbose"])
    keep_few_primitives()
    config = _config(options)
    if options["dry_run"]:
        _dry_run(config, as_json=options["as_json"])
        return
    with command_progress(partial(_forecast, config)) as progress:
        manifest = compile_model(config, progress)
    if options["as_json"]:
        stages: dict[str, Any] = {
            "stage_seconds": progress.stage_seconds,
            "stage_peak_bytes": progress.stage_peak_bytes,
        }
        if progress.workers:
            stages["workers"] = progress.workers
        click.echo(json.dumps({**asdict(manifest), **stages}, ensure_ascii=False))
    else:
        click.echo("\n".join(summary(config.output, manifest, progress)))


def _dry_run(config: CompileConfig, *, as_json: bool) -> None:
    with needs_extra("planning a compile", "compile"):
        plan = make_plan(config, find_inputs(config), partial(measure_worker, config))
    click.echo(json.dumps(plan_fields(plan)) if as_json else "\n".join(plan_lines(plan)))


def _forecast(config: CompileConfig) -> list[tuple[str, float]]:
    """Foretell the stages' seconds; nothing for options that cannot be planned."""
    try:
        measure = partial(measure_worker, config, seconds=_FORECAST_SECONDS)
        plan = make_plan(config, find_inputs(config), measure)
    except CoreInferError as error:
        _log.info("no time left is shown: %s", error)
        return []
    return [(stage.name, stage.seconds) for stage in plan.stages]


def _config(options: Mapping[str, Any]) -> CompileConfig:
    """Take the options that are fields of `CompileConfig`; each has its field's name."""
    values = {field.name: options[field.name] for field in fields(CompileConfig)}
    if options["no_cache"] and values["cache_dir"]:
        raise ConfigError("--cache and --no-cache: expected one of them, got both")
    values["cache_dir"] = None if options["no_cache"] else values["cache_dir"] or default_cache_dir()
    return CompileConfig(**values)


def summary(output: Path, manifest: Manifest, progress: Progress) -> Iterator[str]:
    """Summarise what was compiled: sizes, quality, seconds and memory of each stage."""
    total = sum(record.bytes for record in manifest.files.values())
    yield f"bundle     {output}, {total / 1e6:.1f} MB, {len(manifest.clusters)} clusters"
    yield f"FFN        {_ffn_bytes(manifest)}"
    if manifest.token_shares is not None:
        yield f"token      {shares_in_words(manifest, manifest.token_shares)}"
        for choice in manifest.token_shares.choices:
            yield f"  {choice.cluster:3d}      {choice_in_words(choice)}"
    if manifest.quality:
        yield f"           {'':20s} {'perplexity':>10s} {'KL':>7s} {'top-1':>6s}"
        for score in (manifest.quality.dense, manifest.quality.clusters, *manifest.quality.controls):
            yield f"           {score.name:20s} {score.perplexity:10.2f} {score.kl:7.3f} {score.top1:6.3f}"
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in progress.stage_seconds.items())
    yield f"seconds    {sum(progress.stage_seconds.values()):.1f}: {stages}"
    peaks = ", ".join(f"{name} {peak / 1e9:.2f}" for name, peak in progress.stage_peak_bytes.items())
    if peaks:
        yield f"GB         {max(progress.stage_peak_bytes.values()) / 1e9:.2f} resident at most; by the end of {peaks}"
    for number, worker in enumerate(progress.workers):
        seconds, replaced = worker["stage_seconds"], worker["num_replaced"]
        stages = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if value >= _LEAST_SECONDS)
        yield (
            f"worker {number:<3d} {sum(seconds.values()):.1f} s: {stages}; {worker['peak_bytes'] / 1e9:.2f} GB, "
            f"{sum(worker['sent_bytes'].values()) / 1e6:.1f} MB sent, {replaced} times replaced"
        )


def _ffn_bytes(manifest: Manifest) -> str:
    dense = f"{manifest.ffn_bytes / 1e6:.1f} MB"
    if not manifest.pack_files:
        return f"{dense} a token, the dense FFN with all clusters"
    if manifest.has_thin:
        num_thin = len(manifest.clusters) - len(manifest.pack_files)
        mean = f"{manifest.mean_pack_bytes / 1e6:.1f} MB a token on average"
        return f"{mean}, {dense} dense, with which {num_thin} of {len(manifest.clusters)} clusters decode"
    keeps = [cluster.keep_ratio for cluster in manifest.clusters]
    # A token reads as many experts whatever is kept of them.
    has_some = manifest.model.experts is not None and (manifest.lists_experts or not manifest.narrows_experts)
    mean_keep = sum(keeps) / len(keeps) if has_some else manifest.mean_pack_bytes / manifest.ffn_bytes
    spread = "" if min(keeps) == max(keeps) else f", clusters {min(keeps):.3f} to {max(keeps):.3f}"
    return f"{manifest.mean_pack_bytes / 1e6:.1f} MB a token with a pack, {dense} dense (keep {mean_keep:.3f}{spread})"
