"""Thousands of requests at once, of which many are given up: every answer must be the lone one, and nothing be lost.

    python benchmarks/soak.py [BUNDLE_DIR] [--requests 10000]

Threads that use an engine itself and clients of the server's worker share its KV cache, which is too small for all.
They ask in all modes, greedily and by seed, at random times; they close streams early, forget them, cancel, fail in
`on_token`, leave and time out. Each answer, or what came of it, is compared token for token with that of another engine
which answered nothing else meanwhile. In the end all pages must be free once the caches of finished answers are
dropped. Prints a table, then one JSON line; exits with 1 if anything was wrong. Without a bundle a tiny random model of
the tests is compiled.
"""

import asyncio
import importlib
import json
import random
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from askers.soak_clients import Question, Tally, be_direct, be_served, make_questions, settle
from coreinfer import runtime
from coreinfer.bundles import open_bundle
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.server.metrics import Metrics, ModelMetrics
from coreinfer.server.worker import Worker

_NUM_WARM = 2000
_PARALLEL = 8
_MAX_TOKENS = 24


@click.command()
@click.argument("bundle_dir", type=click.Path(path_type=Path), required=False)
@click.option("--requests", "num_requests", type=click.IntRange(10), default=10_000, show_default=True)
@click.option("--questions", "num_questions", type=click.IntRange(1), default=400, show_default=True)
@click.option("--threads", "num_threads", type=click.IntRange(1, 64), default=6, show_default=True)
@click.option("--clients", "num_clients", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option("--pages", "num_pages", type=click.IntRange(4), default=10, show_default=True, help="Of the KV cache.")
@click.option("--seed", type=int, default=1, show_default=True)
def main(
    bundle_dir: Path | None,
    num_requests: int,
    num_questions: int,
    num_threads: int,
    num_clients: int,
    num_pages: int,
    seed: int,
) -> None:
    """Put an engine on BUNDLE_DIR under load."""
    with ExitStack() as stack:
        if bundle_dir is None:
            bundle_dir = _tiny_bundle(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        engine = _engine(bundle_dir, num_pages)
        questions = make_questions(_engine(bundle_dir, None), num_questions, random.Random(seed), _MAX_TOKENS)
        result: dict[str, Any] = {
            "bundle": bundle_dir.name,
            "seed": seed,
            "threads": num_threads,
            "clients": num_clients,
        }
        result |= _soak(engine, questions, num_requests, num_threads, num_clients, seed)
    wrong = result.pop("wrong")
    for line in wrong[:5]:
        print(f"wrong: {line}", file=sys.stderr)
    result |= {"wrong": len(wrong)}
    for name, value in result.items():
        print(f"{name:24} {value}")
    print(json.dumps(result))
    if wrong or result["pages_lost"] or result["runs_left"]:
        raise SystemExit(1)


def _soak(
    engine: runtime.Engine, questions: list[Question], count: int, num_threads: int, num_clients: int, seed: int
) -> dict[str, Any]:
    worker = Worker(
        "soak", engine, parallel=_PARALLEL, capacity=num_clients, metrics=ModelMetrics(metrics=Metrics(), model="soak")
    )
    num_warm = min(_NUM_WARM, count // 2)
    tallies = [Tally(target=num_warm), Tally(target=count - num_warm)]
    begun, resident = time.monotonic(), []
    for number, tally in enumerate(tallies):
        _run(engine, worker, questions, tally, num_threads, num_clients, seed + number)
        resident.append(_resident_mb())
    seconds = time.monotonic() - begun
    scheduler = engine.driver.scheduler
    settle(lambda: not (scheduler.num_active or scheduler.num_waiting or scheduler.pool.num_taken))
    num_left = scheduler.num_active + scheduler.num_waiting + scheduler.pool.num_taken
    worker.close()
    num_kept = engine.decoder.num_pages - engine.decoder.num_free_pages
    while scheduler.pool.evict():
        pass
    return {
        "requests": sum(sum(tally.ways.values()) for tally in tallies),
        "ways": dict(sorted((tallies[0].ways + tallies[1].ways).items())),
        "tokens": sum(tally.num_tokens for tally in tallies),
        "seconds": round(seconds, 1),
        "wrong": [line for tally in tallies for line in tally.wrong],
        "runs_left": num_left,
        "pages": engine.decoder.num_pages,
        "pages_kept_for_others": num_kept,
        "pages_lost": engine.decoder.num_pages - engine.decoder.num_free_pages,
        f"resident_mb_after_{num_warm}": resident[0],
        f"resident_mb_after_{count}": resident[1],
    }


def _run(
    engine: runtime.Engine,
    worker: Worker,
    questions: list[Question],
    tally: Tally,
    num_threads: int,
    num_clients: int,
    seed: int,
) -> None:
    rngs = [random.Random(1000 * seed + number) for number in range(num_threads + num_clients)]
    threads = [threading.Thread(target=be_direct, args=(engine, questions, tally, rng)) for rng in rngs[num_clients:]]
    for thread in threads:
        thread.start()

    async def be_clients() -> None:
        await asyncio.gather(*(be_served(worker, questions, tally, rng) for rng in rngs[:num_clients]))

    asyncio.run(be_clients())
    for thread in threads:
        thread.join()


def _engine(bundle_dir: Path, num_pages: int | None) -> runtime.Engine:
    bundle = open_bundle(bundle_dir)
    limit = None if num_pages is None else num_pages * NativeDecoder(bundle, threads=1).page_bytes
    return runtime.Engine(bundle, NativeDecoder(bundle, threads=1, kv_cache_bytes=limit))


def _tiny_bundle(folder: Path) -> Path:
    from coreinfer.compiler import CompileConfig, compile_model

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    factory = importlib.import_module("model_factory")
    target = folder / "tiny"
    compile_model(
        CompileConfig(
            model=str(factory.save_model(folder / "model", "llama")),
            output=target,
            clusters=4,
            keep=0.67,
            encoder=str(factory.save_encoder(folder)),
            calibration=(str(factory.save_corpus(folder / "corpus.txt")),),
            dtype="float32",
            budgets="uniform",
            quantize="int4",
        )
    )
    return target


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6, 1)


if __name__ == "__main__":
    main()
