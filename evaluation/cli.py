"""`coreinfer-eval`: measure the quality of bundles."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click
from coreinfer.bundles.shared.command import command_errors, start_logging
from coreinfer.bundles.shared.option_fields import command_help_of
from coreinfer.compiler.progress import TqdmProgress
from coreinfer.runtime.load_options import EngineName, LoadOptions

from .evaluate import DEFAULT_MODES, EvaluationConfig, evaluate
from .plot import check_plot, write_plot
from .records import Dataset
from .scores import MetricScore, Variant
from .subjects import MODES
from .tables import dataset_table, summary_table

__all__ = ["main"]


@click.command(context_settings={"show_default": True})
@click.argument("bundles", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", multiple=True, required=True, help="File, folder or pattern of JSON Lines; repeatable.")
@click.option("--against", default=None, help="Original model, the reference for KL.  [default: dense FFN]")
@click.option(
    "--mode", "modes", multiple=True, type=click.Choice(MODES), default=DEFAULT_MODES, help="How to decode; repeatable."
)
@click.option(
    "--llamacpp/--no-llamacpp",
    default=None,
    help="Evaluate llama.cpp's quantizations of --against.  [default: with a GGUF file, if it is installed]",
)
@click.option(
    "--limit", type=int, default=None, help="Maximum number of items per file, evenly spread.  [default: all]"
)
@click.option("--as-text", is_flag=True, help="Score all files as texts (KL, top-1, perplexity), not as tasks.")
@click.option("--max-tokens", type=int, default=256, help="Cut texts to this many tokens.")
@click.option("--engine", type=click.Choice(get_args(EngineName)), default="auto", help="Engine of the bundles.")
@click.option("--threads", type=int, default=None, help="Number of CPU threads.  [default: all cores]")
@click.option("--memory-mb", type=float, default=None, help=command_help_of(LoadOptions, "memory_mb"))
@click.option(
    "--token-share",
    "token_shares",
    multiple=True,
    type=float,
    help="Run dense and similarity at this token share too; repeatable.  [default: the bundle's own]",
)
@click.option("--seed", type=int, default=0, help="Seed of the bootstrap.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    default=None,
    help="Plot KL over bytes to this .png or .svg file.  [default: no plot]",
)
@click.option("--json", "as_json", is_flag=True, help="Print all scores as one JSON object.")
@click.option("-v", "--verbose", is_flag=True, help="Log progress on stderr.")
@click.version_option(package_name="coreinfer")
@command_errors
@click.pass_context
def main(context: click.Context, /, **_options: object) -> None:
    """Score the bundles in DIR... and compare them with the dense model and controls of the same bytes.

    The beginning of a data file's name tells its task: lm_, code_ (texts), completion_, ie_, mc_ (multiple choice),
    summarization_, translation_, prompts_ (along the reference's own answers). Each score has a 95% interval.
    """
    options = context.params
    start_logging(verbose=options["verbose"])
    if options["plot"]:
        check_plot(options["plot"])
    result = evaluate(_config(options), TqdmProgress(), None if options["as_json"] else _show)
    if options["as_json"]:
        click.echo(json.dumps(asdict(result), ensure_ascii=False))
    else:
        click.echo("\n".join(summary_table(result)))
    if options["plot"]:
        write_plot(result, options["plot"])


def _config(options: dict[str, Any]) -> EvaluationConfig:
    own = {name: value for name, value in options.items() if name not in ("plot", "as_json", "verbose")}
    return EvaluationConfig(**own)


def _show(dataset: Dataset, rows: Sequence[Variant], scores: Sequence[MetricScore]) -> None:
    click.echo("\n".join(dataset_table(dataset.name, rows, scores)))
