"""coreinfer-export, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from coreinfer.bundles import ConfigError
from coreinfer.compiler.export.cli import main

from .test_export import exported


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cluster": 4}, "--cluster: expected 0 to 3, got 4"),
        ({"cluster": None, "dense": False}, "got both or neither"),
        ({"cluster": 1, "dense": True}, "got both or neither"),
    ],
)
def test_which_model_must_be_said(
    options: dict[str, Any], reason: str, tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        exported(tiny_bundle("llama"), tmp_path, "gguf", **options)


def test_an_option_of_the_other_form_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = CliRunner().invoke(main, [str(tmp_path), "--to", "gguf", "--dense", "-o", str(output), "--dtype", "float32"])
    assert (done.exit_code, output.exists()) == (2, False)
    assert done.stderr == (
        "error: --dtype float32: --to gguf keeps the bundle's own rounding; leave it out, or use --to hf\n"
    )


def test_the_name_of_a_file_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "model.GGUF"
    done = CliRunner().invoke(main, [str(tmp_path), "--to", "gguf", "--dense", "-o", str(output)])
    assert (done.exit_code, done.stdout, output.exists()) == (2, "", False)
    assert done.stderr.startswith(f"error: -o {output}: expected a folder, which gets model.gguf and README.md, got")
    assert done.stderr.endswith(f"give -o {tmp_path / 'model'}\n")


def test_the_command(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    arguments = [str(tiny_bundle("llama")), "--to", "gguf", "--cluster", "0", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["num_bytes"] == (tmp_path / "out/model.gguf").stat().st_size
    again = CliRunner().invoke(main, arguments)
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr == f"error: -o {tmp_path / 'out'}: exists; give a folder that does not exist yet\n"
