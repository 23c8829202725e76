"""`coreinfer-run`: generate with a bundle."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.command import EXIT_ERROR, EXIT_INTERRUPTED, command_errors, fail, start_logging
from coreinfer.runtime.engine import Engine, Prompt
from coreinfer.runtime.generation import Token, collect
from coreinfer.runtime.options import GenerationOptions

from .load_options import LoadOptions, load_options
from .printing import figures, from_stdin

__all__ = ["main"]


@click.command(context_settings={"show_default": True})
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Hold a conversation, one turn per line; /help lists commands.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--system", default=None, help="System message.  [default: none]")
@click.option("-n", "--max-new-tokens", type=int, default=256, help="Maximum number of tokens to decode.")
@click.option("--temperature", type=float, default=0.0, help="Temperature of sampling; 0 decodes greedily.")
@click.option("--top-k", type=int, default=0, help="Sample from the k likeliest tokens; 0 for all.")
@click.option(
    "--top-p", type=float, default=1.0, help="Sample from the likeliest tokens that together reach this probability."
)
@click.option("--min-p", type=float, default=0.0, help="Minimum probability of a token, relative to the likeliest one.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 makes repetition less likely.")
@click.option("--seed", type=int, default=None, help="Seed of sampling.  [default: a new one each time]")
@click.option("--stop", multiple=True, help="End the answer at this text; repeatable.  [default: none]")
@click.option("--show-special", is_flag=True, help="Show control tokens in the text.")
@click.option("--parse-special", is_flag=True, help="Read names of control tokens in messages as control tokens.")
@click.option(
    "--chat-template-kwargs", default=None, help="Variables for the chat template, as a JSON object.  [default: none]"
)
@click.option(
    "--batch",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="Answer each line of this JSON Lines file, many at once (docs/batches.md).  [default: none]",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=None, help="File for a batch's answers.  [default: none]"
)
@load_options
@click.option("--json", "as_json", is_flag=True, help="Print the generation as one JSON object.")
@click.option("-v", "--verbose", is_flag=True, help="Log progress on stderr.")
@click.version_option(package_name="coreinfer")
@command_errors
def main(
    bundle_dir: Path,
    prompt: str | None,
    chat: bool,
    raw: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: tuple[str, ...],
    show_special: bool,
    parse_special: bool,
    chat_template_kwargs: str | None,
    batch: Path | None,
    output: Path | None,
    loading: LoadOptions,
    as_json: bool,
    verbose: bool,
) -> None:
    """Generate with the bundle in DIR: an answer to PROMPT, or to standard input without PROMPT.

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
    if (chat or system is not None) and raw:
        raise ConfigError("--raw cannot be used with --chat or --system; leave one out")
    loaded = loading.load(bundle_dir)
    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        raw=raw,
        skip_special_tokens=not show_special,
        parse_special=parse_special,
        chat_template_kwargs=_variables(chat_template_kwargs),
    )
    if batch is not None and output is not None:
        _answer_batch(loaded, options, batch, output)
    elif chat:
        _converse(loaded, prompt, system, options, as_json=as_json)
    else:
        _answer(loaded, _with_system(loaded, _text_of(prompt), system), options, as_json=as_json)


def _answer_batch(engine: Engine, options: GenerationOptions, batch: Path, output: Path) -> None:
    # Not at the top, as the chat.
    from .batch_file import answer_file

    try:
        answer_file(engine, options, batch, output)
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


def _variables(text: str | None) -> Mapping[str, Any] | None:
    """Read --chat-template-kwargs; `GenerationOptions` checks the values."""
    if text is None:
        return None
    try:
        found: Mapping[str, Any] = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--chat-template-kwargs: expected a JSON object, got other text: {error}") from error
    return found


def _answer(engine: Engine, prompt: Prompt, options: GenerationOptions, *, as_json: bool) -> None:
    """Generate one answer; print it as it comes, or as JSON at the end."""
    tokens: list[Token] = []
    for token in engine.start(prompt, options):
        tokens.append(token)
        if not as_json:
            click.echo(token.text, nl=False)
    click.echo(json.dumps(asdict(collect(tokens)), ensure_ascii=False) if as_json else "")
    click.echo(figures(tokens[-1]), err=True)
