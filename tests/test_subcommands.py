"""`coreinfer`: all commands under one name, light to start, and completed by the shell."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from coreinfer.bundles.shared.subcommands import SUBCOMMANDS, main

SCRIPTS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the console script does, and the modules that it had imported at its end."""
    code = (
        "import atexit, sys; from coreinfer.bundles.shared.starting import coreinfer; "
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); sys.argv[0] = 'coreinfer'; coreinfer()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_each_command_is_there_by_both_names() -> None:
    for name, (module, text) in SUBCOMMANDS.items():
        assert f"coreinfer-{name}" in SCRIPTS
        command = importlib.import_module(module).main
        assert isinstance(command, click.Command)
        assert text.endswith(".")
    assert {name.removeprefix("coreinfer-") for name in SCRIPTS} - {"coreinfer", "lm-eval"} == {*SUBCOMMANDS}


def test_help_imports_no_command() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert all(f"  {name} " in shown.stdout for name in SUBCOMMANDS)
    assert not {"numpy", "torch", "coreinfer.runtime"} & set(shown.stderr.split())


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_a_commands_help_imports_no_torch(name: str) -> None:
    shown = run(name, "--help")
    assert shown.stdout.startswith(f"Usage: coreinfer {name} [OPTIONS]"), shown.stderr
    assert not {"torch", "transformers", "huggingface_hub.hf_api", "faiss"} & set(shown.stderr.split())


def test_a_command_is_what_it_is_by_its_own_name(bundle: Path) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(bundle)])
    alone = CliRunner().invoke(importlib.import_module("coreinfer.bundles.inspect").main, [str(bundle)])
    assert (shown.exit_code, shown.stdout) == (0, alone.stdout)
    assert shown.stdout


def test_errors_are_one_line_here_too(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "none")])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'none'} does not exist")


def test_an_unknown_command() -> None:
    done = CliRunner().invoke(main, ["compose"])
    assert done.exit_code == 2
    assert "No such command 'compose'" in done.stderr


def completed(line: str) -> tuple[list[str], set[str]]:
    words = line.split(" ")
    done = run(_COREINFER_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    return [found.partition(",")[2] for found in done.stdout.split()], set(done.stderr.split())


def test_the_shell_completes_commands_and_options() -> None:
    names, modules = completed("coreinfer e")
    assert names == ["eval", "export"]
    assert "numpy" not in modules
    assert completed("coreinfer export --cl")[0] == ["--cluster"]
    assert completed("coreinfer export --to g")[0] == ["gguf"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_script(shell: str) -> None:
    # click asks bash for its version.
    shown = run(_COREINFER_COMPLETE=f"{shell}_source")
    assert "_COREINFER_COMPLETE" in shown.stdout
