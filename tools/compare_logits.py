"""Compare each call's logits of the C library, built for another system, with this machine's engine, bit by bit.

tools/compare_logits.py BUNDLE [--tokens N] [--threads N] [--prompts FILE] PROGRAM...: a program made of tools/logits.c
and libcoreinfer, after the emulator that it needs. Both read the same tokens: those that are likeliest here. Exit
status 1 if a logit differs.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from coreinfer import runtime
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.options import GenerationOptions
from coreinfer.runtime.prompts.requests import read_request

__all__ = ["Calls", "compare", "expected_calls"]

PROMPTS = Path(__file__).parent / "edge_prompts.jsonl"
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What one prompt's calls read and return.

    Attributes:
        cluster: whose pack decodes.
        prompt_ids: which the first call reads.
        decoded_ids: of the other calls, one each.
        logits: (calls, vocab).
    """

    name: str
    cluster: int
    prompt_ids: tuple[int, ...]
    decoded_ids: tuple[int, ...]
    logits: Floats

    @property
    def line(self) -> str:
        """What tools/logits.c reads."""
        numbers = (
            *(self.cluster, len(self.prompt_ids), *self.prompt_ids),
            *(len(self.decoded_ids), *self.decoded_ids),
        )
        return " ".join(map(str, numbers))


def expected_calls(engine: runtime.Engine, prompt: Mapping[str, Any], num_tokens: int) -> Calls:
    """What this machine's engine returns, greedily, until a text ends or has `num_tokens` tokens.

    Args:
        prompt: a line of a batch: id, prompt, and whether it is raw.
    """
    options = GenerationOptions(raw=prompt.get("raw", False))
    request = read_request(engine.loaded, prompt["prompt"], options)
    decoder, cluster = engine.decoder, request.route.cluster
    decoder.truncate(0)
    decoder.use(DENSE if engine.manifest.has_dense else FfnChoice(cluster=0))
    logits = [decoder.forward(request.token_ids)[0].copy()]
    decoder.use(FfnChoice(cluster=cluster))
    decoded: list[int] = []
    while len(logits) < num_tokens and (next_id := int(logits[-1].argmax())) not in engine.eos_token_ids:
        decoded.append(next_id)
        logits.append(decoder.forward([next_id])[0].copy())
    return Calls(
        name=prompt["id"],
        cluster=cluster,
        prompt_ids=request.token_ids,
        decoded_ids=tuple(decoded),
        logits=np.stack(logits),
    )


def compare(calls: Calls, got: Floats) -> str | None:
    """Say where the first call differs, in one line; None where none does.

    Args:
        got: (calls, vocab).
    """
    differs = (calls.logits.view(np.uint32) != got.view(np.uint32)).any(axis=1)
    if not differs.any():
        return None
    first = int(differs.argmax())
    most = np.abs(calls.logits[first] - got[first]).max()
    return f"{int(differs.sum())} of {len(got)} calls differ, call {first} first, by {most:.3g} at most"


def _answers(program: Sequence[str], bundle: str, threads: int, expected: Sequence[Calls]) -> Floats:
    """The logits of all calls of a program, (calls, vocab)."""
    lines = "\n".join(calls.line for calls in expected)
    run = subprocess.run([*program, bundle, str(threads)], input=lines.encode(), stdout=subprocess.PIPE, check=False)
    if run.returncode:
        raise click.ClickException(f"{' '.join(program)}: expected exit status 0, got {run.returncode}")
    num_floats = sum(calls.logits.size for calls in expected)
    if len(run.stdout) != 4 * num_floats:
        raise click.ClickException(f"{' '.join(program)}: expected {4 * num_floats} bytes, got {len(run.stdout)}")
    return np.frombuffer(run.stdout, dtype=np.float32).reshape(-1, expected[0].logits.shape[1])


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("bundle", type=click.Path(exists=True, file_okay=False))
@click.argument("program", nargs=-1, required=True)
@click.option("--tokens", default=32, show_default=True, type=click.IntRange(1), help="Tokens of each answer.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="Threads, on both sides.")
@click.option("--prompts", type=click.Path(exists=True, path_type=Path), default=PROMPTS, help="A batch's lines.")
def main(bundle: str, program: tuple[str, ...], tokens: int, threads: int, prompts: Path) -> None:
    """Compare each call's logits with those of PROGRAM, which is tools/logits.c on another system."""
    engine = runtime.load(bundle, threads=threads)
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    expected = [expected_calls(engine, line, tokens) for line in lines]
    got = np.split(_answers(program, bundle, threads, expected), np.cumsum([len(c.logits) for c in expected])[:-1])
    found = {calls.name: compare(calls, logits) for calls, logits in zip(expected, got, strict=True)}
    for calls in expected:
        click.echo(
            f"{calls.name}: cluster {calls.cluster}, {found[calls.name] or f'same bits in {len(calls.logits)} calls'}"
        )
    same = sum(difference is None for difference in found.values())
    click.echo(f"{same} of {len(found)} prompts have the same bits, {sum(len(c.logits) for c in expected)} calls")
    sys.exit(same != len(found))


if __name__ == "__main__":
    main()
