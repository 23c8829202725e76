"""Compare two machines' answers to the same batch: tools/compare_answers.py EXPECTED.jsonl GOT.jsonl.

Both come from `coreinfer-run --batch` at temperature 0, with `logprobs` in each line. Kernels of different machines add
in different orders, so that some activations are rounded to the next int8 number, and logits differ as they do from
those of unrounded activations. A greedy text may therefore part where two tokens are about as likely, and only there:
exit status 1 where it parts elsewhere, or where another cluster was chosen.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

__all__ = ["NEAR_TIE_NATS", "Comparison", "compare"]

NEAR_TIE_NATS = 0.5
"""How much likelier the expected token may be than the one that was decoded in its place.

Log-probabilities of the five likeliest tokens differ by 0.10 in the mean, 0.29 at p95 and 0.92 at most between the AVX2
and the portable kernels of one machine (SmolLM2-135M, packs of the demo, tools/edge_prompts.jsonl, 32 tokens each).
"""

Answer = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of two answers to one prompt.

    Attributes:
        num_tokens: that were expected.
        num_same: tokens before the first difference.
        lost_nats: how much likelier the expected token was there, on the machine that expected it; infinite if the
            token was not among those that it names. 0 if the answers are the same.
        same_cluster: whether both decoded with the same cluster.
    """

    num_tokens: int
    num_same: int
    lost_nats: float
    same_cluster: bool

    @property
    def good(self) -> bool:
        """Whether nothing but rounding explains the difference."""
        return self.same_cluster and self.lost_nats <= NEAR_TIE_NATS

    @property
    def text(self) -> str:
        """One line."""
        cluster = "" if self.same_cluster else ", another cluster"
        if self.num_same == self.num_tokens and not self.lost_nats:
            return f"same {self.num_tokens} tokens{cluster}"
        return f"parts after {self.num_same} of {self.num_tokens} tokens, by {self.lost_nats:.4f} nats{cluster}"


def compare(expected: Answer, got: Answer) -> Comparison:
    """Compare two lines of answers of the same prompt.

    Raises:
        ValueError: a line is no answer, or has no log-probabilities.
    """
    for answer in (expected, got):
        if "token_ids" not in answer or not answer["top_logprobs"]:
            raise ValueError(
                f"line {answer.get('id')}: expected an answer with logprobs, got {str(dict(answer))[:200]}"
            )
    ours, theirs = expected["token_ids"], got["token_ids"]
    num_same = next(
        (at for at, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other),
        min(len(ours), len(theirs)),
    )
    return Comparison(
        num_tokens=len(ours),
        num_same=num_same,
        lost_nats=0.0 if ours == theirs else _lost(expected, got, num_same),
        same_cluster=expected["cluster"] == got["cluster"],
    )


def _lost(expected: Answer, got: Answer, at: int) -> float:
    if at >= min(len(expected["token_ids"]), len(got["token_ids"])):
        return float("inf")
    named = {token["token_id"]: float(token["logprob"]) for token in expected["top_logprobs"][at]}
    return float(expected["logprobs"][at]) - named.get(got["token_ids"][at], float("-inf"))


def _lines(path: Path) -> dict[str, Answer]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {str(line["id"]): line for line in sorted(lines, key=lambda line: str(line["id"]))}


def main(arguments: Sequence[str]) -> int:
    """Print a line for each prompt; return the exit status."""
    expected, got = (_lines(Path(path)) for path in arguments)
    if expected.keys() != got.keys():
        click.echo(f"error: expected answers {', '.join(expected)}, got {', '.join(got)}", err=True)
        return 1
    compared = {name: compare(expected[name], got[name]) for name in expected}
    for name, comparison in compared.items():
        click.echo(f"{name}: cluster {got[name]['cluster']}, {comparison.text}: {got[name]['text']!r}")
    same = sum(comparison.lost_nats == 0 for comparison in compared.values())
    click.echo(f"{same} of {len(compared)} texts are the same to the letter")
    return 0 if all(comparison.good for comparison in compared.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
