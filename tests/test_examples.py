"""Examples of other programs: each is run as its first lines say, on a tiny bundle."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from coreinfer import runtime

from .engine_inputs import PROMPT
from .server_process import RunningServer, serving

EXAMPLES = Path(__file__).parent.parent / "examples"
TURNS = (PROMPT, "And then?")
# Nothing may be asked but the server.
NO_TELEMETRY = {
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "LLAMA_INDEX_DISABLE_TELEMETRY": "true",
}


@dataclass(frozen=True, kw_only=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str


def run(command: list[str], **environment: str) -> Done:
    """What it wrote, to the letter: a random model also says carriage returns."""
    done = subprocess.run(
        command,
        capture_output=True,
        check=False,
        timeout=600,
        stdin=subprocess.DEVNULL,
        env=os.environ | NO_TELEMETRY | {"PYTHONIOENCODING": "utf-8"} | environment,
    )
    return Done(status=done.returncode, out=done.stdout.decode(), err=done.stderr.decode())


@pytest.fixture(scope="module")
def answers(long_bundle: Path) -> list[str]:
    """What both turns should get: greedy, 64 tokens."""
    engine = runtime.load(long_bundle, engine="native", threads=1)
    messages: list[dict[str, str]] = []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        answer = engine.generate(messages, max_new_tokens=64, temperature=0.0).text
        messages.append({"role": "assistant", "content": answer})
    return [message["content"] for message in messages[1::2]]


# The server


@pytest.fixture(scope="module")
def server(long_bundle: Path) -> Iterator[RunningServer]:
    with serving(long_bundle, key="sesame") as running:
        yield running


@pytest.mark.parametrize("name", ["langchain_chat", "llamaindex_chat"])
def test_chats(name: str, server: RunningServer, answers: list[str]) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *TURNS]
    done = run(command, OPENAI_BASE_URL=f"{server.url}/v1", OPENAI_API_KEY=server.key)
    assert done.status == 0, done.err
    assert done.out == "".join(f"{answer}\n" for answer in answers)


# llm


# Where `make test` installs llm: it wants another openai than llama-index.
LLM = Path(sys.prefix) / "llm"
needs_llm = pytest.mark.skipif(not LLM.exists(), reason=f"no folder {LLM}, which `make test` makes")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the plugin is installed into, with the entry point by which llm finds it."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(EXAMPLES / "llm-coreinfer", folder / "source")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", folder / "installed"]
    done = run([sys.executable, "-m", "pip", "install", *map(str, options), str(source)])
    assert done.status == 0, done.err
    return folder / "installed"


# What starts an llm takes longer than what it does here.
SESSION = """
import json, sys
from click.testing import CliRunner
from llm.cli import cli
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(cli, command)
    print(json.dumps([done.exit_code, done.stdout_bytes.decode(), done.stderr_bytes.decode()]))
"""


@pytest.fixture
def environment(plugin: Path, tmp_path: Path) -> dict[str, str]:
    """Of an llm that has this plugin and no other, and a memory of the test's own."""
    (tmp_path / "llm").mkdir()
    path = os.pathsep.join([str(LLM), str(plugin), os.environ.get("PYTHONPATH", "")])
    return {"LLM_USER_PATH": str(tmp_path / "llm"), "LLM_LOAD_PLUGINS": "llm-coreinfer", "PYTHONPATH": path}


@pytest.fixture
def llm(environment: dict[str, str]) -> Callable[..., list[Done]]:
    """A function (*commands) that gives them to one process of llm, a list of arguments each."""

    def give(*commands: list[object]) -> list[Done]:
        texts = [list(map(str, command)) for command in commands]
        session = run([sys.executable, "-c", SESSION, json.dumps(texts)], **environment)
        assert session.status == 0, session.err
        ended = map(json.loads, session.out.splitlines())
        return [Done(status=status, out=out, err=err) for status, out, err in ended]

    return give


@needs_llm
def test_llm_answers_and_goes_on(
    llm: Callable[..., list[Done]], environment: dict[str, str], long_bundle: Path, answers: list[str]
) -> None:
    greedy = ["-o", "max_tokens", "64", "-o", "temperature", "0"]
    added, listed, first, logged, whole = llm(
        ["coreinfer", "add", "tiny", long_bundle],
        ["coreinfer", "list"],
        ["-m", "tiny", TURNS[0], *greedy],
        ["logs", "--json", "-n", 1],
        ["-m", "tiny", TURNS[0], "--no-stream", "--no-log", *greedy],
    )
    assert (added.status, added.err) == (0, "")
    assert listed.out == f"tiny\t{long_bundle}\n"
    assert (first.status, first.out) == (0, answers[0] + "\n"), first.err
    assert whole.out == first.out
    usage = json.loads(logged.out)[0]
    assert usage["output_tokens"] == 64
    assert usage["input_tokens"] > 0
    second = run([sys.executable, "-m", "llm", "-c", TURNS[1], *greedy], **environment)
    assert (second.status, second.out) == (0, answers[1] + "\n"), second.err
    removed, listed = llm(["coreinfer", "remove", "tiny"], ["coreinfer", "list"])
    assert removed.status == 0
    assert listed.out == ""


@needs_llm
def test_llm_follows_a_schema(llm: Callable[..., list[Done]], long_bundle: Path) -> None:
    days = {"days": {"enum": [1, 2, 3]}}
    schema = {"type": "object", "properties": days, "required": ["days"], "additionalProperties": False}
    _, done = llm(
        ["coreinfer", "add", "tiny", long_bundle],
        ["-m", "tiny", PROMPT, "--schema", json.dumps(schema), "-o", "max_tokens", 60],
    )
    assert done.status == 0, done.err
    assert json.loads(done.out)["days"] in (1, 2, 3)


@needs_llm
def test_llm_is_told_what_is_wrong(llm: Callable[..., list[Done]], long_bundle: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n")
    refused, unknown, _, wrong, attached = llm(
        ["coreinfer", "add", "none", tmp_path],
        ["coreinfer", "remove", "none"],
        ["coreinfer", "add", "tiny", long_bundle],
        ["-m", "tiny", PROMPT, "-o", "temperature", -1],
        ["-m", "tiny", PROMPT, "-a", image],
    )
    assert refused.status == 2
    assert "is no bundle: expected a folder with manifest.json" in refused.err
    assert "is no model of this plugin" in unknown.err
    assert wrong.status == 1
    assert wrong.err.startswith("Error: temperature: expected")
    assert "does not support attachments" in attached.err.replace("\n", " ")
