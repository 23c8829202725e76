"""`coreinfer-serve --ray local`: the same answers from replicas, of which some die, and a bundle that is exchanged."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from coreinfer import runtime
from coreinfer.bundles.layout import LAYOUT

from .bundle_factory import list_again
from .model_factory import corpus_texts
from .ray_processes import replica_processes, run_until, stopped
from .server_process import COMMAND, JSON, RunningServer, serving, user

TEXTS = corpus_texts()[:8]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODEL = "served"
PARALLEL = 3


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def link(long_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is served: a link, which an exchange points to another folder."""
    made = tmp_path_factory.mktemp("links") / MODEL
    made.symlink_to(long_bundle)
    return made


@pytest.fixture(scope="module")
def replicas(link: Path) -> Iterator[RunningServer]:
    with serving(link, "--ray", "local", "--replicas", 2, "--parallel", PARALLEL, "--kv-cache-mb", 32) as running:
        yield running
        processes = replica_processes(running.process.pid)
        assert running.end() == 0
        assert not [process for process in processes if Path(f"/proc/{process}").exists()]


def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def body(**options: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": TEXTS[0], "max_tokens": 8, "temperature": 0} | options


def events(text: str) -> list[Any]:
    """The events of a stream, which must have an end."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def point(link: Path, target: Path) -> None:
    fresh = link.with_suffix(".fresh")
    fresh.symlink_to(target)
    fresh.replace(link)


def test_without_ray_the_extra_is_named(bundle: Path) -> None:
    code = f"import sys\nsys.modules['ray'] = None\n{COMMAND}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle), "--port", "0", "--ray", "local"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "error: --ray needs the package ray; pip install 'coreinfer[ray]'\n")


@needs_ray
def test_answers_are_those_of_an_engine_alone(replicas: RunningServer, engine: runtime.Engine) -> None:
    def ask(number: int) -> tuple[str, str]:
        text, streamed = TEXTS[number % len(TEXTS)], number % 2 == 1
        modes: tuple[runtime.Mode, ...] = ("similarity", "dense", "auto")
        mode = modes[number % 3]
        asked = {"model": MODEL, "messages": user(text), "seed": number, "max_tokens": 12, "mode": mode}
        response = replicas.post(CHAT, json=asked | {"stream": streamed})
        expected = engine.generate(user(text), seed=number, max_new_tokens=12, temperature=1.0, mode=mode).text
        if streamed:
            return "".join(event["choices"][0]["delta"]["content"] for event in events(response.text)), expected
        return response.json()["choices"][0]["message"]["content"], expected

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(24)))
    assert [got for got, _ in answers] == [wanted for _, wanted in answers]
    assert replicas.metric("coreinfer_generations_total") == 24
    assert replicas.metric("coreinfer_pack_uses_total") > 0
    assert replicas.metric("coreinfer_replicas") == 2
    assert replicas.metric("coreinfer_asked_again_total") == 0


@needs_ray
def test_what_else_an_answer_says(replicas: RunningServer) -> None:
    answer = replicas.post(COMPLETIONS, json=body(logprobs=2, n=2, seed=3, temperature=1)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(len(choice["logprobs"]["tokens"]) == 8 for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["coreinfer"]["prefill_seconds"] > 0
    usage = events(replicas.post(COMPLETIONS, json=body(stream=True, stream_options={"include_usage": True})).text)[-1][
        "usage"
    ]
    assert usage["completion_tokens"] == 8
    options = {"num_predict": 3, "temperature": 0}
    said = replicas.post("/api/generate", json={"model": MODEL, "prompt": "soup", "options": options}).text
    # The model may end its text before.
    assert 0 < json.loads(said.splitlines()[-1])["eval_count"] <= 3
    assert len(replicas.get(f"/coreinfer/map?model={MODEL}").json()["clusters"]) == 4
    assert replicas.get("/").status_code == 200
    assert 0 < replicas.metric("coreinfer_kv_free_pages") <= replicas.metric("coreinfer_kv_pages")


@needs_ray
@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_schemas(replicas: RunningServer, stream: bool) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
    asked = {"model": MODEL, "messages": user("soup"), "max_tokens": 200, "stream": stream}
    forced = replicas.post(CHAT, json=asked | {"tools": [tool], "tool_choice": "required"})
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    followed = replicas.post(CHAT, json=asked | {"response_format": form})
    if stream:
        ends = events(forced.text)
        calls = [call for event in ends for call in event["choices"][0]["delta"]["tool_calls"] or []]
        assert ends[-1]["choices"][0]["finish_reason"] == "tool_calls"
        content = "".join(event["choices"][0]["delta"]["content"] for event in events(followed.text))
    else:
        calls = forced.json()["choices"][0]["message"]["tool_calls"]
        content = followed.json()["choices"][0]["message"]["content"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"n": 7}]
    assert json.loads(content) == {"n": 7}


@needs_ray
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_replica_refuses(replicas: RunningServer, stream: bool) -> None:
    response = replicas.post(COMPLETIONS, json=body(prompt="oven " * 2000, stream=stream))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    response = replicas.post(COMPLETIONS, json=body(logit_bias={"99999": 1}, stream=stream))
    assert response.status_code == 400
    assert "logit_bias" in response.json()["error"]["message"]
    assert replicas.post(COMPLETIONS, json=body(model="other")).status_code == 404


@needs_ray
def test_who_goes_away_is_answered_no_more(replicas: RunningServer) -> None:
    before = replicas.metric("coreinfer_completion_tokens_total")
    content = body(max_tokens=1900, stream=True, logprobs=5)
    with replicas.client().completions.create(**content, stream_options={}) as stream:
        next(iter(stream))
    assert eventually(lambda: replicas.metric("coreinfer_generations_total", outcome="cancelled") == 1)
    assert replicas.metric("coreinfer_completion_tokens_total") - before < 1900
    assert eventually(lambda: replicas.metric("coreinfer_active") == 0)


def begin_stream(connection: http.client.HTTPConnection) -> tuple[http.client.HTTPResponse, bytes]:
    """Wait for a stream's first line."""
    response = connection.getresponse()
    return response, response.readline()


@needs_ray
def test_killed_replicas_lose_no_waiting_request(replicas: RunningServer) -> None:
    """Both are killed. What no client has a token of is answered by those that Ray starts; a stream ends in order."""
    long = body(prompt="soup", max_tokens=1900, logprobs=5)
    short = replicas.post(COMPLETIONS, json=body()).json()["choices"][0]["text"]
    num_errors = replicas.metric("coreinfer_generations_total", outcome="error")
    with ExitStack() as stack:

        def send(content: dict[str, Any]) -> http.client.HTTPConnection:
            connection = stack.enter_context(
                closing(http.client.HTTPConnection("127.0.0.1", replicas.port, timeout=60))
            )
            connection.request("POST", COMPLETIONS, json.dumps(content), headers=JSON)
            return connection

        processes = replica_processes(replicas.process.pid)
        assert len(processes) == 2
        with stopped(processes):
            streamed, *whole = [send({**long, "stream": number == 0}) for number in range(5)]
            begun = stack.enter_context(ThreadPoolExecutor(1)).submit(begin_stream, streamed)
            # One's last token may be on its way when all are stopped again: what has begun is not all that is lost.
            assert run_until(lambda: replicas.metric("coreinfer_active") == 5 and begun.done(), processes)
            stream, first = begun.result()
            waiting = [send(body(stream=number % 2 == 1)) for number in range(4)]
            assert eventually(lambda: replicas.metric("coreinfer_queue_length") >= 5 + len(waiting) - 2 * PARALLEL)
            for process in processes:
                os.kill(process, signal.SIGKILL)
        end = events((first + stream.read()).decode())[-1]
        assert end["error"]["code"] == "replica_lost"
        assert end["error"]["message"].endswith("was lost; what it said before is not repeated")
        texts = [json.loads(each.getresponse().read())["choices"][0]["text"] for each in whole]
        assert texts[:1] * 4 == texts
        for number, each in enumerate(waiting):
            said = each.getresponse().read().decode()
            found = events(said) if number % 2 == 1 else [json.loads(said)]
            assert "".join(event["choices"][0]["text"] for event in found) == short
    assert 1 <= replicas.metric("coreinfer_asked_again_total") <= len(whole) + len(waiting)
    assert replicas.metric("coreinfer_generations_total", outcome="error") == num_errors + 1
    assert eventually(lambda: replicas.metric("coreinfer_replicas") == 2)


@needs_ray
def test_another_models_bundle_is_not_taken(replicas: RunningServer, link: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(link, tmp_path / "other"))
    with (other / LAYOUT.chat_template).open("a") as template:
        template.write(" ")
    list_again(other)
    before = link.resolve()
    point(link, other)
    replicas.process.send_signal(signal.SIGHUP)
    assert eventually(lambda: replicas.metric("coreinfer_exchanges_total", outcome="failed") == 1)
    assert any("it is of another model (tokenizer/chat_template.jinja differ)" in line for line in replicas.lines)
    assert replicas.post(COMPLETIONS, json=body()).status_code == 200
    point(link, before)


@needs_ray
def test_a_bundle_is_exchanged_while_requests_come(replicas: RunningServer, link: Path, bundle: Path) -> None:
    before = replicas.post(COMPLETIONS, json=body()).json()["system_fingerprint"]
    point(link, bundle)

    def ask_on(_: int) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        # httpx makes a new context of SSL for each request, which takes longer than the answer.
        with httpx.Client(base_url=replicas.url, timeout=60) as client:
            while not found or not any(": exchanged coreinfer-" in line for line in replicas.lines):
                response = client.post(COMPLETIONS, json=body())
                found.append((response.status_code, response.json().get("system_fingerprint", response.text)))
                time.sleep(0.02)
        return found

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask_on, number) for number in range(2)]
        replicas.process.send_signal(signal.SIGHUP)
        answers = [answer for each in asking for answer in each.result()]
    assert replicas.metric("coreinfer_exchanges_total", outcome="done") == 1
    after = replicas.post(COMPLETIONS, json=body()).json()["system_fingerprint"]
    assert {status for status, _ in answers} == {200}
    assert after != before
    assert {name for _, name in answers} <= {before, after}
    # The new one reads shorter texts.
    assert replicas.post(COMPLETIONS, json=body(max_tokens=1000)).status_code == 400
