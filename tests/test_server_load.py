"""Many clients, and clients that behave badly."""

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from coreinfer import runtime

from .model_factory import corpus_texts
from .server_process import JSON, RunningServer, serving

NUM_CLIENTS, NUM_REQUESTS = 32, 500
# Prompts of five lengths, each with several seeds: 100 questions, each asked five times.
QUESTIONS = [(text, seed) for text in corpus_texts()[:25] for seed in range(4)]
MAX_GROWTH_BYTES = 24 << 20
TOKEN_SECONDS = 0.02


@pytest.fixture
def slow_server(bundle: Path) -> Iterator[RunningServer]:
    """One request at a time and two that wait, 20 ms a token, 3 s a request."""
    arguments = ("--parallel", 1, "--queue", 2, "--timeout", 3, "--grace", 1, "--max-new-tokens", 250)
    with serving(bundle, *arguments, token_seconds=TOKEN_SECONDS) as running:
        yield running


def body(bundle: Path, *, max_tokens: int = 8, **options: Any) -> dict[str, Any]:
    return {"model": bundle.name, "prompt": corpus_texts()[0], "max_tokens": max_tokens, "temperature": 0} | options


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def raw_request(server: RunningServer, path: str, content: dict[str, Any]) -> Iterator[socket.socket]:
    """Send a request over a socket of one's own, to treat it as no client library would."""
    data = json.dumps(content).encode()
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    )
    head = "".join(f"{line}\r\n" for line in (*lines, ""))
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.encode() + data)
        yield connection


# Many clients


def test_500_requests_of_32_clients_get_the_answers_of_a_single_run(bundle: Path, engine: runtime.Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.8}
    expected = {
        (text, seed): engine.generate([{"role": "user", "content": text}], seed=seed, **options).text
        for text, seed in QUESTIONS
    }
    assert len(set(expected.values())) > len(QUESTIONS) // 2

    def ask(client: openai.OpenAI, number: int) -> tuple[str, str]:
        text, seed = QUESTIONS[number % len(QUESTIONS)]
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "seed": seed}
        asked |= {"model": bundle.name, "max_tokens": 12, "temperature": 0.8}
        if number % 2:
            return expected[text, seed], client.chat.completions.create(**asked).choices[0].message.content or ""
        chunks = client.chat.completions.create(stream=True, **asked)
        return expected[text, seed], "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with serving(bundle, "--queue", NUM_CLIENTS) as server:
        clients = [server.client() for _ in range(NUM_CLIENTS)]
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:

            def be_a_client(index: int, count: int) -> list[tuple[str, str]]:
                # It asks again when it has its answer.
                return [ask(clients[index], number) for number in range(index, count, NUM_CLIENTS)]

            def run(count: int) -> list[tuple[str, str]]:
                jobs = [pool.submit(be_a_client, index, count) for index in range(NUM_CLIENTS)]
                return [pair for job in jobs for pair in job.result()]

            run(64)
            before = server.resident_bytes()
            answers = run(NUM_REQUESTS)
            after = server.resident_bytes()
        for client in clients:
            client.close()
        assert len(answers) == NUM_REQUESTS
        assert [got for _, got in answers] == [wanted for wanted, _ in answers]
        assert after - before < MAX_GROWTH_BYTES
        assert server.metric("coreinfer_http_requests_total", status="200", route="/v1/chat/completions") == 564
        assert server.metric("coreinfer_generations_total") == 564
        assert server.metric("coreinfer_queue_length") == 0


def test_requests_share_passes_and_what_their_prompts_begin_with(bundle: Path) -> None:
    with serving(bundle, "--parallel", 4, token_seconds=TOKEN_SECONDS) as server, ThreadPoolExecutor(4) as pool:
        expected = server.post("/v1/completions", json=body(bundle, max_tokens=40)).json()["choices"][0]["text"]
        jobs = [pool.submit(server.post, "/v1/completions", json=body(bundle, max_tokens=40)) for _ in range(8)]
        assert [job.result().json()["choices"][0]["text"] for job in jobs] == [expected] * 8
        assert server.metric("coreinfer_batch_size_sum") > 1.5 * server.metric("coreinfer_batch_size_count")
        assert server.metric("coreinfer_prefix_hits_total") == 8
        assert server.metric("coreinfer_active") == server.metric("coreinfer_queue_length") == 0
        assert 0 < server.metric("coreinfer_kv_free_pages") < server.metric("coreinfer_kv_pages")


def test_a_full_queue_says_when_to_come_again(bundle: Path, slow_server: RunningServer) -> None:
    expected = slow_server.post("/v1/completions", json=body(bundle)).json()["choices"][0]["text"]
    refused = []

    def ask(number: int) -> str:
        for _ in range(200):
            response = slow_server.post("/v1/completions", json=body(bundle))
            if response.status_code != 429:
                return str(response.json()["choices"][0]["text"])
            refused.append(response)
            time.sleep(0.1)
        raise AssertionError("no place in 200 attempts")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(16))) == [expected] * 16
    assert refused
    assert {response.json()["error"]["code"] for response in refused} == {"queue_full"}
    assert all(1 <= int(response.headers["retry-after"]) <= 60 for response in refused)
    assert slow_server.metric("coreinfer_http_requests_total", status="429") == len(refused)


def test_openais_client_comes_again_by_itself(bundle: Path, slow_server: RunningServer) -> None:
    def ask(number: int) -> str:
        with slow_server.client(max_retries=8) as client:
            return str(client.completions.create(**body(bundle)).choices[0].text)

    with ThreadPoolExecutor(5) as pool:
        assert len(set(pool.map(ask, range(5)))) == 1
    assert slow_server.metric("coreinfer_http_requests_total", status="429") > 0


# Time


def test_a_request_that_takes_too_long(bundle: Path, slow_server: RunningServer) -> None:
    response = slow_server.post("/v1/completions", json=body(bundle, max_tokens=165))
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert slow_server.post("/v1/completions", json=body(bundle)).status_code == 200


def test_a_stream_that_takes_too_long_ends_in_good_order(bundle: Path, slow_server: RunningServer) -> None:
    response = slow_server.post("/v1/completions", json=body(bundle, max_tokens=165, stream=True))
    events = response.text.strip().split("\n\n")
    assert response.status_code == 200
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert len(events) > 20
    with slow_server.client() as client, pytest.raises(openai.APIError, match="took longer than 3 s"):
        list(client.completions.create(**body(bundle, max_tokens=165, stream=True)))


def test_waiting_counts(bundle: Path, slow_server: RunningServer) -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow_server.post, "/v1/completions", json=body(bundle, max_tokens=120))
        assert eventually(lambda: slow_server.metric("coreinfer_first_token_seconds_count") == 1)
        second = pool.submit(slow_server.post, "/v1/completions", json=body(bundle, max_tokens=120))
        assert (first.result().status_code, second.result().status_code) == (200, 504)


# Clients that go away or are slow


@pytest.mark.parametrize("stream", [False, True])
def test_a_dropped_connection_ends_its_generation(bundle: Path, slow_server: RunningServer, stream: bool) -> None:
    with raw_request(slow_server, "/v1/completions", body(bundle, max_tokens=140, stream=stream)) as connection:
        assert eventually(lambda: slow_server.metric("coreinfer_first_token_seconds_count") == 1)
        if stream:
            assert b"text/event-stream" in connection.recv(4096)
    assert eventually(lambda: slow_server.metric("coreinfer_generations_total", outcome="cancelled") == 1, 1.5)
    assert slow_server.metric("coreinfer_completion_tokens_total") < 120
    assert slow_server.post("/v1/completions", json=body(bundle)).status_code == 200


def test_a_dropped_connection_frees_its_place_in_the_queue(bundle: Path, slow_server: RunningServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(slow_server.post, "/v1/completions", json=body(bundle, max_tokens=100))
        assert eventually(lambda: slow_server.metric("coreinfer_first_token_seconds_count") == 1)
        with (
            raw_request(slow_server, "/v1/completions", body(bundle)),
            raw_request(slow_server, "/v1/completions", body(bundle)),
        ):
            assert eventually(lambda: slow_server.metric("coreinfer_queue_length") == 2)
            assert slow_server.post("/v1/completions", json=body(bundle)).status_code == 429
        assert eventually(lambda: slow_server.metric("coreinfer_queue_length") == 0, 1)
        assert not other.done()
        assert other.result().status_code == 200


def test_a_slow_reader_holds_up_nobody(bundle: Path) -> None:
    with serving(bundle) as server:
        content = body(bundle, max_tokens=165, stream=True, logprobs=20)
        with raw_request(server, "/v1/completions", content) as connection:
            start = time.monotonic()
            assert server.post("/v1/completions", json=body(bundle)).status_code == 200
            assert time.monotonic() - start < 10
            received = b""
            while b"[DONE]" not in received:
                received += (chunk := connection.recv(8192))
                assert chunk
                time.sleep(0.001)
        assert received.count(b"data: {") == server.metric("coreinfer_completion_tokens_total") - 8


def test_a_body_of_10_megabytes(bundle: Path, slow_server: RunningServer) -> None:
    large = json.dumps(body(bundle, prompt="x" * (10 << 20)))
    # The first answer of all needs memory of its own.
    assert slow_server.post("/v1/completions", json=body(bundle)).status_code == 200
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(slow_server.post, "/v1/completions", json=body(bundle, max_tokens=50))
        before = slow_server.resident_bytes()
        for _ in range(3):
            response = slow_server.post("/v1/completions", content=large, headers=JSON)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        # In chunks its size is not announced.
        response = slow_server.post("/v1/completions", content=iter([large.encode()]), headers=JSON)
        assert response.status_code == 413
        # Four were sent, and not one was kept.
        assert slow_server.resident_bytes() - before < 8 << 20
        assert other.result().status_code == 200


def test_a_client_that_waits_to_be_asked_for_its_body(slow_server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", slow_server.port), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Expect: 100-continue\r\nContent-Length: 20000000\r\n\r\n"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(bundle: Path, slow_server: RunningServer, number: int) -> None:
    expected = slow_server.post("/v1/completions", json=body(bundle, max_tokens=20)).json()["choices"][0]["text"]
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(slow_server.post, "/v1/completions", json=body(bundle, max_tokens=20, stream=stream))
            for stream in (False, True)
        ]
        # The one before and these two, of which one may still be waiting: who connects after the signal is refused.
        begun, waiting = "coreinfer_first_token_seconds_count", "coreinfer_queue_length"
        assert eventually(lambda: slow_server.metric(begun) + slow_server.metric(waiting) >= 3)
        slow_server.process.send_signal(number)
        whole, stream = (job.result() for job in asked)
    events = [json.loads(part.removeprefix("data: ")) for part in stream.text.split("\n\n")[:-2]]
    assert whole.json()["choices"][0]["text"] == expected
    assert "".join(event["choices"][0]["text"] for event in events) == expected
    assert slow_server.process.wait(10) == 0
    with pytest.raises(httpx.ConnectError):
        slow_server.get("/health")


def test_a_signal_cuts_what_takes_longer_than_the_grace_time(bundle: Path, slow_server: RunningServer) -> None:
    with ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(slow_server.post, "/v1/completions", json=body(bundle, max_tokens=140, stream=stream))
            for stream in (True, False, False)
        ]
        assert eventually(lambda: slow_server.metric("coreinfer_queue_length") == 2)
        start = time.monotonic()
        assert slow_server.end() == 0
        assert 0.9 < time.monotonic() - start < 5
        answers = [job.result() for job in asked]
    cut = [answer for answer in answers if answer.status_code == 503]
    streams = [answer for answer in answers if answer.headers["content-type"].startswith("text/event-stream")]
    assert all(answer.json()["error"]["code"] == "shutting_down" for answer in cut)
    assert all(answer.text.endswith("data: [DONE]\n\n") and "shutting_down" in answer.text for answer in streams)
    assert len(cut) + len(streams) == 3


def test_a_second_signal_is_survived_in_good_order(bundle: Path, slow_server: RunningServer) -> None:
    sending = threading.Thread(
        target=lambda: slow_server.post("/v1/completions", json=body(bundle, max_tokens=10)), daemon=True
    )
    sending.start()
    assert eventually(lambda: slow_server.metric("coreinfer_first_token_seconds_count") == 1)
    slow_server.process.send_signal(signal.SIGTERM)
    assert slow_server.end() == 0
    sending.join(5)
