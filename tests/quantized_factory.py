"""Tiny models that are quantized already, written by hand: random codes and scales, and the weights that they mean.

What a code stands for is computed here from descriptions of the formats; nothing of the compiler or of a library that
reads them is used.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from .model_factory import save_model

__all__ = ["CASES", "WEIGHTS", "Case", "Weights", "save_quantized"]

WEIGHTS = "model.safetensors"
GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BLOCK = (24, 20)
Parts = dict[str, torch.Tensor]
Weights = dict[str, torch.Tensor]
Numbers = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to write a model.

    Attributes:
        settings: quantization_config of config.json.
        pack: random generator, outputs and inputs -> the parts of a weight, and the weight (outputs, inputs).
        optional: parts that may be missing.
        rounding: largest relative difference; libraries compute some weights in bf16.
    """

    settings: Mapping[str, Any]
    pack: Callable[[np.random.Generator, int, int], tuple[Parts, Numbers]]
    optional: tuple[str, ...] = ()
    rounding: float = 2e-6


def save_quantized(folder: Path, case: Case, family: str = "llama") -> dict[str, torch.Tensor]:
    """Write a model whose layers' matrices are packed, and return all its weights as they are meant."""
    save_model(folder, family)
    stored, meant = {}, {}
    random = np.random.default_rng(0)
    for name, values in load_file(folder / WEIGHTS).items():
        stored[name] = meant[name] = values
        if name.endswith("_proj.weight"):
            parts, weight = case.pack(random, *values.shape)
            del stored[name]
            stored |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
            meant[name] = torch.from_numpy(weight).float()
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": case.settings}), encoding="utf-8")
    return meant


def _words(codes: Numbers, bits: int) -> torch.Tensor:
    """Codes along the last axis in words of 32 bits, the first in the lowest bits."""
    count = codes.shape[-1] * bits // 32
    streams = codes.reshape(-1, codes.shape[-1])
    numbers = [sum(int(code) << bits * place for place, code in enumerate(stream)) for stream in streams]
    data = b"".join(number.to_bytes(4 * count, "little") for number in numbers)
    words = np.frombuffer(data, dtype="<i4").reshape(*codes.shape[:-1], count)
    return torch.from_numpy(words.astype(np.int32))


def _scales(random: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.from_numpy(random.uniform(0.01, 0.1, shape)).to(dtype)


def _wide(values: torch.Tensor) -> Numbers:
    return values.double().numpy()


def _gptq(bits: int, *, ordered: bool = False, second: bool = False) -> Callable[..., tuple[Parts, Numbers]]:
    def pack(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
        codes = random.integers(0, 1 << bits, (outputs, inputs))
        zeros = random.integers(0 if second else 1, 1 << bits, (inputs // GROUP, outputs))
        scales = _scales(random, inputs // GROUP, outputs)
        groups = np.arange(inputs) // GROUP
        groups = random.permutation(groups) if ordered else groups
        parts = {
            "qweight": _words(codes, bits).T.contiguous(),
            "qzeros": _words(zeros - (not second), bits),
            "scales": scales,
            "g_idx": torch.from_numpy(groups).int(),
        }
        return parts, _wide(scales)[groups].T * (codes - zeros[groups].T)

    return pack


def _awq(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
    codes, zeros = random.integers(0, 16, (inputs, outputs)), random.integers(0, 16, (inputs // GROUP, outputs))
    scales = _scales(random, inputs // GROUP, outputs)
    shuffled = (values.reshape(-1, outputs // 8, 8)[..., _AWQ_ORDER].reshape(-1, outputs) for values in (codes, zeros))
    qweight, qzeros = (_words(values, 4) for values in shuffled)
    weight = (codes - zeros.repeat(GROUP, 0)) * _wide(scales).repeat(GROUP, 0)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}, weight.T


def _float8(random: np.random.Generator, outputs: int, inputs: int) -> torch.Tensor:
    return torch.from_numpy(random.uniform(-400, 400, (outputs, inputs))).to(torch.float8_e4m3fn)


def _fp8_blocks(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
    codes = _float8(random, outputs, inputs)
    scales = _scales(random, -(-outputs // _BLOCK[0]), -(-inputs // _BLOCK[1]), dtype=torch.float32) / 400
    spread = _wide(scales).repeat(_BLOCK[0], 0)[:outputs].repeat(_BLOCK[1], 1)[:, :inputs]
    return {"weight": codes, "weight_scale_inv": scales}, _wide(codes) * spread


def _fp8_whole(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
    codes, scale = _float8(random, outputs, inputs), torch.tensor(0.0003, dtype=torch.bfloat16)
    parts = {"weight": codes, "weight_scale_inv": scale, "activation_scale": torch.tensor(0.5)}
    return parts, _wide(codes) * float(scale)


def _blocks_of_4(nested: bool) -> Callable[..., tuple[Parts, Numbers]]:
    def pack(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
        count = outputs * inputs
        codes, table = random.integers(0, 16, count), torch.linspace(-1, 1, 16) ** 3
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [outputs, inputs]}
        parts = {"weight": torch.from_numpy(codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None]}
        scales = _scales(random, -(-count // 64), dtype=torch.float32)
        if nested:
            inner, outer = torch.linspace(-1, 1, 256) ** 3, _scales(random, 1, dtype=torch.float32)
            levels = torch.from_numpy(random.integers(0, 256, -(-count // 64))).to(torch.uint8)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            parts |= {"weight.absmax": levels, "weight.nested_absmax": outer, "weight.nested_quant_map": inner}
            scales = torch.from_numpy(_wide(inner)[levels.numpy()] * float(outer) + 0.25)
        else:
            parts["weight.absmax"] = scales
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        parts |= {"weight.quant_map": table, "weight.quant_state.bitsandbytes__nf4": text}
        weight = _wide(table)[codes] * _wide(scales).repeat(64)[:count]
        return parts, weight.reshape(outputs, inputs)

    return pack


def _rows_of_8(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
    codes = random.integers(-127, 128, (outputs, inputs))
    largest = _scales(random, outputs, dtype=torch.float32)
    parts = {"weight": torch.from_numpy(codes).to(torch.int8), "SCB": largest, "weight_format": torch.tensor(0).byte()}
    return parts, codes * _wide(largest)[:, None] / 127


def _ct_packed(bits: int, *, zeros: bool) -> Callable[..., tuple[Parts, Numbers]]:
    def pack(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
        middle = 1 << bits - 1
        codes = random.integers(-middle, middle, (outputs, inputs))
        scales = _scales(random, outputs, inputs // GROUP, dtype=torch.bfloat16)
        shape = torch.tensor([outputs, inputs])
        parts = {"weight_packed": _words(codes + middle, bits), "weight_scale": scales, "weight_shape": shape}
        weight = codes * _wide(scales).repeat(GROUP, 1)
        if zeros:
            points = random.integers(-middle, middle, (outputs, inputs // GROUP))
            parts["weight_zero_point"] = _words((points + middle).T, bits).T.contiguous()
            weight = (codes - points.repeat(GROUP, 1)) * _wide(scales).repeat(GROUP, 1)
        return parts, weight

    return pack


def _ct_rows(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
    codes = random.integers(-128, 128, (outputs, inputs))
    scales = _scales(random, outputs, 1, dtype=torch.bfloat16)
    return {"weight": torch.from_numpy(codes).to(torch.int8), "weight_scale": scales}, codes * _wide(scales)


def _ct_whole(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
    codes, scale = _float8(random, outputs, inputs), torch.tensor([0.0003])
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor([0.5])}, _wide(codes) * float(scale)


def _ct_blocks(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
    parts, weight = _fp8_blocks(random, outputs, inputs)
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}, weight


def _float4(random: np.random.Generator, outputs: int, inputs: int) -> tuple[torch.Tensor, Numbers]:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = random.integers(0, 16, (outputs, inputs))
    return torch.from_numpy(codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8), values[codes]


def _ct_mxfp4(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
    packed, values = _float4(random, outputs, inputs)
    levels = random.integers(120, 125, (outputs, inputs // GROUP))
    parts = {"weight_packed": packed, "weight_scale": torch.from_numpy(levels).to(torch.uint8)}
    return parts, values * (2.0 ** (levels - 127)).repeat(GROUP, 1)


def _ct_mxfp8(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
    codes, levels = _float8(random, outputs, inputs), random.integers(112, 117, (outputs, inputs // GROUP))
    parts = {"weight": codes, "weight_scale": torch.from_numpy(levels).to(torch.uint8)}
    return parts, _wide(codes) * (2.0 ** (levels - 127)).repeat(GROUP, 1)


def _ct_nvfp4(random: np.random.Generator, outputs: int, inputs: int) -> tuple[Parts, Numbers]:
    packed, values = _float4(random, outputs, inputs)
    scales = torch.from_numpy(random.uniform(20, 440, (outputs, inputs // 16))).to(torch.float8_e4m3fn)
    parts = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": torch.tensor([3000.0])}
    return parts, values * _wide(scales).repeat(16, 1) / 3000


def _compressed(kind: str, activations: Mapping[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "version": "0.12.0",
    }


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_GROUPS: dict[str, Any] = {"type": "int", "strategy": "group", "group_size": GROUP}
_ONE_FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor"}

CASES: dict[str, Case] = {
    "gptq": Case(settings=_GPTQ, pack=_gptq(4), optional=("g_idx",)),
    "gptq-ordered": Case(
        settings={**_GPTQ, "desc_act": True, "checkpoint_format": "gptq"}, pack=_gptq(4, ordered=True)
    ),
    "gptq-v2": Case(
        settings={**_GPTQ, "checkpoint_format": "gptq_v2"}, pack=_gptq(4, second=True), optional=("g_idx",)
    ),
    "gptq-8": Case(settings={**_GPTQ, "bits": 8}, pack=_gptq(8), optional=("g_idx",)),
    "gptq-2": Case(settings={**_GPTQ, "bits": 2}, pack=_gptq(2), optional=("g_idx",)),
    "awq": Case(
        settings={"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        pack=_awq,
    ),
    "fp8-blocks": Case(
        settings={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(_BLOCK)}, pack=_fp8_blocks
    ),
    "fp8-whole": Case(
        settings={"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        pack=_fp8_whole,
        optional=("activation_scale",),
    ),
    "nf4": Case(settings=_NF4, pack=_blocks_of_4(False)),
    "nf4-nested": Case(settings={**_NF4, "bnb_4bit_use_double_quant": True}, pack=_blocks_of_4(True)),
    "int8": Case(
        settings={"quant_method": "bitsandbytes", "load_in_8bit": True}, pack=_rows_of_8, optional=("weight_format",)
    ),
    "ct-packed": Case(
        settings=_compressed("pack-quantized", num_bits=4, symmetric=True, **_GROUPS), pack=_ct_packed(4, zeros=False)
    ),
    "ct-zeros": Case(
        settings=_compressed("pack-quantized", num_bits=8, symmetric=False, **_GROUPS), pack=_ct_packed(8, zeros=True)
    ),
    "ct-int8": Case(
        settings=_compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        pack=_ct_rows,
    ),
    "ct-fp8": Case(
        settings=_compressed("float-quantized", {**_ONE_FLOAT8, "dynamic": False}, symmetric=True, **_ONE_FLOAT8),
        pack=_ct_whole,
        optional=("input_scale",),
    ),
    "ct-mxfp4": Case(
        settings=_compressed(
            "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=GROUP, symmetric=True
        ),
        pack=_ct_mxfp4,
    ),
    "ct-blocks": Case(
        settings=_compressed(
            "float-quantized", num_bits=8, type="float", strategy="block", block_structure=list(_BLOCK), symmetric=True
        ),
        pack=_ct_blocks,
    ),
    "ct-mxfp8": Case(
        settings=_compressed(
            "mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=GROUP, symmetric=True
        ),
        pack=_ct_mxfp8,
    ),
    "ct-nvfp4": Case(
        settings=_compressed(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
        ),
        pack=_ct_nvfp4,
        rounding=2**-7,
    ),
}
"""Name -> a way to write a model, of each method that is read and of its kinds."""
