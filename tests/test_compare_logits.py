"""tools/compare_logits.py and tools/logits.c: the C library beside the engine, on this machine."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

from .c_library import COMPILERS, ROOT, build_library, has_compilers
from .model_factory import corpus_texts
from .programs import load_program


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program("tools/compare_logits.py")


@pytest.fixture(scope="module")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tools/logits.c, linked with the C library."""
    library, made = build_library(), tmp_path_factory.mktemp("logits") / "logits"
    paths = [f"-I{library / 'include'}", f"-L{library / 'lib'}", f"-Wl,-rpath,{library / 'lib'}"]
    command = [*COMPILERS[1].split(), "-Wall", "-Wextra", "-Werror", *paths, str(ROOT / "tools" / "logits.c")]
    subprocess.run([*command, "-lcoreinfer", "-o", str(made)], check=True)
    return made


def test_where_bits_part_is_said(program: ModuleType) -> None:
    logits = np.zeros((3, 4), dtype=np.float32)
    calls = program.Calls(name="a", cluster=1, prompt_ids=(5, 6), decoded_ids=(7, 8), logits=logits)
    assert calls.line == "1 2 5 6 2 7 8"
    assert program.compare(calls, logits.copy()) is None
    other = logits.copy()
    other[1:, 2] = 0.25
    assert program.compare(calls, other) == "2 of 3 calls differ, call 1 first, by 0.25 at most"
    # Zeros of unlike signs are equal numbers.
    assert program.compare(calls, -logits) == "3 of 3 calls differ, call 0 first, by 0 at most"


@pytest.mark.skipif(not has_compilers(), reason="no C or C++ compiler here")
@pytest.mark.parametrize("dense", [True, False])
def test_the_c_library_beside_the_engine(
    dense: bool, program: ModuleType, c_program: Path, tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{number}", "prompt": text} for number, text in enumerate(corpus_texts()[:3])]
    prompts.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    bundle = str(tiny_bundle("llama", dense=dense, quantize="int4"))
    arguments = [bundle, "--prompts", str(prompts), "--tokens", "5", str(c_program)]
    done = CliRunner().invoke(program.main, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].startswith("3 of 3 prompts have the same bits, ")
    wrong = CliRunner().invoke(program.main, [*arguments[:-1], "false"])
    assert (wrong.exit_code, wrong.stderr) == (1, "Error: false: expected exit status 0, got 1\n")
