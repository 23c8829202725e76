"""Where the model does not fit: engines in a limited memory, beside each other.

    python benchmarks/memory.py --models qwen2.5-coder-0.5b --limits 1.0,0.8,0.6,0.5,0.4 --work build/memory

Each contender runs in a process and a memory cgroup of its own, page cache included; its files are dropped from the
page cache first, so that their pages are charged to it. Limits are shares of the dense int4 size: base and dense FFN of
the bundle. Needs root and a memory cgroup. A table, then one JSON line.
"""

import importlib.util
import json
import mmap
import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from contenders.models import MODELS, BenchModel, bundle_of, link_qwen, llamacpp_file, transformers_folder
from coreinfer.bundles import open_bundle
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import ModelRecord
from under_limits.group import forget_files, memory_group
from under_limits.programs import build_coreinfer_worker, build_llamacpp_worker, worker_command

_READ_BYTES = 256 << 20
# Of the KV cache at least; room for what is timed, in whole pages.
_KV_BYTES = 6_000_000


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A row of the table: what to run, as `under_limits/python_worker.py` takes it, and the path of its files."""

    name: str
    spec: dict[str, Any]

    @property
    def path(self) -> Path:
        """Its files."""
        return Path(self.spec["path"])


@click.command()
@click.option("--models", "names", default="qwen2.5-coder-0.5b", help="Names of contenders/models.py, with commas.")
@click.option("--limits", default="1.0,0.8,0.6,0.5,0.4", help="Shares of the dense int4 size; 0 for no limit.")
@click.option("--contenders", "wanted", default="", help="Parts of names of contenders to run; all without.")
@click.option("--packs", default="0.7,0.5,0.3", help="Keep ratios.")
@click.option("--quants", default="Q4_0,Q4_0-pure,Q2_K", help="Quantizations of llama.cpp.")
@click.option("--transformers/--no-transformers", "with_transformers", default=True)
@click.option("--bundle", "given", multiple=True, help="KEEP=DIR: a bundle that is there already.")
@click.option(
    "--llama-source",
    type=click.Path(path_type=Path),
    default=None,
    help="llama-cpp-python's sources, for its worker in C.",
)
@click.option("--qwen-gguf", type=click.Path(path_type=Path), default=None)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/memory"))
@click.option("--texts", type=click.Path(path_type=Path), default=None, help="Folder of JSON Lines files; measures KL.")
@click.option("--num-texts", default=12)
@click.option("--rounds", default=1, help="Runs of each contender under each limit, in turns; medians are told.")
@click.option("--tokens", "num_tokens", default=64)
@click.option("--prompt-tokens", default=64)
@click.option("--seconds", default=20.0, help="Of decoding, at most.")
@click.option("--threads", default=os.cpu_count() or 1)
def main(
    names: str,
    limits: str,
    wanted: str,
    packs: str,
    quants: str,
    given: tuple[str, ...],
    llama_source: Path | None,
    qwen_gguf: Path | None,
    work: Path,
    texts: Path | None,
    num_texts: int,
    rounds: int,
    num_tokens: int,
    prompt_tokens: int,
    seconds: float,
    threads: int,
    *,
    with_transformers: bool,
) -> None:
    """Run contenders under limits of memory."""
    work.mkdir(parents=True, exist_ok=True)
    if qwen_gguf:
        link_qwen(qwen_gguf, work)
    settings = Settings(
        work=work,
        shares=[float(share) for share in limits.split(",")],
        rounds=rounds,
        quants=[kind for kind in quants.split(",") if kind],
        wanted=wanted.split(","),
        llama_source=llama_source,
        with_transformers=with_transformers,
        texts=texts,
        num_texts=num_texts,
        timing={
            "threads": threads,
            "num_tokens": num_tokens,
            "prompt_tokens": prompt_tokens,
            "warm_tokens": 16,
            "seconds": seconds,
        },
    )
    results = []
    for model in (model for model in MODELS if model.name in names.split(",")):
        bundles = {float(keep): Path(folder) for keep, folder in (item.split("=", 1) for item in given)}
        for keep in map(float, packs.split(",")):
            if keep not in bundles:
                bundles[keep] = bundle_of(model, "int4", work, keep=keep)
        results.append(run_model(model, bundles, settings))
    click.echo(json.dumps({"models": results}))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run of each model.

    Attributes:
        shares: limits as shares of the dense int4 size; 0 for none.
        rounds: runs of each contender under each limit, in turns; medians are told.
        wanted: parts of names of contenders.
        timing: what `under_limits/python_worker.py` takes of it.
    """

    work: Path
    shares: list[float]
    rounds: int
    quants: list[str]
    wanted: list[str]
    llama_source: Path | None
    with_transformers: bool
    texts: Path | None
    num_texts: int
    timing: dict[str, Any]


def run_model(model: BenchModel, bundles: dict[float, Path], settings: Settings) -> dict[str, Any]:
    """Run all contenders of a model."""
    found = [
        one for one in find_contenders(model, bundles, settings) if any(part in one.name for part in settings.wanted)
    ]
    dense_bytes = dense_size(next(iter(bundles.values())))
    disk = disk_speed(next(iter(bundles.values())) / LAYOUT.base)
    click.echo(
        f"{model.name}: dense int4 {dense_bytes / 1e6:.1f} MB; disk {disk['sequential_mb_s']:.0f} MB/s in a row, "
        f"{disk['random_mb_s']:.1f} MB/s in 4k reads"
    )
    divergences = kl_of(found, model, settings.texts, settings) if settings.texts else {}
    runs = list(run_all(found, settings.shares, dense_bytes, settings.timing, divergences, rounds=settings.rounds))
    return {"name": model.name, "dense_mb": dense_bytes / 1e6, "disk": disk, "runs": runs}


def find_contenders(model: BenchModel, bundles: dict[float, Path], settings: Settings) -> Iterator[Contender]:
    """What can run here."""
    work, source = settings.work, settings.llama_source
    num_positions = sum(settings.timing[name] for name in ("prompt_tokens", "warm_tokens", "num_tokens"))
    yield from coreinfer_contenders(bundles, build_coreinfer_worker(work), num_positions)
    files = find_files(model, settings.quants, work)
    yield from llamacpp_contenders(files, build_llamacpp_worker(work, source) if source else None)
    if settings.with_transformers:
        yield from transformers_contenders(transformers_folder(model, work))


def dense_size(bundle_dir: Path) -> int:
    """Bytes of base and dense FFN."""
    return sum((bundle_dir / name).stat().st_size for name in (LAYOUT.base, LAYOUT.dense))


def find_files(model: BenchModel, quants: list[str], work: Path) -> dict[str, Path]:
    """llama.cpp's files; none, with a remark, where it is not installed."""
    try:
        return {kind: llamacpp_file(model, kind, work) for kind in quants}
    except ImportError:
        click.echo("llama.cpp: left out, llama_cpp is not installed", err=True)
        return {}


def coreinfer_contenders(bundles: dict[float, Path], program: Path, num_positions: int) -> Iterator[Contender]:
    """Dense and packs, each through Python and through the C API."""
    first = next(iter(bundles.values()))
    cache_bytes = kv_bytes(open_bundle(first).manifest.model, num_positions)
    specs: dict[str, dict[str, Any]] = {"coreinfer-dense": {"path": str(first), "variant": "dense"}}
    for keep, folder in bundles.items():
        specs[f"coreinfer-pack-{keep:g}"] = {"path": str(folder), "variant": "pack", "cluster": 0}
    for name, own in specs.items():
        spec = {"engine": "coreinfer", "kv_bytes": cache_bytes, **own}
        yield Contender(name=name, spec=spec)
        yield Contender(name=f"{name}-c", spec={**spec, "program": str(program)})


def llamacpp_contenders(files: dict[str, Path], program: Path | None) -> Iterator[Contender]:
    """Each file mapped and not, repacked and not; through Python, and through its C API where there is a program."""
    for kind, path in files.items():
        for mapped in (True, False):
            for repack in (True, False):
                name = f"llamacpp-{kind}{'' if mapped else '-no-mmap'}{'' if repack else '-no-repack'}"
                spec = {"engine": "llamacpp", "path": str(path), "mmap": mapped, "repack": repack}
                yield Contender(name=name, spec=spec)
                if program:
                    yield Contender(name=f"{name}-c", spec={**spec, "program": str(program)})


def transformers_contenders(folder: Path) -> Iterator[Contender]:
    """As transformers does it, and with layers that accelerate reads from disk where it is installed."""
    spec = {"engine": "transformers", "path": str(folder)}
    yield Contender(name="transformers-bf16", spec=spec)
    if importlib.util.find_spec("accelerate"):
        yield Contender(name="transformers-bf16-offload", spec={**spec, "offload": True})
    else:
        click.echo("transformers-bf16-offload: left out, accelerate is not installed", err=True)


def kv_bytes(model: ModelRecord, num_positions: int) -> int:
    """Keys and values of so many tokens in float16, and a page of 64 tokens more."""
    token_bytes = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return max(_KV_BYTES, token_bytes * (num_positions + 64))


def run_all(
    contenders: list[Contender],
    shares: list[float],
    dense_bytes: int,
    timing: dict[str, Any],
    divergences: dict[str, float],
    *,
    rounds: int = 1,
) -> Iterator[dict[str, Any]]:
    """Run every contender under every limit, in turns; print a line for each."""
    click.echo(
        f"{'limit':>6s} {'MB':>6s} {'contender':32s} {'tok/s':>8s} {'first s':>8s} {'MB read':>8s} {'peak':>7s}  KL"
    )
    for share in shares:
        limit = round(share * dense_bytes) if share else None
        turns: list[list[dict[str, Any]]] = [[] for _ in contenders]
        for _ in range(rounds):
            for runs, contender in zip(turns, contenders, strict=True):
                # What was killed or too slow once will be again.
                if not (runs and runs[-1]["failure"]):
                    runs.append(run_limited(contender, limit, timing))
        for runs, contender in zip(turns, contenders, strict=True):
            run = middle_run(runs) | {
                "name": contender.name,
                "limit": share or None,
                "kl": divergences.get(contender.name),
            }
            click.echo(line_of(run, share, limit))
            yield run


def middle_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Choose the one of the median speed, with the highest peak of all; a failed one where one failed."""
    failed = [run for run in runs if run["failure"]]
    chosen = failed[0] if failed else sorted(runs, key=lambda run: float(run["decode_tok_s"]))[len(runs) // 2]
    peaks = [run["peak_mb"] for run in runs if run["peak_mb"] is not None]
    return {**chosen, "peak_mb": max(peaks, default=None), "speeds": [run["decode_tok_s"] for run in runs]}


def line_of(run: dict[str, Any], share: float, limit_bytes: int | None) -> str:
    """A run as a line of the table."""
    cells = [
        f"{run[key]:8.2f}" if run.get(key) is not None else f"{'none':>8s}"
        for key in ("decode_tok_s", "first_token_seconds", "disk_mb_a_token")
    ]
    kl = "" if run["kl"] is None else f"{run['kl']:.3f}"
    peak = f"{run['peak_mb']:7.1f}" if run["peak_mb"] is not None else f"{'':7s}"
    size = f"{limit_bytes / 1e6:6.1f}" if limit_bytes else f"{'':6s}"
    why = f" ({run['failure']})" if run["failure"] else ""
    return f"{share or 'none':>6} {size} {run['name']:32s} {' '.join(cells)} {peak}  {kl}{why}"


def run_limited(contender: Contender, limit_bytes: int | None, timing: dict[str, Any]) -> dict[str, Any]:
    """Run one contender in a group; nothing is measured of one that is killed or too slow."""
    limit_mb = None if limit_bytes is None else limit_bytes / 1e6
    spec = {**contender.spec, **timing, "limit_mb": limit_mb}
    forget_files(contender.path)
    with memory_group(f"coreinfer-memory-{os.getpid()}", limit_bytes) as group:
        process = subprocess.Popen(
            group.command(worker_command(spec)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            # A run that comes no further than its first token in this time is none.
            output, errors = process.communicate(timeout=10 + 2 * timing["seconds"])
            failure = _failure(process.returncode, errors)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            output, failure = "", "too slow"
        peak = group.peak_bytes
    found = json.loads(output) if output and not failure else {"decode_tok_s": None, "first_token_seconds": None}
    return {"disk_mb_a_token": None, **found, "peak_mb": None if peak is None else peak / 1e6, "failure": failure}


def _failure(code: int, errors: str) -> str | None:
    if code == 0:
        return None
    return "killed: out of memory" if code == -9 else (errors.strip().splitlines() or [f"exit code {code}"])[-1]


def kl_of(contenders: list[Contender], model: BenchModel, texts: Path, settings: Settings) -> dict[str, float]:
    """KL of each contender to the original in float32; how it is mapped or repacked changes nothing in it."""
    import numpy as np
    from contenders.models import source_of
    from kl import original_logits, read_texts

    folder = settings.work / f"{model.name}-reference-{settings.num_texts}"
    if not (folder / "ids.json").exists():
        folder.mkdir(exist_ok=True)
        bundle = next(one.path for one in contenders if one.spec["engine"] == "coreinfer")
        ids = read_texts(bundle, texts, settings.num_texts, 96)
        for number, logits in enumerate(original_logits(str(source_of(model, settings.work)), ids)):
            np.save(folder / f"{number}.npy", logits)
        (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    found: dict[str, float] = {}
    known: dict[tuple[str, str], float] = {}
    for contender in contenders:
        key = (str(contender.path), contender.spec.get("variant", ""))
        if key not in known:
            spec = {**contender.spec, **settings.timing, "limit_mb": None, "texts": str(folder)}
            # A C worker computes to the bit what the Python worker does, which has logits.
            spec.pop("program", None)
            done = subprocess.run(worker_command(spec), check=False, capture_output=True, text=True)
            if failure := _failure(done.returncode, done.stderr):
                raise click.ClickException(f"{contender.name}: {failure}")
            known[key] = json.loads(done.stdout)["kl"]
        found[contender.name] = known[key]
    return found


def disk_speed(path: Path) -> dict[str, float]:
    """Plain reads past the page cache: in a row by 1 MiB, and 4 KiB here and there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    size = os.fstat(descriptor).st_size >> 20 << 20
    try:
        with mmap.mmap(-1, 1 << 20) as memory:
            begin = time.perf_counter()
            for offset in range(0, min(size, _READ_BYTES), 1 << 20):
                os.preadv(descriptor, [memory], offset)
            in_a_row = min(size, _READ_BYTES) / (time.perf_counter() - begin)
        with mmap.mmap(-1, 4096) as memory:
            begin, places = time.perf_counter(), random.Random(0)
            for _ in range(2000):
                os.preadv(descriptor, [memory], places.randrange(size >> 12) << 12)
            here_and_there = 2000 * 4096 / (time.perf_counter() - begin)
    finally:
        os.close(descriptor)
    return {"sequential_mb_s": in_a_row / 1e6, "random_mb_s": here_and_there / 1e6}


if __name__ == "__main__":
    main()
