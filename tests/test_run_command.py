"""`coreinfer-run`, in this process and as a process of its own."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import pytest
from click.testing import CliRunner, Result
from coreinfer import runtime
from coreinfer.bundles.layout import LAYOUT
from coreinfer.runtime.commands.run import main
from coreinfer.runtime.options import GenerationOptions
from coreinfer.runtime.routing import router

from .bundle_factory import flip_bit, list_again
from .model_factory import corpus_texts

FIRST, SECOND = corpus_texts()[0], corpus_texts()[2]
TIMEOUT_SECONDS = 120
COMMAND = [sys.executable, "-c", "from coreinfer.runtime.commands.run import main; main()"]


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    """A command installs handlers of signals and of the log, which outlive a call within this process."""
    handler, handlers = signal.getsignal(signal.SIGTERM), list(logging.root.handlers)
    yield
    signal.signal(signal.SIGTERM, handler)
    logging.root.handlers[:] = handlers


@pytest.fixture(scope="module")
def engine(bundle: Path) -> runtime.Engine:
    return runtime.load(bundle, device="cpu", dtype="float32")


@pytest.fixture
def without_template(bundle: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / LAYOUT.chat_template).unlink()
    list_again(copy)
    return copy


def run(*arguments: object, text: str | bytes | None = None) -> Result:
    options = ["--device", "cpu", "--dtype", "float32"]
    return CliRunner().invoke(main, [*options, *map(str, arguments)], input=text)


def said(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# What it prints


def test_text_on_stdout_and_figures_on_stderr(bundle: Path, engine: runtime.Engine) -> None:
    result = run(bundle, FIRST, "-n", 9)
    expected = engine.generate([user(FIRST)], max_new_tokens=9)
    assert said(result) == expected.text + "\n"
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"[cluster {expected.cluster} ({expected.cluster_label}), distance ")
    assert f"mode {expected.mode}; {expected.num_prompt_tokens} prompt tokens in " in result.stderr
    assert ", 9 tokens at " in result.stderr
    assert result.stderr.endswith(", length]\n")


def test_figures_say_when_a_prompt_is_unfamiliar(bundle: Path) -> None:
    assert "unlike calibration text, mode dense;" in run(bundle, "zzz qqq", "-n", 2).stderr
    assert "unlike" not in run(bundle, FIRST, "-n", 2).stderr


def test_figures_say_when_the_router_is_unsure(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "UNSURE_MARGIN", 2.0)
    result = run(bundle, FIRST, "-n", 2, "--json")
    assert json.loads(said(result))["fallback"] == "unsure"
    assert ", about as near to a second cluster, mode dense;" in result.stderr


def test_raw_continues_the_text(bundle: Path, engine: runtime.Engine) -> None:
    assert said(run(bundle, FIRST, "--raw", "-n", 9)) == engine.generate(FIRST, raw=True, max_new_tokens=9).text + "\n"
    assert said(run(bundle, FIRST, "--raw", "-n", 9)) != said(run(bundle, FIRST, "-n", 9))


def test_without_a_template_a_prompt_is_continued(without_template: Path, engine: runtime.Engine) -> None:
    assert said(run(without_template, FIRST, "-n", 9)) == engine.generate(FIRST, raw=True, max_new_tokens=9).text + "\n"


def test_json_holds_the_whole_generation(bundle: Path, engine: runtime.Engine) -> None:
    result = run(bundle, FIRST, "-n", 9, "--json")
    assert said(result).count("\n") == 1
    got = json.loads(result.stdout)
    expected = json.loads(json.dumps(asdict(engine.generate([user(FIRST)], max_new_tokens=9))))
    assert got.keys() == expected.keys()
    measured = {"prefill_seconds", "decode_seconds", "decode_tokens_per_second"}
    assert {key: got[key] for key in got.keys() - measured} == {key: expected[key] for key in got.keys() - measured}
    assert all(got[key] > 0 for key in measured)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--temperature", "1", "--seed", "3"], {"temperature": 1.0, "seed": 3}),
        (["--temperature", "1", "--seed", "4"], {"temperature": 1.0, "seed": 4}),
        (["--temperature", "2", "--seed", "3", "--top-k", "3"], {"temperature": 2.0, "seed": 3, "top_k": 3}),
        (["--temperature", "2", "--seed", "3", "--top-p", "0.3"], {"temperature": 2.0, "seed": 3, "top_p": 0.3}),
        (["--temperature", "2", "--seed", "3", "--min-p", "0.5"], {"temperature": 2.0, "seed": 3, "min_p": 0.5}),
        (["--repetition-penalty", "1.9"], {"repetition_penalty": 1.9}),
        (["--mode", "fused"], {"mode": "fused"}),
        (["--mode", "dense"], {"mode": "dense"}),
    ],
)
def test_options_reach_the_engine(arguments: list[str], options: Any, bundle: Path, engine: runtime.Engine) -> None:
    expected = engine.generate(FIRST, raw=True, max_new_tokens=24, **options)
    got = json.loads(said(run(bundle, FIRST, "--raw", "--json", "-n", 24, *arguments)))
    assert (got["token_ids"], got["mode"]) == (list(expected.token_ids), expected.mode)
    assert got["token_ids"] != list(engine.generate(FIRST, raw=True, max_new_tokens=24).token_ids)


def test_each_stop_counts(bundle: Path, engine: runtime.Engine) -> None:
    whole = engine.generate(FIRST, raw=True, max_new_tokens=24).text
    stops = ("never there", whole[5:8])
    arguments = [item for stop in stops for item in ("--stop", stop)]
    assert said(run(bundle, FIRST, "--raw", "-n", 24, *arguments)) == whole[: whole.index(stops[1])] + "\n"


def test_the_system_message_comes_first(bundle: Path, engine: runtime.Engine) -> None:
    expected = engine.generate([{"role": "system", "content": "Speak of law."}, user(FIRST)], max_new_tokens=9)
    got = json.loads(said(run(bundle, FIRST, "--system", "Speak of law.", "-n", 9, "--json")))
    assert got["num_prompt_tokens"] == expected.num_prompt_tokens
    assert got["token_ids"] == list(expected.token_ids)


def test_an_empty_system_message_is_one(bundle: Path, engine: runtime.Engine) -> None:
    expected = engine.generate([{"role": "system", "content": ""}, user(FIRST)], max_new_tokens=9)
    got = json.loads(said(run(bundle, FIRST, "--system", "", "-n", 9, "--json")))
    assert got["num_prompt_tokens"] == expected.num_prompt_tokens
    assert got["num_prompt_tokens"] > engine.generate(FIRST, max_new_tokens=1).num_prompt_tokens
    chat = json.loads(said(run(bundle, "--chat", "--system", "", "-n", 9, "--json", text=FIRST)))
    assert chat["num_prompt_tokens"] == expected.num_prompt_tokens
    asked = run(bundle, "--chat", "--system", "", text="/system\n/reset\n")
    assert asked.stderr == "system message: (empty)\nforgotten; the system message stays\n"


def test_a_text_means_the_same_as_in_the_library(bundle: Path, engine: runtime.Engine) -> None:
    assert said(run(bundle, FIRST, "-n", 9)) == engine.generate(FIRST, max_new_tokens=9).text + "\n"


def test_control_tokens_are_text_unless_told_otherwise(bundle: Path) -> None:
    arguments = [bundle, "a</s>b", "-n", 2, "--json"]
    literal, parsed = (
        json.loads(said(run(*arguments, *more)))["num_prompt_tokens"] for more in ([], ["--parse-special"])
    )
    # One token, or letters.
    assert literal > parsed


def test_variables_of_the_template(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / LAYOUT.chat_template).write_text("{{ prefix }}{{ messages[0].content }}", encoding="utf-8")
    list_again(copy)
    options = ["-n", 2, "--json", "--chat-template-kwargs"]
    got = json.loads(said(run(copy, "soup", *options, '{"prefix": "aaa"}')))
    assert got["num_prompt_tokens"] == json.loads(said(run(copy, "aaasoup", *options, "{}")))["num_prompt_tokens"]


def test_control_tokens_can_be_shown(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, text in (([], "\n"), (["--show-special"], "<s><s>\n")):
        monkeypatch.setattr("coreinfer.runtime.decoding.sampling.Sampler.sample", lambda *_: 1)
        assert said(run(bundle, FIRST, "-n", 2, *arguments)) == text


def test_the_prompt_may_come_from_standard_input(bundle: Path) -> None:
    assert said(run(bundle, "-n", 9, text=FIRST)) == said(run(bundle, FIRST, "-n", 9))


@pytest.mark.parametrize("given_first", [False, True])
def test_chat_keeps_the_history(given_first: bool, bundle: Path, engine: runtime.Engine) -> None:
    conversation = engine.conversation("Be brief.")
    options = GenerationOptions(max_new_tokens=6)
    expected = [conversation.send(line, options) for line in (FIRST, SECOND, "and salt")]
    rest = f"\n  {SECOND}  \n\nand salt"
    arguments = ["--chat", "--system", "Be brief.", "-n", "6", "--json"]
    result = run(bundle, FIRST, *arguments, text=rest) if given_first else run(bundle, *arguments, text=FIRST + rest)
    answers = [json.loads(line) for line in said(result).splitlines()]
    assert [answer["token_ids"] for answer in answers] == [list(item.token_ids) for item in expected]
    assert [answer["num_prompt_tokens"] for answer in answers] == [item.num_prompt_tokens for item in expected]
    # The sign for people is not for pipes.
    assert ">" not in result.stderr
    assert result.stderr.count("[cluster") == 3


def test_chat_without_input_says_nothing(bundle: Path) -> None:
    result = run(bundle, "--chat", text="")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


# What it refuses


def refusal(result: Result) -> str:
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "text", "named"),
    [
        ([""], None, "prompt: expected text, got nothing"),
        ([" \n"], None, "prompt: expected text, got nothing"),
        ([], "", "prompt: expected text, got nothing"),
        ([], "\n \n", "prompt: expected text, got nothing"),
        ([], b"caf\xe9", "standard input: expected utf-8 text"),
        (["--chat"], b"caf\xe9\n", "standard input: expected utf-8 text"),
        (["caf\udce9"], None, "prompt: expected Unicode text"),
        (["--raw", "caf\udce9"], None, "prompt: expected Unicode text"),
        (["flour " * 300], None, "prompt: expected 1 to 255 tokens, got"),
        (["hello", "-n", "0"], None, "max_new_tokens: expected"),
        (["hello", "--temperature", "-1", "--top-p", "7"], None, "2 problems: (1) temperature"),
        (["hello", "--stop", ""], None, "stop[0]: expected a string that is not empty"),
        (["hello", "--seed", "-1"], None, "seed: expected"),
        (["hello", "--threads", "0"], None, "threads: expected at least 1, got 0"),
        (["hello", "--raw", "--chat"], None, "--raw cannot be used with --chat or --system"),
        (["hello", "--raw", "--system", "x"], None, "--raw cannot be used with --chat or --system"),
        (["hello", "--raw", "--system", ""], None, "--raw cannot be used with --chat or --system"),
        (["hello", "--chat-template-kwargs", "{"], None, "--chat-template-kwargs: expected a JSON object"),
        (["hello", "--chat-template-kwargs", "[1]"], None, "chat_template_kwargs: expected an object"),
        (["hello", "--chat-template-kwargs", '{"tools": 1}'], None, "chat_template_kwargs: tools"),
        (["hello", "--raw", "--chat-template-kwargs", '{"a": 1}'], None, "chat_template_kwargs: they go with messages"),
        (["hello", "--device", "abacus"], None, "device 'abacus': torch cannot use it here"),
    ],
)
def test_wrong_arguments_cost_one_line(arguments: list[str], text: str | None, named: str, bundle: Path) -> None:
    assert named in refusal(run(bundle, *arguments, text=text))


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--chat"], "--chat: "), (["hello", "--system", "x"], "--system: this model has no")]
)
def test_a_conversation_needs_a_template(arguments: list[str], named: str, without_template: Path) -> None:
    assert named in refusal(run(without_template, *arguments, text="hello\n"))


def test_a_wrong_path_costs_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing\nthere"):
        assert "give a folder that coreinfer-compile wrote" in refusal(run(path, "hello"))


def test_a_damaged_bundle_costs_one_line(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    flip_bit(copy / LAYOUT.base)
    flip_bit(copy / LAYOUT.dense)
    message = refusal(run(copy, "hello"))
    assert LAYOUT.base in message
    assert LAYOUT.dense in message


def test_a_mode_that_the_bundle_cannot_have(tiny_bundle: Callable[..., Path]) -> None:
    message = refusal(run(tiny_bundle("llama", dense=False), "hello", "--mode", "stability"))
    assert "mode 'stability' needs the dense FFN" in message


def test_a_mode_that_is_none(bundle: Path) -> None:
    result = run(bundle, "hello", "--mode", "fast")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Invalid value for '--mode': 'fast' is not one of 'auto', 'similarity'," in result.stderr.splitlines()[-1]


# As a process


@contextmanager
def chatting(bundle: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A conversation that has had its first answer and waits for the next line."""
    process = subprocess.Popen(
        [*COMMAND, str(bundle), "--chat", "-n", "5", "--json", "--dtype", "float32", "--device", "cpu"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Shells start background jobs, and what those start, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        send(process, FIRST)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["token_ids"]
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"[cluster")
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            _close(stream)


def _close(stream: IO[bytes] | None) -> None:
    try:
        if stream is not None:
            stream.close()
    except BrokenPipeError:
        pass


def send(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line.encode() + b"\n")
    process.stdin.flush()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_and_130(number: signal.Signals, bundle: Path) -> None:
    with chatting(bundle) as process:
        process.send_signal(number)
        assert process.wait(TIMEOUT_SECONDS) == 130
        assert process.stderr is not None
        assert process.stderr.read().decode() == "error: interrupted; nothing was left behind\n"


def test_a_reader_that_goes_away_gets_no_traceback(bundle: Path) -> None:
    with chatting(bundle) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        send(process, SECOND)
        assert process.wait(TIMEOUT_SECONDS) != 0
        assert process.stderr.read() == b""


def test_head_gets_its_byte_and_no_traceback(bundle: Path) -> None:
    command = '"$@" | head -c 1 | wc -c'
    arguments = [*COMMAND, str(bundle), FIRST, "-n", "200", "--device", "cpu"]
    done = subprocess.run(
        ["bash", "-c", command, "bash", *arguments], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
    )
    assert done.stdout.strip() == "1"
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert "Error" not in done.stderr


def test_an_error_of_the_process_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(tmp_path / "none"), "hello"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'none'} does not exist; give a folder that coreinfer-compile wrote\n"


def test_bounded_device_memory_changes_no_word(bundle: Path) -> None:
    plain = said(run(bundle, FIRST, "--mode", "similarity", "-n", 8))
    for options in (("--gpu-memory-mb", 0.4), ("--gpu-memory-mb", 100, "--cuda-graphs", "on")):
        assert said(run(bundle, FIRST, "--mode", "similarity", "-n", 8, *options)) == plain


def test_too_little_device_memory_is_one_line(bundle: Path) -> None:
    result = run(bundle, FIRST, "--gpu-memory-mb", 0.1)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "gpu_memory_mb: expected at least 0.3327 MB (base" in result.stderr
