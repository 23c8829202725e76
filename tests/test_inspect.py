import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from coreinfer.bundles.inspect import describe, main
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.versions import READ_VERSIONS, SCHEMA_VERSION

from .bundle_factory import change_tensors, edit_manifest, flip_bit, make_manifest


def inspect(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_text_shows_all_that_matters(bundle_dir: Path) -> None:
    result = inspect(bundle_dir)
    assert (result.exit_code, result.stderr) == (0, "")
    for expected in [
        "tiny-llama",
        "llama, 2 layers, hidden 64, ffn 128",
        "embedding bf16, attention bf16, norm f32, head bf16, ffn bf16",
        "output-aware, keep 0.57, budgets sensitivity, cluster weight 0.3, repaired, with the dense FFN",
        "96 50 of 128",
        "static, distance p99 0.625, routes 94% like the sentence encoder",
        "topic 0: 40 sentences, 900 tokens, keep 0.57, 0.1 MB",
        "First example of topic 1.",
        "Ein zweites Beispiel für Thema 0.",
        "coreinfer 0.1.0, model sha256 abababababab, encoder tiny-sentence-encoder",
        "numpy 2.0.0, torch 2.6.0",
    ]:
        assert expected in result.stdout


def line_with(text: str, start: str) -> list[str]:
    """The fields of the one line that starts so."""
    (line,) = (line for line in text.splitlines() if line.strip().startswith(start))
    return line.split()


def test_the_text_shows_quality_beside_the_controls(bundle_dir: Path) -> None:
    text = inspect(bundle_dir).stdout
    assert "on 12 held-out texts, 480 tokens" in text
    rows = [line.split() for line in text.splitlines()]
    for name, *figures in [
        ("dense", "20.50", "0.000", "1.000"),
        ("clusters", "21.00", "0.500", "0.875"),
        ("static mask", "21.25", "0.750", "0.812"),
        ("random clusters", "21.38", "0.875", "0.781"),
        ("topic 0", "20.75", "0.250", "0.938"),
        ("topic 1", "20.75", "0.250", "0.938"),
    ]:
        assert [*name.split(), *figures] in rows


def test_the_text_shows_the_size_of_every_file(bundle_dir: Path) -> None:
    text = inspect(bundle_dir).stdout
    files = read_manifest(bundle_dir).files
    sizes = {line.split()[-1]: line.split()[0] for line in text.splitlines() if line.split()[1:2] == ["MB"]}
    assert sizes == {name: f"{record.bytes / 1e6:.2f}" for name, record in files.items()}
    total = sum((bundle_dir / name).stat().st_size for name in files)
    assert line_with(text, "files ") == ["files", f"{len(files)},", f"{total / 1e6:.1f}", "MB"]


def test_what_was_not_measured_is_said() -> None:
    manifest = make_manifest(dense=False)
    router = replace(manifest.router, agreement=None)
    plan = replace(manifest.plan, reconstruct=False)
    text = "\n".join(describe(replace(manifest, quality=None, router=router, plan=plan)))
    assert line_with(text, "quality") == ["quality", "not", "measured"]
    assert "routes" not in text
    assert "not repaired, without the dense FFN" in text


def test_json_is_the_whole_manifest(bundle_dir: Path) -> None:
    result = inspect(bundle_dir, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == json.loads(json.dumps(asdict(read_manifest(bundle_dir))))


def test_verify_of_a_sound_bundle(bundle_dir: Path) -> None:
    result = inspect(bundle_dir, "--verify")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"verified   {len(read_manifest(bundle_dir).files)} files, no problems" in result.stdout
    as_json = inspect(bundle_dir, "--verify", "--json")
    assert as_json.exit_code == 0
    assert json.loads(as_json.stdout)["problems"] == []


@pytest.fixture
def damaged(bundle_dir: Path) -> Path:
    change_tensors(bundle_dir, "clusters/001.safetensors", lambda tensors: tensors.pop("layers.0.up"))
    flip_bit(bundle_dir / "base.safetensors")
    (bundle_dir / "tokenizer/tokenizer.json").unlink()
    (bundle_dir / "router/extra.bin").write_bytes(b"x")
    (bundle_dir / ".hidden").write_bytes(b"x")
    return bundle_dir


PROBLEMS = [
    "base.safetensors: expected sha256",
    "tokenizer/tokenizer.json: missing",
    "clusters/001.safetensors: tensor 'layers.0.up' is missing",
    ".hidden: not listed in the manifest",
    "router/extra.bin: not listed in the manifest",
]


def test_verify_lists_every_problem(damaged: Path) -> None:
    result = inspect(damaged, "--verify")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == len(PROBLEMS)
    for line, problem in zip(lines, PROBLEMS, strict=True):
        assert line.startswith(f"problem: {problem}")
    assert "no problems" not in result.stdout


def test_verify_as_json_lists_every_problem_on_stdout(damaged: Path) -> None:
    result = inspect(damaged, "--verify", "--json")
    assert (result.exit_code, result.stderr) == (2, "")
    problems = json.loads(result.stdout)["problems"]
    assert len(problems) == len(PROBLEMS)
    assert all(got.startswith(problem) for got, problem in zip(problems, PROBLEMS, strict=True))


def test_a_damaged_bundle_is_described_unless_verified(damaged: Path) -> None:
    result = inspect(damaged)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "tiny-llama" in result.stdout


@pytest.mark.parametrize("arguments", [[], ["--verify"], ["--json"], ["--verify", "--json"]], ids=" ".join)
@pytest.mark.parametrize("kind", ["absent", "file", "empty folder", "no manifest fields", "another version"])
def test_what_is_no_bundle_is_one_line_and_exit_2(bundle_dir: Path, kind: str, arguments: list[str]) -> None:
    reasons = {
        "absent": "does not exist",
        "file": "is a file",
        "empty folder": "is not a bundle",
        "no manifest fields": "manifest.model: missing",
        "another version": "upgrade coreinfer",
    }
    result = inspect(spoil(bundle_dir, kind), *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert reasons[kind] in result.stderr
    assert result.stderr.count("\n") == 1


def spoil(bundle_dir: Path, kind: str) -> Path:
    if kind == "no manifest fields":
        (bundle_dir / "manifest.json").write_text(f'{{"schema_version": {SCHEMA_VERSION}}}')
    elif kind == "another version":
        with edit_manifest(bundle_dir) as data:
            data["schema_version"] = max(READ_VERSIONS) + 1
    else:
        shutil.rmtree(bundle_dir)
    if kind == "file":
        bundle_dir.write_text("x")
    elif kind == "empty folder":
        bundle_dir.mkdir()
    return bundle_dir


COMMAND = [sys.executable, "-c", "from coreinfer.bundles.inspect import main; main()"]


def test_a_wrong_path_shows_no_traceback(tmp_path: Path) -> None:
    command = [*COMMAND, str(tmp_path / "absent"), "--verify"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    expected = f"error: {tmp_path / 'absent'} does not exist; give a folder that coreinfer-compile wrote\n"
    assert result.stderr == expected


def test_a_reader_that_goes_away_is_no_traceback(bundle_dir: Path) -> None:
    """As in `coreinfer-inspect DIR | true`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stdout:
        result = subprocess.run(
            [*COMMAND, str(bundle_dir)], stdout=stdout, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert (result.returncode, result.stderr) == (2, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupt_is_one_line_and_exit_130(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr("coreinfer.bundles.inspect.find_problems", lambda *_: signal.raise_signal(number))
    result = inspect(bundle_dir, "--verify")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "error: interrupted; nothing was left behind\n"


def test_a_missing_argument_is_usage() -> None:
    result = inspect()
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_a_path_with_a_line_break_is_still_one_line(tmp_path: Path) -> None:
    result = inspect(tmp_path / "two\nlines")
    assert result.exit_code == 2
    assert (
        result.stderr == f"error: {tmp_path / 'two lines'} does not exist; give a folder that coreinfer-compile wrote\n"
    )
