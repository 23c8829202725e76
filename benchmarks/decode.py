"""CoreInfer beside transformers and llama.cpp: the same weights, one machine, interleaved rounds, medians.

    python benchmarks/decode.py [--models smollm2-135m] [--rounds 5] [--work build/bench]

Each contender has a process of its own, which waits while another is timed. The plain read bandwidth is measured in
every round. docs/benchmarks.md names the packages that it needs; contenders whose package is missing are left out with
a note. A table goes to stdout, then one JSON line; what the contenders' libraries say goes to logs in the work folder.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from contenders.models import MODELS, BenchModel, bundle_of, link_qwen, llamacpp_file, transformers_folder
from coreinfer.runtime.commands.starts import measure_starts

CONTENDERS = (
    "coreinfer-dense",
    "coreinfer-pack",
    "coreinfer-int8-dense",
    "coreinfer-int8-pack",
    "transformers-bf16",
    "llama.cpp-Q4_0",
    "llama.cpp-Q8_0",
    "llama.cpp-Q4_K_M",
    "openvino-Q4_0",
    "openvino-Q8_0",
)
_PACKAGES = {"transformers": "transformers", "llama.cpp": "llama_cpp", "openvino": "openvino_genai"}
_READ_BYTES = 1 << 29
_MOST_BUSY = 0.05
_LOOK_SECONDS = 0.5
_NUM_STARTS = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed, and how often."""

    rounds: int
    tokens: int
    prompt_tokens: int
    threads: int
    work: Path


@dataclass(kw_only=True)
class Timings:
    """Seconds of one contender, a round each."""

    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)


class Worker:
    """A contender's process."""

    def __init__(self, name: str, path: Path, options: Options) -> None:
        threads = options.threads
        self.log = options.work / f"{name}.log"
        script = Path(__file__).with_name("contenders") / "worker.py"
        command = [sys.executable, str(script), name, str(path), str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.name = name
        self._answer()

    def ask(self, command: str, amount: int = 0) -> dict[str, float]:
        """Have one command run; returns when it is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command} {amount}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: {self.name} ended early (exit {self.process.wait()}); {self.log} says why")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@click.command()
@click.option("--models", multiple=True, type=click.Choice([model.name for model in MODELS]), help="Default: all.")
@click.option("--contenders", multiple=True, type=click.Choice(CONTENDERS), help="Default: all that are installed.")
@click.option("--rounds", type=int, default=5)
@click.option("--tokens", type=int, default=128)
@click.option("--prompt-tokens", type=int, default=512)
@click.option("--threads", type=int, default=2)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench"), help="Folder of models.")
@click.option("--qwen-gguf", type=click.Path(path_type=Path), default=None, help="Instead of joining six packages.")
def main(
    models: tuple[str, ...],
    contenders: tuple[str, ...],
    rounds: int,
    tokens: int,
    prompt_tokens: int,
    threads: int,
    work: Path,
    qwen_gguf: Path | None,
) -> None:
    """Time all contenders side by side."""
    work.mkdir(parents=True, exist_ok=True)
    if qwen_gguf is not None:
        link_qwen(qwen_gguf, work)
    options = Options(rounds=rounds, tokens=tokens, prompt_tokens=prompt_tokens, threads=threads, work=work.absolute())
    names = [name for name in contenders or CONTENDERS if _installed(name)]
    chosen = [model for model in MODELS if not models or model.name in models]
    reads: list[float] = []
    results = []
    for model in chosen:
        results.append({"model": model.name, "runs": time_model(model, names, options, reads)})
        # At once: the next model may take long to make.
        click.echo("\n".join(table(results[-1])))
    click.echo(json.dumps({"read_gbps": round(statistics.median(reads), 2), "models": results}))


def _installed(name: str) -> bool:
    package = _PACKAGES.get(name.partition("-")[0])
    if package is None or importlib.util.find_spec(package):
        return True
    click.echo(f"{name}: left out, {package} is not installed", err=True)
    return False


def time_model(model: BenchModel, names: Sequence[str], options: Options, reads: list[float]) -> list[dict[str, Any]]:
    """Run all rounds of one model; the plain reads of its rounds are added to `reads`."""
    paths = {name: path_of(model, name, options) for name in names}
    first_token_seconds = {name: time_first_token(name, path, options) for name, path in paths.items()}
    plain_read = Worker("read", options.work, options)
    workers = {name: Worker(name, path, options) for name, path in paths.items()}
    timings = {name: Timings() for name in names}
    plain_reads = []
    for number in range(options.rounds + 1):
        busy = busy_elsewhere()
        # Contenders on OpenMP were seen to lose far more to a neighbour than others: such a round flatters the others.
        warning = ", NOT FIT FOR RATIOS" if busy > _MOST_BUSY else ""
        click.echo(f"{model.name}: round {number} of {options.rounds}, {busy:.0%} of CPUs busy{warning}", err=True)
        gbps = plain_read.ask("read", _READ_BYTES)["gbps"]
        for name, worker in workers.items():
            decode = worker.ask("decode", options.tokens)["seconds"]
            prefill = worker.ask("prefill", options.prompt_tokens)["seconds"]
            # The first round warms caches and clocks up.
            if number:
                timings[name].decode.append(decode)
                timings[name].prefill.append(prefill)
        if number:
            plain_reads.append(gbps)
    reads += plain_reads
    runs = []
    for name, worker in workers.items():
        figures = worker.ask("figures")
        # As many bytes as a token reads: faster than the memory where a cache holds them.
        num_bytes = int(figures["bytes_per_token"])
        repeated = [plain_read.ask("read", num_bytes)["gbps"] for _ in range(options.rounds)]
        figures["own_read_gbps"] = statistics.median(repeated)
        runs.append(summarize(name, timings[name], figures, first_token_seconds[name], plain_reads, options))
        worker.close()
    plain_read.close()
    return runs


def busy_elsewhere() -> float:
    """Share of all CPUs' time that other processes take while every contender waits."""
    before = _cpu_ticks()
    time.sleep(_LOOK_SECONDS)
    idle, total = (after - earlier for after, earlier in zip(_cpu_ticks(), before, strict=True))
    return 1 - idle / max(1, total)


def _cpu_ticks() -> tuple[int, int]:
    """Idle and total time since the machine started."""
    ticks = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def path_of(model: BenchModel, name: str, options: Options) -> Path:
    """What a contender loads; made where it is not there yet."""
    if name.startswith("coreinfer"):
        return bundle_of(model, "int8" if "int8" in name else "int4", options.work)
    if name.startswith("transformers"):
        return transformers_folder(model, options.work)
    return llamacpp_file(model, name.rpartition("-")[2], options.work)


def time_first_token(name: str, path: Path, options: Options) -> float:
    """Seconds from the start of a process to its first token, of a warm page cache; the median of some starts."""
    if not name.startswith("coreinfer"):
        return statistics.median(_first_answer(name, path, options) for _ in range(_NUM_STARTS))
    mode = "dense" if name.endswith("dense") else "similarity"
    arguments = [str(path), "--threads", str(options.threads), "--mode", mode]
    return measure_starts(arguments, _NUM_STARTS).first_token_seconds


def _first_answer(name: str, path: Path, options: Options) -> float:
    start = time.perf_counter()
    worker = Worker(name, path, options)
    worker.ask("decode", 1)
    seconds = time.perf_counter() - start
    worker.close()
    return seconds


def summarize(
    name: str, timings: Timings, figures: dict[str, float], ttft: float, reads: Sequence[float], options: Options
) -> dict[str, Any]:
    """Turn seconds into the figures of one run."""
    tokens_per_second = options.tokens / statistics.median(timings.decode)
    gbps = figures["bytes_per_token"] * tokens_per_second / 1e9
    return {
        "name": name,
        "decode_tok_s": round(tokens_per_second, 2),
        "bytes_per_token": int(figures["bytes_per_token"]),
        "gbps": round(gbps, 2),
        "share_of_read": round(gbps / statistics.median(reads), 3),
        "own_read_gbps": round(figures["own_read_gbps"], 2),
        "prefill_tok_s": round(options.prompt_tokens / statistics.median(timings.prefill), 1),
        "ttft_s": round(ttft, 3),
        "peak_rss_mb": round(figures["peak_rss_mb"], 1),
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    """Lines for people, with ratios to the others."""
    speeds = {run["name"]: run["decode_tok_s"] for run in result["runs"]}
    others = [name for name in speeds if not name.startswith("coreinfer")]
    yield (
        f"{result['model']:22s} {'tok/s':>8s} {'MB/token':>9s} {'GB/s':>6s} {'of read':>8s} {'own read':>8s} "
        f"{'prefill':>8s} {'first s':>8s} {'RSS MB':>7s}  " + "  ".join(f"x {name}" for name in others)
    )
    for run in result["runs"]:
        ratios = "  ".join(f"{run['decode_tok_s'] / speeds[name]:{len(name) + 2}.2f}" for name in others)
        yield (
            f"  {run['name']:20s} {run['decode_tok_s']:8.1f} {run['bytes_per_token'] / 1e6:9.1f} {run['gbps']:6.1f} "
            f"{run['share_of_read']:8.2f} {run['own_read_gbps']:8.1f} {run['prefill_tok_s']:8.0f} {run['ttft_s']:8.2f} "
            f"{run['peak_rss_mb']:7.0f}  " + ratios
        )


if __name__ == "__main__":
    main()
