"""Replicas on Ray under load: one is killed, the bundle is exchanged, and no request may be lost.

    python benchmarks/replicas.py [--requests 500] [--clients 32]

Starts `coreinfer-serve --ray local --replicas 2` three times, with tiny random models of the tests. First 32 clients
ask 500 questions, half of them streamed; half-way one replica is killed, and then the bundle is exchanged while they
go on asking. Each answer is compared with that of an engine alone, by the bundle that the answer names. A stream that
had begun at the killed replica must end with the error event `replica_lost`; everything else must be answered. Then the
share of requests whose pack was among the last ones that their replica used is measured, with requests routed by
cluster and by load alone, which is as good as at random here. Prints a table, then one JSON line; exits with 1 if
anything was lost or wrong. Linux only: replicas are found in /proc.
"""

import http.client
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from askers.replica_clients import Question, Tally, ask_all
from coreinfer import runtime
from coreinfer.bundles import open_bundle
from coreinfer.server.bundle_files import fingerprint

_MODEL = "tiny"
_NUM_REPLICAS = 2
_MAX_TOKENS = 40
_START_SECONDS, _END_SECONDS, _EXCHANGE_SECONDS = 120, 60, 180
_COMMAND = "from coreinfer.server.cli import main; main()"


@dataclass(frozen=True, kw_only=True)
class _Server:
    process: subprocess.Popen[str]
    port: int

    def metric(self, name: str, **labels: str) -> float:
        """Sum of all samples of a counter that carry the labels."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [line for line in lines if line.split("{")[0] == name and all(label in line for label in wanted)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def kill_replica(self) -> None:
        """Kill one replica as the system would where memory runs out."""
        os.kill(_replica_processes(self.process.pid)[0], signal.SIGKILL)


@click.command()
@click.option("--requests", "num_requests", type=click.IntRange(20), default=500, show_default=True)
@click.option("--clients", "num_clients", type=click.IntRange(1, 64), default=32, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--faults/--no-faults", default=True, show_default=True, help="Kill a replica, and exchange the bundle.")
def main(num_requests: int, num_clients: int, seed: int, faults: bool) -> None:
    """Put a server with two replicas under load, and take one of them away."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = _bundles(folder)
        questions = _questions(bundles, seed)
        result: dict[str, Any] = {"requests": num_requests, "clients": num_clients, "replicas": _NUM_REPLICAS}
        tally = Tally()
        if faults:
            tally, figures = _faults(folder, bundles, questions, num_requests, num_clients)
            result |= figures
        for way in ("cluster", "load"):
            result |= _warmth(folder, bundles[0], questions, num_requests, num_clients, way)
    for line in tally.wrong[:5]:
        print(f"wrong: {line}", file=sys.stderr)
    for key, value in result.items():
        print(f"{key:28} {value}")
    print(json.dumps(result))
    if faults and (result["lost"] or result["wrong"] or not result["exchanged"]):
        raise SystemExit(1)


def _faults(
    folder: Path, bundles: list[Path], questions: list[Question], num_requests: int, num_clients: int
) -> tuple[Tally, dict[str, Any]]:
    """Ask while a replica is killed and the bundle is exchanged."""
    link = folder / _MODEL
    _point(link, bundles[0])
    with _serving(link) as server:
        done = threading.Event()

        def exchange() -> None:
            _point(link, bundles[1])
            server.process.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + _EXCHANGE_SECONDS
            while time.monotonic() < deadline and not server.metric("coreinfer_exchanges_total"):
                time.sleep(0.25)
            done.set()

        tally = ask_all(
            server.port,
            _MODEL,
            questions,
            num_clients=num_clients,
            goes_on=lambda number: number < num_requests or not done.is_set(),
            at={num_requests // 2: server.kill_replica, num_requests * 6 // 10: exchange},
            max_tokens=_MAX_TOKENS,
        )
        figures = {
            "begun": tally.num_begun,
            "answered": tally.ends["answered"],
            "lost": tally.ends["lost"],
            "wrong": len(tally.wrong),
            "streams_cut": tally.ends["cut"],
            "asked_again": server.metric("coreinfer_asked_again_total"),
            "exchanged": server.metric("coreinfer_exchanges_total", outcome="done"),
            "answered_by_old": tally.by_bundle[fingerprint(open_bundle(bundles[0]))],
            "answered_by_new": tally.by_bundle[fingerprint(open_bundle(bundles[1]))],
        }
    return tally, figures


def _warmth(
    folder: Path, bundle: Path, questions: list[Question], num_requests: int, num_clients: int, way: str
) -> dict[str, Any]:
    """Measure how often a pack is warm where a request comes to."""
    link = folder / _MODEL
    _point(link, bundle)
    with _serving(link, "--route-by", way) as server:
        tally = ask_all(
            server.port,
            _MODEL,
            questions,
            num_clients=num_clients,
            goes_on=lambda number: number < num_requests,
            at={},
            max_tokens=_MAX_TOKENS,
        )
        warm, cold = (server.metric("coreinfer_pack_uses_total", warm=word) for word in ("yes", "no"))
        answered = tally.ends["answered"]
        return {
            f"by_{way}_warm_share": _share(warm, warm + cold),
            f"by_{way}_pack_changes": _share(server.metric("coreinfer_swaps_total"), answered),
            f"by_{way}_cached_share": _share(
                server.metric("coreinfer_cached_tokens_total"), server.metric("coreinfer_prompt_tokens_total")
            ),
            f"by_{way}_lost": num_requests - answered,
        }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 3) if whole else None


def _bundles(folder: Path) -> list[Path]:
    """Compile two bundles of one model, which differ in the size of their packs."""
    from coreinfer.compiler import CompileConfig, compile_model

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    factory = importlib.import_module("model_factory")
    inputs: dict[str, Any] = {
        "model": str(factory.save_model(folder / "model", "llama")),
        "encoder": str(factory.save_encoder(folder)),
        "calibration": (str(factory.save_corpus(folder / "corpus.txt")),),
    }
    targets = [folder / "old", folder / "new"]
    for target, keep in zip(targets, (0.67, 0.5), strict=True):
        compile_model(
            CompileConfig(
                **inputs, output=target, clusters=4, keep=keep, dtype="float32", budgets="uniform", quantize="int4"
            )
        )
    return targets


def _questions(bundles: list[Path], seed: int) -> list[Question]:
    """Sentences of all clusters, shuffled, and what engines alone answer."""
    texts = list(importlib.import_module("model_factory").corpus_texts()[:60])
    random.Random(seed).shuffle(texts)
    answers: dict[str, list[str]] = {}
    for bundle in bundles:
        engine = runtime.load(bundle, engine="native", threads=1)
        options: dict[str, Any] = {"mode": "similarity", "max_new_tokens": _MAX_TOKENS, "temperature": 1.0}
        answers[fingerprint(engine.bundle)] = [
            engine.generate([{"role": "user", "content": text}], seed=seed + number, **options).text
            for number, text in enumerate(texts)
        ]
    return [Question(text=text, seed=seed + number, expected=_of(answers, number)) for number, text in enumerate(texts)]


def _of(answers: Mapping[str, list[str]], number: int) -> dict[str, str]:
    return {name: texts[number] for name, texts in answers.items()}


def _point(link: Path, bundle: Path) -> None:
    """Let a link point to another folder, at once."""
    fresh = link.with_suffix(".fresh")
    fresh.symlink_to(bundle)
    fresh.replace(link)


@contextmanager
def _serving(bundle: Path, *arguments: str) -> Iterator[_Server]:
    options = ["--port", "0", "--threads", "1", "--engine", "native", "--kv-cache-mb", "64", "--ray", "local"]
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, str(bundle), *options, "--replicas", str(_NUM_REPLICAS), *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield _Server(process=process, port=_wait_for_port(process))
        process.send_signal(signal.SIGTERM)
        process.wait(_END_SECONDS)
    finally:
        process.kill()
        process.wait()


def _wait_for_port(process: "subprocess.Popen[str]") -> int:
    """Read what the server says until it serves, and pass on what it says later."""
    found: list[int] = []
    started = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("serving "):
                found.append(int(line.rsplit(":", 1)[1]))
                started.set()
            sys.stderr.write(line)
        started.set()

    threading.Thread(target=read, daemon=True).start()
    if not started.wait(_START_SECONDS) or not found:
        raise SystemExit("the server did not start; see above")
    return found[0]


def _replica_processes(server_id: int) -> list[int]:
    """The processes of replicas that descend from a server."""
    parents, replicas = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                replicas.append(int(folder.name))
        except OSError:
            # It ended meanwhile.
            continue
    return sorted(number for number in replicas if _descends(number, server_id, parents))


def _descends(number: int, ancestor: int, parents: Mapping[int, int]) -> bool:
    while number in parents:
        if number == ancestor:
            return True
        number = parents[number]
    return False


if __name__ == "__main__":
    main()
