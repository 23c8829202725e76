"""`coreinfer-run`: generate with a bundle."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.command import EXIT_ERROR, EXIT_INTERRUPTED, command_errors, fail, start_logging
from coreinfer.bundles.shared.command_options import field_option, field_options
from coreinfer.bundles.shared.ray_cluster import check_ray
from coreinfer.bundles.shared.ray_options import RayOptions
from coreinfer.runtime.engine import Engine, Prompt, load_engine
from coreinfer.runtime.generation import Token, collect
from coreinfer.runtime.load_options import LoadOptions
from coreinfer.runtime.options import GenerationOptions

from .printing import figures, from_stdin

__all__ = ["main"]


@click.command(context_settings={"show_default": True})
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@command_errors
@click.option("--chat", is_flag=True, help="Hold a conversation, one turn per line; /help lists commands.")
@field_option(GenerationOptions, "raw")
@click.option("--system", default=None, help="System message.  [default: none]")
@field_option(GenerationOptions, "max_new_tokens")
@field_options(GenerationOptions, "options", apart=("raw", "max_new_tokens"))
@click.option(
    "--batch",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="Answer each line of this JSON Lines file, many at once (docs/batches.md).  [default: none]",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=None, help="File for a batch's answers.  [default: none]"
)
@field_options(LoadOptions, "loading")
@field_options(RayOptions, "on_ray")
@click.option("--json", "as_json", is_flag=True, help="Print the generation as one JSON object.")
@click.option("-v", "--verbose", is_flag=True, help="Log progress on stderr.")
@click.version_option(package_name="coreinfer")
def main(
    bundle_dir: Path,
    prompt: str | None,
    chat: bool,
    system: str | None,
    options: GenerationOptions,
    batch: Path | None,
    output: Path | None,
    loading: LoadOptions,
    on_ray: RayOptions,
    as_json: bool,
    verbose: bool,
) -> None:
    """Generate with the bundle in DIR: an answer to PROMPT, or to standard input without PROMPT.

    DIR may also be hf:USER/NAME, https://... or s3://..., of which only what is needed is fetched (docs/sharing.md).

    The text goes to stdout, the figures to stderr. A prompt is put into the model's chat template, if it has one;
    --raw continues it as plain text. With --chat each line is a turn; exit code 2 means that a turn of piped input
    failed. With --batch FILE -o OUT each line of FILE gets a line of OUT; after an interruption the same command
    continues.
    """
    start_logging(verbose=verbose)
    if (batch is None) != (output is None):
        raise ConfigError("--batch and -o must be used together; give both or neither")
    if batch is not None and (prompt is not None or chat or system is not None or as_json):
        raise ConfigError(
            "--batch cannot be used with PROMPT, --chat, --system or --json; its lines contain all of that"
        )
    if (chat or system is not None) and options.raw:
        raise ConfigError("--raw cannot be used with --chat or --system; leave one out")
    if on_ray.ray is not None and batch is None:
        raise ConfigError("--ray: it is for --batch; give a file of requests, or leave it out")
    if batch is not None and output is not None:
        _answer_batch(bundle_dir, loading, on_ray, options, batch, output)
        return
    loaded = load_engine(bundle_dir, loading)
    if chat:
        _converse(loaded, prompt, system, options, as_json=as_json)
    else:
        _answer(loaded, _with_system(loaded, _text_of(prompt), system), options, as_json=as_json)


def _answer_batch(
    bundle_dir: Path, loading: LoadOptions, on_ray: RayOptions, options: GenerationOptions, batch: Path, output: Path
) -> None:
    try:
        if on_ray.ray is None:
            # Not at the top, as the chat.
            from .batch_file import answer_file

            answer_file(load_engine(bundle_dir, loading), options, batch, output)
        else:
            check_ray("--ray")
            from .batch_ray import answer_file_on_ray

            answer_file_on_ray(bundle_dir, loading, options, on_ray, batch, output)
    except KeyboardInterrupt:
        fail(f"interrupted; {output} keeps what is answered, and the same command goes on from there", EXIT_INTERRUPTED)


def _converse(
    engine: Engine, first: str | None, system: str | None, options: GenerationOptions, *, as_json: bool
) -> None:
    # Not at the top: one answer does without, and would wait some 5 ms for it.
    from .chat import chat as run_chat

    num_errors = run_chat(engine, options, system=system, first=first, as_json=as_json)
    # Whoever sits at a terminal has read them; a script has not.
    if num_errors and not sys.stdin.isatty():
        sys.exit(EXIT_ERROR)


def _text_of(prompt: str | None) -> str:
    text = prompt if prompt is not None else from_stdin(sys.stdin.read)
    if not text.strip():
        raise ConfigError("prompt: expected text, got nothing; give it as an argument or on standard input")
    return text


def _with_system(engine: Engine, text: str, system: str | None) -> Prompt:
    """Put a system message before a prompt; an empty one counts too."""
    if system is None:
        return text
    if engine.chat_template is None:
        raise ConfigError("--system: this model has no chat template; put it into the prompt")
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def _answer(engine: Engine, prompt: Prompt, options: GenerationOptions, *, as_json: bool) -> None:
    """Generate one answer; print it as it comes, or as JSON at the end."""
    tokens: list[Token] = []
    for token in engine.start(prompt, options):
        tokens.append(token)
        if not as_json:
            click.echo(token.text, nl=False)
    click.echo(json.dumps(asdict(collect(tokens)), ensure_ascii=False) if as_json else "")
    click.echo(figures(tokens[-1]), err=True)
