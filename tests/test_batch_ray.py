"""`coreinfer-run --batch --ray`: the lines of one engine, and it goes on where that was interrupted."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.ray_cluster import on_ray

from .batch_commands import answers, openai, refusal, run, user
from .model_factory import corpus_texts

COMMAND = "from coreinfer.runtime.commands.run import main; main()"
NUM_KEPT = 5

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def start(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_without_ray_the_extra_is_named(bundle: Path, write_lines: Any, tmp_path: Path) -> None:
    batch = write_lines({"prompt": "soup"})
    code = f"import sys\nsys.modules['ray'] = None\n{COMMAND}"
    done = start(code, bundle, "--batch", batch, "-o", tmp_path / "out", "--ray", "local")
    assert (done.returncode, done.stderr) == (2, "error: --ray needs the package ray; pip install 'coreinfer[ray]'\n")


def test_options_that_do_not_go_together(bundle: Path, write_lines: Any, tmp_path: Path) -> None:
    batch, out = write_lines({"prompt": "soup"}), tmp_path / "out"
    assert "--replicas: it is for engines on Ray; give --ray ADDRESS" in refusal(
        run(bundle, batch, out, "--replicas", 2)
    )
    done = start(COMMAND, bundle, "soup", "--ray", "local")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --ray: it is for --batch; give a file of requests, or leave it out\n",
    )


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:10001"])
def test_an_address_without_ray_is_refused_at_once(address: str) -> None:
    with (
        pytest.raises(ConfigError, match=f"^--ray {address}: (cannot be reached|expected HOST:PORT)"),
        on_ray(address, num_cpus=1),
    ):
        pass


@needs_ray
def test_an_interrupted_batch_goes_on_with_two_engines(bundle: Path, write_lines: Any, tmp_path: Path) -> None:
    asked = [{"prompt": text, "id": f"line {number}"} for number, text in enumerate(corpus_texts()[:14])]
    batch = write_lines(*asked, "", {"prompt": 3}, openai("ä", messages=user("soup"), temperature=0), "wrong")
    alone, out = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    assert "2 of 17 lines" in refusal(run(bundle, batch, alone))
    lines = alone.read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:NUM_KEPT])
    out.write_bytes(kept + lines[NUM_KEPT][:20])
    done = start(
        *(COMMAND, bundle, "--batch", batch, "-o", out, "--engine", "native", "--threads", 1, "-n", 9),
        *("--ray", "local", "--replicas", 2),
    )
    assert done.returncode == 2, done.stderr
    assert "15 of 17 lines answered (5 before); now 1" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: 2 of 17 lines of {batch} were not answered")
    assert out.read_bytes().startswith(kept)
    assert comparable(answers(out)) == comparable(answers(alone))
    # The other way round, there is nothing left to do.
    assert "(17 before); now 0 answers" in run(bundle, batch, out).stderr


def comparable(value: Any) -> Any:
    """Leave out what was measured: times, and what the KV cache happened to hold."""
    if isinstance(value, dict):
        measured = ("second", "cached", "created")
        return {
            name: comparable(item) for name, item in value.items() if not any(word in str(name) for word in measured)
        }
    return [comparable(item) for item in value] if isinstance(value, list) else value
