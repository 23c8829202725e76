"""Clients of a server with replicas: what they ask, and what came of it."""

import http.client
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Question", "Tally", "ask_all"]

_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt with its seed, and by each bundle's fingerprint the answer that it gets from an engine alone."""

    text: str
    seed: int
    expected: Mapping[str, str]


@dataclass(kw_only=True)
class Tally:
    """What came of requests; any thread may add to it.

    Attributes:
        ends: answered (whole or streamed), cut (a stream that ended with the event `replica_lost`), lost (all else).
        by_bundle: answers by the bundle's fingerprint.
        wrong: what was lost, or not the answer of an engine alone.
    """

    num_begun: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    by_bundle: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, end: str, fingerprint: str | None, problem: str | None) -> None:
        """Count a request that ended."""
        with self.lock:
            self.ends[end] += 1
            if fingerprint is not None:
                self.by_bundle[fingerprint] += 1
            if problem is not None:
                self.wrong.append(problem)


def ask_all(
    port: int,
    model: str,
    questions: Sequence[Question],
    *,
    num_clients: int,
    goes_on: Callable[[int], bool],
    at: Mapping[int, Callable[[], None]],
    max_tokens: int,
) -> Tally:
    """Ask one question after another from many clients.

    Args:
        goes_on: whether another request is made, after so many.
        at: what happens, in a thread of its own, when so many were begun.
    """
    tally = Tally()

    def be_a_client() -> None:
        while True:
            with tally.lock:
                number = tally.num_begun
                if not goes_on(number):
                    return
                tally.num_begun += 1
            if number in at:
                threading.Thread(target=at[number]).start()
            _ask(port, model, questions[number % len(questions)], tally, streamed=number % 2 == 1, length=max_tokens)

    with ThreadPoolExecutor(num_clients) as pool:
        for client in [pool.submit(be_a_client) for _ in range(num_clients)]:
            client.result()
    return tally


def _ask(port: int, model: str, question: Question, tally: Tally, *, streamed: bool, length: int) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question.text}],
        "seed": question.seed,
        "max_tokens": length,
        "mode": "similarity",
        "stream": streamed,
    }
    try:
        status, text = _post(port, body)
    except (OSError, http.client.HTTPException) as error:
        tally.add("lost", None, f"{type(error).__name__}: {error}")
        return
    if status != 200:
        tally.add("lost", None, f"status {status}: {text[:200]}")
        return
    got, fingerprint, error_code = _streamed(text) if streamed else _whole(text)
    if error_code is not None:
        is_cut = error_code == "replica_lost"
        tally.add("cut" if is_cut else "lost", None, None if is_cut else f"a stream ended with {error_code}")
    elif question.expected.get(fingerprint) == got:
        tally.add("answered", fingerprint, None)
    else:
        tally.add("answered", fingerprint, f"{fingerprint} said {got!r} to {question.text[:30]!r}")


def _post(port: int, body: dict[str, Any]) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), headers={"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def _whole(text: str) -> tuple[str, str, str | None]:
    answer = json.loads(text)
    return answer["choices"][0]["message"]["content"], answer["system_fingerprint"], None


def _streamed(text: str) -> tuple[str, str, str | None]:
    """The text of a stream, its bundle's fingerprint, and the code of its error, if it has one."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    if not events or events[-1] != "[DONE]":
        return "", "", "no end"
    chunks = [json.loads(event) for event in events[:-1]]
    if "error" in chunks[-1]:
        return "", "", chunks[-1]["error"]["code"]
    said = "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks)
    if chunks[-1]["choices"][0]["finish_reason"] is None:
        return "", "", "no finish"
    return said, chunks[0]["system_fingerprint"], None
