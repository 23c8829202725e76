"""Examples of other programs: each is run as its first lines say, on a tiny bundle."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
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


@pytest.fixture(scope="module")
def llm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llm and the plugin, installed above this environment: llm wants openai 3, which llama-index does not take."""
    folder = tmp_path_factory.mktemp("llm")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    above = next((folder / "venv/lib").glob("python*/site-packages")) / "below.pth"
    above.write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n", encoding="utf-8")
    # From a copy: building leaves folders beside the source.
    plugin = shutil.copytree(EXAMPLES / "llm-coreinfer", folder / "plugin")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-build-isolation"]
    done = run([*pip, str(plugin)])
    assert done.status == 0, done.err
    return folder / "venv/bin/llm"


Llm = Callable[..., Done]


@pytest.fixture
def llm(llm_program: Path, tmp_path: Path) -> Llm:
    """Runs llm with no plugin but this one, and with a memory of its own."""
    home = tmp_path / "llm"
    home.mkdir()

    def llm(*arguments: object) -> Done:
        command = [str(llm_program), *map(str, arguments)]
        return run(command, LLM_USER_PATH=str(home), LLM_LOAD_PLUGINS="llm-coreinfer")

    return llm


def test_llm_answers_and_goes_on(llm: Llm, long_bundle: Path, answers: list[str]) -> None:
    assert llm("coreinfer", "add", "tiny", long_bundle).status == 0
    assert llm("coreinfer", "list").out == f"tiny\t{long_bundle}\n"
    first = llm("-m", "tiny", TURNS[0], "-o", "max_tokens", 64, "-o", "temperature", 0)
    assert (first.status, first.out) == (0, answers[0] + "\n"), first.err
    second = llm("-c", TURNS[1], "-o", "max_tokens", 64, "-o", "temperature", 0)
    assert (second.status, second.out) == (0, answers[1] + "\n"), second.err
    whole = llm("-m", "tiny", TURNS[0], "--no-stream", "-o", "max_tokens", 64, "-o", "temperature", 0)
    assert whole.out == first.out
    logged = json.loads(llm("logs", "--json", "-n", 1).out)[0]
    assert logged["output_tokens"] == 64
    assert logged["input_tokens"] > 0
    assert llm("coreinfer", "remove", "tiny").status == 0
    assert llm("coreinfer", "list").out == ""


def test_llm_follows_a_schema(llm: Llm, long_bundle: Path) -> None:
    llm("coreinfer", "add", "tiny", long_bundle)
    days = {"days": {"enum": [1, 2, 3]}}
    schema = {"type": "object", "properties": days, "required": ["days"], "additionalProperties": False}
    done = llm("-m", "tiny", PROMPT, "--schema", json.dumps(schema), "-o", "max_tokens", 60)
    assert done.status == 0, done.err
    assert json.loads(done.out)["days"] in (1, 2, 3)


def test_llm_is_told_what_is_wrong(llm: Llm, long_bundle: Path, tmp_path: Path) -> None:
    refused = llm("coreinfer", "add", "none", tmp_path)
    assert refused.status == 2
    assert "is no bundle: expected a folder with manifest.json" in refused.err
    assert "is no model of this plugin" in llm("coreinfer", "remove", "none").err
    llm("coreinfer", "add", "tiny", long_bundle)
    wrong = llm("-m", "tiny", PROMPT, "-o", "temperature", -1)
    assert wrong.status == 1
    assert wrong.err.startswith("Error: temperature: expected")
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "does not support attachments" in llm("-m", "tiny", PROMPT, "-a", image).err.replace("\n", " ")
