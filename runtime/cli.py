"""`coreinfer-run`: generate from a bundle."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import click
from coreinfer.bundles.command import command_errors, start_logging
from coreinfer.bundles.errors import ConfigError

from .engine import Engine, Prompt, collect, load
from .engines import CudaGraphs, EngineName, Weights
from .generation import MODES, Mode, Token

__all__ = ["main"]


Stream = Callable[[Prompt], Iterator[Token]]
"""Generates with the options of the command line."""


@click.command(context_settings={"show_default": True})
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Talk: one turn a line, with history.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--system", default=None, help="System message.")
@click.option("-n", "--max-new-tokens", type=int, default=256, help="Decode at most so many tokens.")
@click.option("--temperature", type=float, default=0.0, help="0 decodes greedily.")
@click.option("--top-k", type=int, default=0, help="Sample from the k likeliest tokens; 0 is off.")
@click.option("--top-p", type=float, default=1.0, help="Sample from the likeliest tokens with this probability.")
@click.option("--min-p", type=float, default=0.0, help="Least probability, relative to the likeliest token.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 makes repetition less likely.")
@click.option("--seed", type=int, default=None, help="Seed of sampling.")
@click.option("--stop", multiple=True, help="End at this text; repeatable.")
@click.option("--mode", type=click.Choice(MODES), default="auto", help="How FFN weights are chosen.")
@click.option(
    "--engine",
    type=click.Choice(get_args(EngineName)),
    default="auto",
    help="native: C++ on the CPU; torch: any device; auto: native, but torch for a GPU, --device or --dtype.",
)
@click.option("--isa", default="auto", help="Kernels of the native engine, such as avx2; auto for the CPU's best.")
@click.option("--device", default="auto", help="torch device.")
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto", help="Arithmetic.")
@click.option("--threads", type=int, default=None, help="CPU threads.")
@click.option("--gpu-memory-mb", type=float, default=None, help="Bound of weights and KV cache on the GPU.")
@click.option("--cuda-graphs", type=click.Choice(get_args(CudaGraphs)), default="auto", help="Recorded decoding steps.")
@click.option("--weights", type=click.Choice(get_args(Weights)), default="auto", help="int4 on a GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the generation as one JSON object.")
@click.option("-v", "--verbose", is_flag=True, help="Log remarks on stderr.")
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
    mode: str,
    engine: EngineName,
    isa: str,
    device: str,
    dtype: str,
    threads: int | None,
    gpu_memory_mb: float | None,
    cuda_graphs: CudaGraphs,
    weights: Weights,
    as_json: bool,
    verbose: bool,
) -> None:
    """Generate from the bundle in DIR: an answer to PROMPT, or to standard input when there is none.

    The text goes to stdout, the figures to stderr. A prompt is put into the model's chat template when it has one;
    --raw continues it as plain text.
    """
    start_logging(verbose=verbose)
    if (chat or system) and raw:
        raise ConfigError("--raw goes with neither --chat nor --system; leave one out")
    loaded = load(
        bundle_dir,
        engine=engine,
        device=device,
        dtype=dtype,
        mode=cast(Mode, mode),
        threads=threads,
        isa=isa,
        gpu_memory_mb=gpu_memory_mb,
        cuda_graphs=cuda_graphs,
        weights=weights,
    )
    stream = partial(
        loaded.stream,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    if chat:
        _chat(loaded, stream, system, prompt, as_json=as_json)
        return
    text = prompt if prompt is not None else _from_stdin(sys.stdin.read)
    if not text.strip():
        raise ConfigError("prompt: expected text, got nothing; give it as an argument or on standard input")
    _answer(text if raw else _as_messages(loaded, text, system), stream, as_json=as_json)


def _as_messages(engine: Engine, text: str, system: str | None) -> Prompt:
    """Put a prompt into messages where the model has a chat template."""
    if engine.chat_template is None:
        if system:
            raise ConfigError("--system: this model has no chat template; put it into the prompt")
        return text
    return [*_system_message(system), {"role": "user", "content": text}]


def _system_message(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _answer(prompt: Prompt, stream: Stream, *, as_json: bool) -> str:
    """Generate one answer; print it as it comes, or as JSON at the end."""
    tokens: list[Token] = []
    for token in stream(prompt):
        tokens.append(token)
        if not as_json:
            click.echo(token.text, nl=False)
    generation = collect(tokens)
    if as_json:
        click.echo(json.dumps(asdict(generation), ensure_ascii=False))
    else:
        click.echo()
    click.echo(_figures(tokens), err=True)
    return generation.text


def _figures(tokens: Sequence[Token]) -> str:
    last = tokens[-1]
    distance = f"{last.distance:.3f}" + ("" if last.familiar else ", unlike calibration text")
    return (
        f"[cluster {last.cluster} ({last.cluster_label}), distance {distance}, mode {last.mode}; "
        f"{last.num_prompt_tokens} prompt tokens in {last.prefill_seconds:.2f} s, "
        f"{last.num_tokens} tokens at {last.decode_tokens_per_second:.1f} tok/s, {last.finish_reason}]"
    )


def _chat(engine: Engine, stream: Stream, system: str | None, first: str | None, *, as_json: bool) -> None:
    """Answer one line of standard input after another, keeping the history."""
    if engine.chat_template is None:
        raise ConfigError(f"--chat: {engine.manifest.model.name} has no chat template; leave --chat out")
    messages: list[dict[str, Any]] = _system_message(system)
    for line in _turns(first):
        messages.append({"role": "user", "content": line})
        text = _answer(messages, stream, as_json=as_json)
        messages.append({"role": "assistant", "content": text})


def _turns(first: str | None) -> Iterator[str]:
    """Yield what the user says until the end of input; the sign `>` is shown to people only."""
    if first:
        yield first
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = _from_stdin(sys.stdin.readline)
        if not line:
            return
        if line.strip():
            yield line.strip()


def _from_stdin(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"standard input: expected {error.encoding} text, got other bytes ({error.reason})"
        ) from error
