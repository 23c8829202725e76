"""How fast moments of activations are summed: this repository's kernels beside torch's float32 products.

    python benchmarks/products.py --tokens 10000 --ffn-dim 1536 --hidden-size 576

Prints a Markdown table; GFLOP/s count the products of the half that is computed of a symmetric matrix.
"""

import time
from collections.abc import Callable
from functools import partial

import click
import numpy as np
import torch
from coreinfer.compiler.prune import _products


@click.command(context_settings={"show_default": True})
@click.option("--tokens", default=10_000)
@click.option("--ffn-dim", default=1536)
@click.option("--hidden-size", default=576)
@click.option("--rounds", default=5)
@click.option("--threads", "num_threads", default=2)
def main(tokens: int, ffn_dim: int, hidden_size: int, rounds: int, num_threads: int) -> None:
    """Print the table of the module's docstring."""
    torch.set_num_threads(num_threads)
    activations = torch.randn(tokens, ffn_dim).bfloat16()
    targets = torch.randn(tokens, hidden_size).bfloat16()
    flop = 2 * tokens * ffn_dim * (ffn_dim / 2 + hidden_size)
    print("| products | ms | GFLOP/s |\n|---|---|---|")
    rows = np.arange(tokens)
    bits = tuple(values.view(torch.int16).numpy().view(np.uint16) for values in (activations, targets))
    floats = activations.float().numpy(), targets.float().numpy()
    for isa in _products.available_isas():
        for kind, own in (("bfloat16", bits), ("float32", floats)):
            if kind == "float32" and isa.endswith("bf16"):
                continue
            sums = np.zeros((ffn_dim, ffn_dim), np.float32), np.zeros((ffn_dim, hidden_size), np.float32)
            add = partial(_products.add_products, *sums, own[0], own[1], rows, num_threads=num_threads, isa=isa)
            _print(f"{isa}, {kind}", _best_seconds(add, rounds), flop)

    def plain() -> None:
        values = activations.float()
        torch.mm(values.T, values)
        torch.mm(values.T, targets.float())

    _print("torch, float32, whole matrices", _best_seconds(plain, rounds), flop)


def _best_seconds(function: Callable[[], None], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _print(name: str, seconds: float, flop: float) -> None:
    print(f"| {name} | {seconds * 1e3:.0f} | {flop / seconds / 1e9:.0f} |")


if __name__ == "__main__":
    main()
