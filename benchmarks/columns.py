"""What is gained where a token reads only the columns of the inputs that it wants, beside today's int4 kernel.

    python benchmarks/columns.py [--shapes 7b] [--plans gggg,rrgr] [--shares 1,0.75,0.64,0.5] [--rounds 9]

Whole layers of random weights (query, key and value; output; gate and up; down) are multiplied with one token's
inputs, in rounds that take all plans and shares in turn, with the plain read bandwidth in every round. A plan has a
letter for each of the four: r, the engine's row-interleaved kernel on the engine's threads, which reads everything; or
x, t, g or s, a design that goes through wanted columns (benchmarks/columns/products.h; x reads them and multiplies
nothing). Which inputs a token wants changes
from token to token and layer to layer; choosing and rounding them is timed too. Columns have a scale and a zero point
for each output and 32 inputs, as the rows have, or 64 with --group. The program in benchmarks/columns is
compiled with $CXX and the options of setup.py; it compares every plan's products with the portable kernels' first and
fails where they differ. A table goes to stdout, then one JSON line. Needs a CPU with AVX2, or with AVX-512 VNNI.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

_ROOT = Path(__file__).parent.parent
_ENGINE = _ROOT / "runtime/engines/native/csrc"
_OPTIONS = ("-std=c++17", "-O3", "-g0", "-pthread", "-Wall", "-Wextra")
_QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi")
# They belong to the Python module.
_LEFT_OUT = ("binding.cpp", "binding_parts.cpp", "reading.cpp")
_DENSE = "rrrr"
_MATRICES = ("qkv", "o", "gate/up", "down")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The matrices of a model's layers; as many layers as are far more than any cache."""

    hidden: int
    qkv: int
    ffn: int
    layers: int


SHAPES = {
    "1b": Shape(hidden=2048, qkv=3072, ffn=8192, layers=16),
    "3b": Shape(hidden=3072, qkv=5120, ffn=8192, layers=8),
    "7b": Shape(hidden=4096, qkv=6144, ffn=14336, layers=4),
    "7b-11008": Shape(hidden=4096, qkv=6144, ffn=11008, layers=5),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed, and how often."""

    isa: str
    group: int
    plans: Sequence[str]
    shares: Sequence[str]
    rounds: int
    tokens: int
    threads: int
    panel_outputs: int


@click.command(context_settings={"show_default": True})
@click.option("--shapes", default="1b,3b,7b", help=f"Of {', '.join(SHAPES)}.")
@click.option("--isa", type=click.Choice(["avx2", "avx512"]), default="avx2", help="Of all kernels.")
@click.option("--group", type=click.Choice(["32", "64"]), default="32", help="Inputs of a column's scale; 64: avx512.")
@click.option("--plans", default="xxxx,tttt,gggg,ssss,rrgr", help="Four letters each, for qkv, o, gate/up, down.")
@click.option("--shares", default="1,0.75,0.64,0.5", help="Of the inputs that a token wants.")
@click.option("--rounds", default=9)
@click.option("--tokens", default=1, help="Timed at once.")
@click.option("--threads", default=2)
@click.option("--panel-outputs", default=8192, help="The most that one piece of a column may have, half a byte each.")
def main(
    shapes: str,
    isa: str,
    group: str,
    plans: str,
    shares: str,
    rounds: int,
    tokens: int,
    threads: int,
    panel_outputs: int,
) -> None:
    """Print the table of the module's docstring."""
    options = Options(
        isa=isa,
        group=int(group),
        plans=plans.split(","),
        shares=shares.split(","),
        rounds=rounds,
        tokens=tokens,
        threads=threads,
        panel_outputs=panel_outputs,
    )
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(Path(folder))
        results = [summarize(name, measure(program, SHAPES[name], options)) for name in shapes.split(",")]
    for result in results:
        click.echo("\n".join(table(result)))
    click.echo(json.dumps(results))


def compile_program(folder: Path) -> Path:
    """Compile the benchmark's C++ program with the engine's sources; returns its path."""
    compiler = os.environ.get("CXX", "g++").split()
    include = f"-I{_ROOT / 'bundles/shared/csrc'}"
    sources = [path for path in sorted(_ENGINE.glob("*.cpp")) if path.name not in _LEFT_OUT]
    sources += sorted(Path(__file__).with_suffix("").glob("*.cpp"))
    objects = [folder / f"{number}.o" for number in range(len(sources))]

    def compile_source(source: Path, target: Path) -> None:
        subprocess.run([*compiler, *_OPTIONS, *_QUIET, include, "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_source, sources, objects))
    program = folder / "columns"
    subprocess.run([*compiler, *objects, "-pthread", "-o", program], check=True)
    return program


def measure(program: Path, shape: Shape, options: Options) -> dict[str, Any]:
    """Run the program on one shape: the bytes of all layers, and seconds by round, run and matrix."""
    numbers = [shape.hidden, shape.qkv, shape.ffn, shape.layers, options.threads, options.panel_outputs]
    numbers += [options.rounds + 1, options.tokens]
    arguments = [
        options.isa,
        str(options.group),
        *map(str, numbers),
        ",".join([_DENSE, *options.plans]),
        ",".join(options.shares),
    ]
    done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: the program ended with {done.returncode}; its message is above")
    return dict(json.loads(done.stdout))


def summarize(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds; the first one warms up. Speeds are against the dense kernel of the same round."""
    rounds = measured["rounds"][1:]
    runs = []
    for number, run in enumerate(rounds[0]["runs"]):
        seconds = [one["runs"][number]["seconds"] for one in rounds]
        dense = [one["runs"][0]["seconds"] for one in rounds]
        runs.append(
            {
                "plan": run["plan"],
                "share": 1.0 if run["plan"] == _DENSE else run["share"],
                "milliseconds": round(1e3 * statistics.median(map(sum, seconds)), 3),
                "speed": round(statistics.median(_ratios(map(sum, dense), map(sum, seconds))), 3),
                "speeds": [
                    round(statistics.median(_ratios(*zip(*pairs, strict=True))), 3)
                    for pairs in (
                        [(all_dense[kind], own[kind]) for all_dense, own in zip(dense, seconds, strict=True)]
                        for kind in range(len(_MATRICES))
                    )
                ],
            }
        )
    read_gbps = statistics.median(one["read_gbps"] for one in rounds)
    dense_gbps = measured["row_bytes"] / runs[0]["milliseconds"] / 1e6
    return {
        "shape": name,
        "megabytes": round(measured["row_bytes"] / 1e6),
        "read_gbps": round(read_gbps, 2),
        "dense_share_of_read": round(dense_gbps / read_gbps, 3),
        "runs": runs,
    }


def _ratios(numerators: Any, denominators: Any) -> Iterator[float]:
    return (a / b for a, b in zip(numerators, denominators, strict=True))


def table(result: dict[str, Any]) -> Iterator[str]:
    """Lines for people: speeds against the dense kernel at share 1."""
    yield (
        f"{result['shape']}: {result['megabytes']} MB, plain read {result['read_gbps']:.1f} GB/s, "
        f"dense kernel {result['dense_share_of_read']:.2f} of it"
    )
    yield f"  plan  share       ms  speed  {'  '.join(f'{name:>7s}' for name in _MATRICES)}"
    for run in result["runs"]:
        speeds = "  ".join(f"{speed:7.2f}" for speed in run["speeds"])
        yield f"  {run['plan']}  {run['share']:5.2f}  {run['milliseconds']:7.2f}  {run['speed']:5.2f}  {speeds}"


if __name__ == "__main__":
    main()
