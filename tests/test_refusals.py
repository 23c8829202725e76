"""What can be refused without torch is refused before it is imported; no help waits for what it does not need."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from coreinfer.compiler import CompileConfig

from .gguf_factory import Contents, write

HEAVY = ("torch", "transformers", "sentence_transformers", "model2vec", "sklearn", "faiss", "datasets")
COMMANDS = {
    "compile": "coreinfer.compiler.cli",
    "eval": "coreinfer.evaluation.cli",
    "inspect": "coreinfer.bundles.inspect",
    "run": "coreinfer.runtime.commands.run",
    "bench": "coreinfer.runtime.commands.bench",
    "serve": "coreinfer.server.cli",
    "lm-eval": "coreinfer.evaluation.harness",
}
PROGRAM = """
import contextlib, importlib, io, json, resource, sys
started = resource.getrusage(resource.RUSAGE_SELF)
module, *arguments = sys.argv[1:]
sys.argv[1:] = arguments
stdout, stderr = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
    try:
        importlib.import_module(module).main()
        code = 0
    except SystemExit as end:
        code = end.code
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue(), "modules": sorted(sys.modules),
    "seconds": used.ru_utime + used.ru_stime,
}))
"""


def outcome(command: str, *arguments: object) -> dict[str, Any]:
    """Run a command in an interpreter of its own: exit code, output, what it imported, and its seconds of CPU time."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, COMMANDS[command], *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_light(found: dict[str, Any], seconds: float, *, allowed: str | None = None) -> None:
    assert not set(HEAVY) - {allowed} & set(found["modules"])
    # CPU time, which does not grow where others keep the cores busy.
    assert found["seconds"] < seconds


def _folder(path: Path, config: str | None) -> Path:
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(config)
    return path


def _no_config(folder: Path) -> list[object]:
    return ["--model", _folder(folder / "model", None)]


def _unreadable_config(folder: Path) -> list[object]:
    return ["--model", _folder(folder / "model", "{")]


def _config_of_nothing(folder: Path) -> list[object]:
    return ["--model", _folder(folder / "model", "[]")]


def _bloom(folder: Path) -> list[object]:
    transformers.BloomConfig(n_layer=1, n_head=1, hidden_size=8).save_pretrained(folder / "bloom")
    return ["--model", folder / "bloom"]


def _quantized(folder: Path) -> list[object]:
    quantizer = {"quant_method": "quip", "bits": 4}
    stated = json.dumps({"model_type": "llama", "quantization_config": quantizer})
    return ["--model", _folder(folder / "model", stated)]


def _no_weights(folder: Path) -> list[object]:
    return ["--model", _folder(folder / "model", '{"model_type": "llama"}')]


def _junk_gguf(folder: Path) -> list[object]:
    (folder / "junk.gguf").write_bytes(b"GGML" * 8)
    return ["--model", folder / "junk.gguf"]


def _strange_gguf(folder: Path) -> list[object]:
    write(folder / "strange.gguf", Contents(architecture="strange", metadata={}, tensors={}))
    return ["--model", folder / "strange.gguf"]


def _encoder_without_model(folder: Path) -> list[object]:
    return ["--encoder", _folder(folder / "encoder", None)]


def _encoder_in_gguf(folder: Path) -> list[object]:
    (folder / "encoder.gguf").write_bytes(b"GGUF")
    return ["--encoder", folder / "encoder.gguf"]


def _target_exists(folder: Path) -> list[object]:
    (folder / "bundle" / "mine").mkdir(parents=True)
    return []


def _no_field(folder: Path) -> list[object]:
    (folder / "text.jsonl").write_text('{"body": "a text"}\n')
    return ["--calibration", folder / "text.jsonl"]


def _no_text(folder: Path) -> list[object]:
    (folder / "text.txt").write_text("\n\n")
    return ["--calibration", folder / "text.txt"]


def _options(*options: object) -> Callable[[Path], list[object]]:
    return lambda folder: list(options)


REFUSALS: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "no such model": (_options("--model", "/nonexistent"), "--model /nonexistent: no such file or folder"),
    "no such package": (_options("--model", "package:not_there/x"), "no Python package 'not_there' is installed"),
    "nothing in the package": (_options("--model", "package:click/x.gguf"), "the package 'click' has no 'x.gguf'"),
    "a folder without a model": (_no_config, "--model model: no model can be read there (it has no config.json)"),
    "a config that is none": (_unreadable_config, "--model model: no model can be read there (config.json: "),
    "a config of nothing": (_config_of_nothing, "(config.json has no model_type)"),
    "an unknown family": (_bloom, "model_type 'bloom' is not supported; supported families: opt (opt)"),
    "quantized weights": (_quantized, "quantized already (quip, 4 bits; quantization_config in config.json)"),
    "no weights": (_no_weights, "its weights cannot be loaded (there is no model.safetensors in the folder)"),
    "no GGUF": (_junk_gguf, "junk.gguf: expected a GGUF file, which starts with the bytes GGUF"),
    "an unknown architecture": (_strange_gguf, "architecture 'strange' is not supported in GGUF; supported: llama"),
    "no such encoder": (_options("--encoder", "/nonexistent"), "--encoder /nonexistent: no such file or folder"),
    "a folder without an encoder": (_encoder_without_model, "--encoder encoder: no sentence encoder can be loaded"),
    "an encoder in GGUF": (_encoder_in_gguf, "--encoder encoder.gguf: a GGUF file"),
    "no such text": (_options("--calibration", "/nonexistent"), "--calibration /nonexistent: no such file"),
    "a field that is not there": (_no_field, "line 1: expected text in field 'text', got fields body"),
    "a file without text": (_no_text, "text.txt: holds no text"),
    "a target that exists": (_target_exists, "bundle exists; give another -o or add --force"),
    "a ratio of nothing": (_options("--keep", 0), "--keep: expected a number in (0, 1], got 0.0"),
    "a floor above all": (
        _options("--keep", 0.7, "--min-layer-keep", 0.9),
        "--min-layer-keep 0.9: expected at most --keep 0.7",
    ),
    "texts too long": (_options("--document-tokens", 257), "--document-tokens 257: the model reads 256 at most"),
    "both of two": (_options("--budget-mb", 1, "--max-kl", 1), "expected bytes or a quality to aim at, got both"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_compile_that_cannot_be_is_refused_at_once(
    name: str, tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    prepare, message = REFUSALS[name]
    given = ["--model", tiny_inputs("llama").model, "-o", tmp_path / "bundle", *prepare(tmp_path)]
    found = outcome("compile", *given)
    assert (found["code"], found["stdout"]) == (2, "")
    assert found["stderr"].startswith("error: ")
    assert found["stderr"].count("\n") == 1
    assert message in found["stderr"]
    check_light(found, 2.0)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_waits_for_nothing_that_it_does_without(command: str) -> None:
    found = outcome(command, "--help")
    assert found["code"] in (0, None)
    assert "usage" in found["stdout"].lower()
    # Measured: 0.2 to 0.6.
    check_light(found, 1.5)


def _data(folder: Path) -> Path:
    (folder / "lm_texts.jsonl").write_text('{"text": "A text that is long enough to be scored."}\n')
    return folder / "lm_texts.jsonl"


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("run", ["hello"], "/nonexistent does not exist; give a folder that coreinfer-compile wrote"),
        ("run", ["--chat"], "/nonexistent does not exist"),
        ("bench", [], "/nonexistent does not exist"),
        ("inspect", [], "/nonexistent does not exist"),
        ("serve", ["--port", 0], "/nonexistent does not exist"),
        ("eval", ["--data", _data], "/nonexistent does not exist"),
        ("eval", ["--data", "/not/there"], "--data /not/there: expected a .jsonl file"),
        ("eval", ["--data", _data, "--against", "/not/there"], "--against /not/there: no such file or folder"),
        ("eval", ["--data", _data, "--against", "package:click"], "no model can be read there (it has no config.json)"),
    ],
)
def test_other_commands_refuse_at_once(command: str, options: list[Any], message: str, tmp_path: Path) -> None:
    found = outcome(command, "/nonexistent", *(item(tmp_path) if callable(item) else item for item in options))
    assert (found["code"], found["stdout"]) == (2, "")
    assert message in found["stderr"]
    # Routing needs FAISS, which comes while the bundle is looked at.
    check_light(found, 2.5, allowed="faiss")
