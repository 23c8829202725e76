"""Examples of other programs: each is run as its first lines say, on a tiny bundle."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
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


needs_llm = pytest.mark.skipif(
    importlib.util.find_spec("llm") is None,
    reason="no package llm: it wants openai 3, which llama-index does not take; install it elsewhere",
)
# As the entry point would have it, which an installation makes.
START = """
import sys
import llm
from llm import cli, plugins
import llm_coreinfer
plugins.pm.register(llm_coreinfer)
llm_coreinfer.register_commands(cli.cli)
cli.cli(prog_name="llm")
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder for what llm remembers."""
    return tmp_path / "llm"


def llm(home: Path, *arguments: object) -> Done:
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-c", START, *map(str, arguments)]
    path = os.pathsep.join([str(EXAMPLES / "llm-coreinfer"), os.environ.get("PYTHONPATH", "")])
    return run(command, LLM_USER_PATH=str(home), LLM_LOAD_PLUGINS="", PYTHONPATH=path)


@needs_llm
def test_llm_answers_and_goes_on(home: Path, long_bundle: Path, answers: list[str]) -> None:
    assert llm(home, "coreinfer", "add", "tiny", long_bundle).status == 0
    assert llm(home, "coreinfer", "list").out == f"tiny\t{long_bundle}\n"
    first = llm(home, "-m", "tiny", TURNS[0], "-o", "max_tokens", 64, "-o", "temperature", 0)
    assert (first.status, first.out) == (0, answers[0] + "\n"), first.err
    second = llm(home, "-c", TURNS[1], "-o", "max_tokens", 64, "-o", "temperature", 0)
    assert (second.status, second.out) == (0, answers[1] + "\n"), second.err
    whole = llm(home, "-m", "tiny", TURNS[0], "--no-stream", "-o", "max_tokens", 64, "-o", "temperature", 0)
    assert whole.out == first.out
    logged = json.loads(llm(home, "logs", "--json", "-n", 1).out)[0]
    assert logged["output_tokens"] == 64
    assert logged["input_tokens"] > 0
    assert llm(home, "coreinfer", "remove", "tiny").status == 0
    assert llm(home, "coreinfer", "list").out == ""


@needs_llm
def test_llm_follows_a_schema(home: Path, long_bundle: Path) -> None:
    llm(home, "coreinfer", "add", "tiny", long_bundle)
    days = {"days": {"enum": [1, 2, 3]}}
    schema = {"type": "object", "properties": days, "required": ["days"], "additionalProperties": False}
    done = llm(home, "-m", "tiny", PROMPT, "--schema", json.dumps(schema), "-o", "max_tokens", 60)
    assert done.status == 0, done.err
    assert json.loads(done.out)["days"] in (1, 2, 3)


@needs_llm
def test_llm_is_told_what_is_wrong(home: Path, long_bundle: Path, tmp_path: Path) -> None:
    refused = llm(home, "coreinfer", "add", "none", tmp_path)
    assert refused.status == 2
    assert "is no bundle: expected a folder with manifest.json" in refused.err
    assert "is no model of this plugin" in llm(home, "coreinfer", "remove", "none").err
    llm(home, "coreinfer", "add", "tiny", long_bundle)
    wrong = llm(home, "-m", "tiny", PROMPT, "-o", "temperature", -1)
    assert wrong.status == 1
    assert wrong.err.startswith("Error: temperature: expected")
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "does not support attachments" in llm(home, "-m", "tiny", PROMPT, "-a", image).err.replace("\n", " ")
