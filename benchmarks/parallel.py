"""Many clients at once: tokens a second and latencies of servers and of llama.cpp, on the same requests.

    python benchmarks/parallel.py [--models smollm2-135m ...] [--parent COREINFER_SERVE] [--clients 1 --clients 8 ...]

Each contender answers the same requests at each number of clients: prompts of 64 to 2,000 tokens, answers of 16 to 256
tokens (both log-uniform), arrivals of a Poisson process that keeps all clients busy; `--short` takes prompts of 64
tokens and answers of 128 alone. Servers are asked through /v1/completions, streamed, decoding greedily with the dense
FFN (`--mode`); `--parent` names another build's coreinfer-serve, such as that of the parent commit. llama.cpp decodes
all running sequences and a piece of one prompt in each `llama_decode`, as its own server does. Contenders take turns at
every level. Prints a table, then one JSON line.
"""

import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
from contenders.llama_server import LlamaServer
from contenders.models import MODELS, bundle_of, link_qwen, llamacpp_file
from coreinfer.bundles.layout import LAYOUT
from tokenizers import Tokenizer

_WORDS = """the harbour lamps are lit before noon and a ferry crosses slowly while bakers carry bread to the market
where children count seven apples five pears and two old coins that somebody left beside the well near the church of a
village whose council postponed every decision about the road until auditors had read all reports of last winter"""
_SEED = 7


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asks; `gap_seconds` passes before it since the client was free."""

    prompt: str
    prompt_ids: tuple[int, ...]
    num_new_tokens: int
    gap_seconds: float


@dataclass(kw_only=True)
class Answer:
    """When the tokens of one answer came, by `time.monotonic`."""

    asked_seconds: float
    token_seconds: list[float] = field(default_factory=list)


Ask = Callable[[Request], Answer]
Contender = Callable[[int], contextlib.AbstractContextManager[Ask]]


@click.command()
@click.option("--models", multiple=True, default=("smollm2-135m",), type=click.Choice([model.name for model in MODELS]))
@click.option("--clients", "levels", multiple=True, type=int, default=(1, 2, 4, 8, 16), show_default=True)
@click.option("--requests", "num_requests", type=int, default=32, show_default=True, help="For each level.")
@click.option("--rounds", type=int, default=1, show_default=True, help="Times that all contenders have their turn.")
@click.option("--mode", default="dense", show_default=True, help="How FFN weights are chosen.")
@click.option("--short", is_flag=True, help="Prompts of 64 tokens, answers of 128.")
@click.option("--parent", type=click.Path(exists=True), default=None, help="coreinfer-serve of another build.")
@click.option("--llama/--no-llama", default=True, show_default=True, help="Time llama.cpp's Q4_0 as well.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--qwen-gguf", type=click.Path(path_type=Path), default=None)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
def main(
    models: tuple[str, ...],
    levels: tuple[int, ...],
    num_requests: int,
    rounds: int,
    mode: str,
    short: bool,
    parent: str | None,
    llama: bool,
    threads: int,
    qwen_gguf: Path | None,
    work: Path,
) -> None:
    """Time contenders under the same load."""
    work.mkdir(parents=True, exist_ok=True)
    if qwen_gguf is not None:
        link_qwen(qwen_gguf, work)
    serves = {"coreinfer": str(Path(sys.executable).parent / "coreinfer-serve")} | (
        {"parent": parent} if parent else {}
    )
    results: dict[str, Any] = {"mode": mode, "short": short, "models": []}
    for model in (model for model in MODELS if model.name in models):
        bundle = bundle_of(model, "int4", work)
        contenders: dict[str, Contender] = {
            name: partial(served, command, bundle, mode, threads) for name, command in serves.items()
        }
        if llama:
            contenders["llama.cpp Q4_0"] = partial(in_llama, llamacpp_file(model, "Q4_0", work), threads)
        rows = time_all(contenders, make_requests(bundle, num_requests, short=short), levels, rounds)
        results["models"].append({"name": model.name, "runs": rows})
        print_table(model.name, rows)
    print(json.dumps(results))


def time_all(
    contenders: Mapping[str, Contender], requests: Sequence[Request], levels: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Let all contenders answer at each level in turn; figures are medians over the rounds."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for level in [level for _ in range(rounds) for level in levels]:
        for name, contender in contenders.items():
            with contender(level) as ask_one:
                answers = under_load(ask_one, requests, level)
            runs.setdefault((name, level), []).append(figures(answers))
        print(f"{level} clients done", file=sys.stderr)
    return [{"name": name, "clients": level, **_medians(found)} for (name, level), found in runs.items()]


def make_requests(bundle: Path, count: int, *, short: bool) -> list[Request]:
    """Draw requests; no two prompts begin alike, so that no cache of prefixes helps."""
    tokenizer = Tokenizer.from_file(str(bundle / LAYOUT.tokenizer))
    draw = random.Random(_SEED)
    requests = []
    for _ in range(count):
        size = 64 if short else round(64 * (2000 / 64) ** draw.random())
        text = " ".join(draw.choices(_WORDS.split(), k=size * 2))
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:size]
        prompt = tokenizer.decode(ids)
        requests.append(
            Request(
                prompt=prompt,
                prompt_ids=tuple(tokenizer.encode(prompt, add_special_tokens=False).ids),
                num_new_tokens=128 if short else round(16 * (256 / 16) ** draw.random()),
                gap_seconds=draw.expovariate(1 / 0.02),
            )
        )
    return requests


@contextlib.contextmanager
def served(command: str, bundle: Path, mode: str, threads: int, _num_clients: int) -> Iterator[Ask]:
    """Run a server on any free port for the block, with room for all requests."""
    environment = {name: value for name, value in os.environ.items() if name != "COREINFER_API_KEY"}
    process = subprocess.Popen(
        [command, str(bundle), "--port", "0", "--queue", "64", "--threads", str(threads)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    # Lines may come before the one that says where it listens.
    line = next((line for line in process.stderr if line.startswith("serving ")), "")
    if not line:
        raise click.ClickException(f"{command} did not start")
    port = int(line.split()[-1].rsplit(":", 1)[1].strip("/"))
    try:
        yield partial(ask, port, bundle.name, mode)
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def in_llama(path: Path, threads: int, num_clients: int) -> Iterator[Ask]:
    """Run llama.cpp in this process for the block, with a sequence for each client."""
    with contextlib.closing(LlamaServer(path, num_clients, threads)) as server:
        yield partial(_ask_llama, server)


def ask(port: int, model: str, mode: str, request: Request) -> Answer:
    """Ask for a completion and note when each of its events comes; what is in them is not looked at."""
    body = {"model": model, "prompt": request.prompt, "max_tokens": request.num_new_tokens, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    answer = Answer(asked_seconds=time.monotonic())
    with contextlib.closing(connection):
        text = json.dumps({**body, "stream": True, "mode": mode})
        connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise click.ClickException(f"{response.status}: {response.read().decode()}")
        for line in response:
            if line.startswith(b"data: {"):
                answer.token_seconds.append(time.monotonic())
    return answer


def _ask_llama(server: LlamaServer, request: Request) -> Answer:
    answer = Answer(asked_seconds=time.monotonic())
    server.answer(request.prompt_ids, request.num_new_tokens, lambda: answer.token_seconds.append(time.monotonic()))
    return answer


def under_load(ask_one: Ask, requests: Sequence[Request], num_clients: int) -> list[Answer]:
    """Let clients take requests from one list, each when it is free and the request's gap is over."""
    waiting, answers, lock = list(requests), list[Answer](), threading.Lock()
    failures: list[BaseException] = []

    def client() -> None:
        try:
            while True:
                with lock:
                    if not waiting or failures:
                        return
                    request = waiting.pop(0)
                time.sleep(request.gap_seconds)
                answer = ask_one(request)
                with lock:
                    answers.append(answer)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return answers


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Sum up a level: tokens a second of all answers, and latencies."""
    wall = max(answer.token_seconds[-1] for answer in answers) - min(answer.asked_seconds for answer in answers)
    gaps = [
        later - earlier
        for answer in answers
        for earlier, later in zip(answer.token_seconds, answer.token_seconds[1:], strict=False)
    ]
    firsts = [answer.token_seconds[0] - answer.asked_seconds for answer in answers]
    num_tokens = sum(len(answer.token_seconds) for answer in answers)
    return {
        "tok_s": num_tokens / wall,
        "tokens": num_tokens,
        "first_p50": _percentile(firsts, 50),
        "first_p95": _percentile(firsts, 95),
        "gap_p50": _percentile(gaps, 50),
        "gap_p95": _percentile(gaps, 95),
    }


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _medians(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: round(statistics.median(run[name] for run in found), 5) for name in found[0]}


def print_table(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of one model for people."""
    alone = {row["name"]: row["tok_s"] for row in rows if row["clients"] == 1}
    print(f"\n{name}\n{'':18} clients   tok/s  of one  first p50, p95 s   between p50, p95 ms")
    for row in sorted(rows, key=lambda row: (row["name"], row["clients"])):
        ratio = f"{row['tok_s'] / alone[row['name']]:6.2f}" if row["name"] in alone else "      "
        print(
            f"{row['name']:18} {row['clients']:7d} {row['tok_s']:7.1f}  {ratio}  {row['first_p50']:8.3f} "
            f"{row['first_p95']:8.3f}  {1e3 * row['gap_p50']:9.1f} {1e3 * row['gap_p95']:8.1f}"
        )


if __name__ == "__main__":
    main()
