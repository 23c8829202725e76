"""Latency and memory of a server under load: many clients, one bundle.

    python benchmarks/serve.py build/demo-bundle

Starts `coreinfer-serve` on a loopback port, asks 500 questions, 32 at a time, through the `openai` package, half
of them streamed, compares each answer with a single run of the same prompt and seed, and prints percentiles, resident
memory and what the server counted. Ends after --seconds at the latest.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx2 as httpx
import openai
from coreinfer import runtime

PROMPTS = (
    "How do I make a simple tomato soup with basil?",
    "Write a Python function that counts the vowels in a string.",
    "Why does the moon have phases?",
    "What should I look for in a contract for a flat?",
    "Explain how a sailing ship can sail against the wind.",
    "My back hurts after sitting all day. What can I do?",
    "Plan a weekend in the mountains for a family.",
    "What is the difference between a virus and a bacterium?",
    "Write a short poem about an old harbour.",
    "How does compound interest work?",
)
NUM_SEEDS = 5
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client saw; times in seconds since it asked."""

    question: int
    text: str
    first_seconds: float | None
    whole_seconds: float
    num_refused: int


@click.command()
@click.argument("bundle_dir", type=click.Path(path_type=Path))
@click.option("--requests", "num_requests", type=click.IntRange(1, 5000), default=500, show_default=True)
@click.option("--clients", "num_clients", type=click.IntRange(1, 256), default=32, show_default=True)
@click.option("--tokens", "num_tokens", type=click.IntRange(1, 512), default=8, show_default=True)
@click.option(
    "--queue", type=click.IntRange(1, 1024), default=24, show_default=True, help="Smaller than the clients: 429."
)
@click.option("--threads", type=int, default=None, help="Of the server's engine.")
@click.option("--seconds", type=click.IntRange(10, 1800), default=170, show_default=True, help="Time limit.")
def main(
    bundle_dir: Path,
    num_requests: int,
    num_clients: int,
    num_tokens: int,
    queue: int,
    threads: int | None,
    seconds: int,
) -> None:
    """Put a server that serves BUNDLE_DIR under load."""
    deadline = time.monotonic() + seconds
    expected = single_run(bundle_dir, num_tokens, threads)
    process, url = start(bundle_dir, queue, threads)
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        with client, ThreadPoolExecutor(num_clients) as pool:

            def ask_one(number: int) -> Answer | None:
                return ask(client, bundle_dir.resolve().name, number, num_tokens, deadline)

            before = resident_mb(process.pid)
            start_seconds = time.monotonic()
            answers = [answer for answer in pool.map(ask_one, range(num_requests)) if answer]
            wall_seconds = time.monotonic() - start_seconds
        after, counted = resident_mb(process.pid), metrics(url)
    finally:
        process.terminate()
        exit_code = process.wait(60)
    result = {
        "bundle": bundle_dir.name,
        "requests": num_requests,
        "clients": num_clients,
        "max_tokens": num_tokens,
        "queue": queue,
        "answered": len(answers),
        "wrong": sum(answer.text != expected[answer.question] for answer in answers),
        "refused_429": sum(answer.num_refused for answer in answers),
        "wall_seconds": round(wall_seconds, 1),
        "requests_per_second": round(len(answers) / wall_seconds, 2),
        "answer_seconds": percentiles([answer.whole_seconds for answer in answers]),
        "first_token_seconds": percentiles([a.first_seconds for a in answers if a.first_seconds is not None]),
        "resident_mb_before": before,
        "resident_mb_after": after,
        "swaps": counted.get("coreinfer_swaps_total", 0.0),
        "exit_code": exit_code,
    }
    for name, value in result.items():
        print(f"{name:22} {value}")
    print(json.dumps(result))


def question(number: int) -> tuple[str, int]:
    """Give the prompt and the seed of a request."""
    return PROMPTS[number % len(PROMPTS)], number // len(PROMPTS) % NUM_SEEDS


def single_run(bundle_dir: Path, num_tokens: int, threads: int | None) -> list[str]:
    """Answer each question alone, without a server."""
    engine = runtime.load(bundle_dir, threads=threads)
    texts = []
    for number in range(len(PROMPTS) * NUM_SEEDS):
        prompt, seed = question(number)
        messages = [{"role": "user", "content": prompt}]
        texts.append(engine.generate(messages, max_new_tokens=num_tokens, temperature=0.8, seed=seed).text)
    return texts


def start(bundle_dir: Path, queue: int, threads: int | None) -> tuple[subprocess.Popen[str], str]:
    """Start the server on any free port, and wait until it answers."""
    command: list[Any] = [Path(sys.executable).parent / "coreinfer-serve", bundle_dir, "--port", 0, "--queue", queue]
    command += [] if threads is None else ["--threads", threads]
    environment = {name: value for name, value in os.environ.items() if name != "COREINFER_API_KEY"}
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    line = process.stderr.readline()
    if not line.startswith("serving "):
        process.kill()
        raise click.ClickException(f"the server did not start: {line}{process.stderr.read()}")
    return process, line.split()[-1]


def ask(client: openai.OpenAI, model: str, number: int, num_tokens: int, deadline: float) -> Answer | None:
    """Ask one question, again after each 429; None when the time is over."""
    prompt, seed = question(number)
    options: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}], "seed": seed}
    options |= {"max_tokens": num_tokens, "temperature": 0.8}
    start_seconds, num_refused = time.monotonic(), 0
    while time.monotonic() < deadline:
        try:
            text, first_seconds = streamed(client, options) if number % 2 else (whole(client, options), None)
        except openai.RateLimitError as error:
            num_refused += 1
            time.sleep(float(error.response.headers["retry-after"]))
            continue
        return Answer(
            question=number % (len(PROMPTS) * NUM_SEEDS),
            text=text,
            first_seconds=None if first_seconds is None else first_seconds - start_seconds,
            whole_seconds=time.monotonic() - start_seconds,
            num_refused=num_refused,
        )
    return None


def whole(client: openai.OpenAI, options: dict[str, Any]) -> str:
    """Get an answer at once."""
    return client.chat.completions.create(**options).choices[0].message.content or ""


def streamed(client: openai.OpenAI, options: dict[str, Any]) -> tuple[str, float]:
    """Get an answer piece by piece, and when the first came."""
    text, first_seconds = "", None
    for chunk in client.chat.completions.create(stream=True, **options):
        first_seconds = first_seconds or time.monotonic()
        text += chunk.choices[0].delta.content or ""
    assert first_seconds is not None
    return text, first_seconds


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Give some percentiles, in seconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{percent}": round(cuts[percent - 1], 3) for percent in PERCENTILES}


def resident_mb(pid: int) -> dict[str, float]:
    """Memory of a process that is in RAM, in megabytes: its own, and what it read of the bundle's mapped weights.

    The system takes the latter back when it needs memory.
    """
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    kinds = {"own": "RssAnon:", "mapped": "RssFile:"}
    return {kind: round(int(status.split(name)[1].split()[0]) * 1024 / 1e6, 1) for kind, name in kinds.items()}


def metrics(url: str) -> dict[str, float]:
    """Read what the server counted, summed over labels."""
    sums: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if not line.startswith("#"):
            name, value = line.split("{")[0].split(" ")[0], float(line.rsplit(" ", 1)[1])
            sums[name] = sums.get(name, 0.0) + value
    return sums


if __name__ == "__main__":
    main()
