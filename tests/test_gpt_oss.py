"""What gpt_oss has and other mixtures have not: attention sinks, biases of experts, and experts in MXFP4.

Its tiny models choose all of their experts here, so that no near tie of a router makes two engines part: what they
compute is compared number by number. tests/test_mixtures.py has those that choose some.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles import Bundle, UnsupportedModelError, open_bundle
from coreinfer.bundles.contract import expert_role
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.models.load import load_model, read_config
from coreinfer.compiler.models.sources import find_source
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .bundle_factory import change_tensors
from .loading import load
from .model_factory import VOCABULARY, save_model
from .quantized_folders import change_settings, change_weights, refusal
from .test_checkpoint import change_json
from .test_mixtures import blocks, in_steps

WEIGHTS = "model.safetensors"
ALL_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 6, "intermediate_size": 104}
IDS = np.random.default_rng(1).integers(3, VOCABULARY, 150).tolist()


@pytest.fixture(scope="module")
def sure_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model that uses all of its experts."""
    return save_model(tmp_path_factory.mktemp("sure"), "gpt_oss", **ALL_EXPERTS)


@pytest.fixture(scope="module")
def sure_bundle(
    sure_model: Path, tiny_inputs: Callable[[str], CompileConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function (quantize) that compiles it with narrow experts, once each."""

    @cache
    def compiled(quantize: Any = "bf16") -> Path:
        output: Path = tmp_path_factory.mktemp("bundles") / quantize
        options: dict[str, Any] = {"experts": "narrow", "clusters": 2, "budgets": None, "keep": 0.6}
        config = replace(tiny_inputs("gpt_oss"), model=str(sure_model), output=output, quantize=quantize, **options)
        compile_model(config)
        return output

    return compiled


def error(got: Any, expected: Any) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def with_base(folder: Path, suffix: str, change: Callable[[Any], Any], to: Path) -> Bundle:
    """A copy of a bundle whose layers' vectors of a name are others."""
    copy = Path(shutil.copytree(folder, to))

    def put(tensors: dict[str, StoredTensor]) -> None:
        names = [name for name in tensors if name.endswith(suffix)]
        assert len(names) == 3
        for name in names:
            tensors[name] = StoredTensor("F32", change(tensors[name].array).astype(np.float32))

    change_tensors(copy, LAYOUT.base, put)
    return open_bundle(copy)


def check_engines(bundle: Bundle, isa: str, most: float) -> None:
    """Blocks, tokens one by one and rows of batches are those of torch in float32."""
    reference, decoder = TorchDecoder(bundle, device="cpu", dtype="float32"), NativeDecoder(bundle, threads=2, isa=isa)
    for choice in (DENSE, FfnChoice(cluster=1)):
        for each in (reference, decoder):
            each.use(choice)
        expected = blocks(reference)
        assert error(blocks(decoder), expected) < most
        steps = in_steps(decoder)
        assert error(steps, expected[130:]) < most
        decoder.truncate(130)
        np.testing.assert_array_equal(decoder.forward_rows([0] * 20, IDS[130:]), steps)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize(("kind", "most"), [("bf16", 0.003), ("int8", 0.06), ("int4", 0.06)])
def test_all_paths_are_those_of_torch(isa: str, kind: str, most: float, sure_bundle: Callable[..., Path]) -> None:
    """Rounding of activations to int8 is what differs where weights are quantized."""
    check_engines(open_bundle(sure_bundle(kind)), isa, most)


def test_torch_is_transformers(sure_model: Path, sure_bundle: Callable[..., Path]) -> None:
    decoder = TorchDecoder(open_bundle(sure_bundle()), device="cpu", dtype="float32")
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(sure_model, dtype=torch.float32)(torch.tensor([IDS])).logits
    np.testing.assert_allclose(blocks(decoder), expected[0].numpy(), atol=2e-4, rtol=1e-4)


def test_torch_in_bfloat16(sure_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(sure_bundle())
    expected, got = (blocks(TorchDecoder(bundle, device="cpu", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert 0 < error(got, expected) < 0.1


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("size", [-40.0, 4.0, 40.0, 200.0])
def test_sinks_take_their_share(size: float, isa: str, sure_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """From none of the softmax to all of it."""
    plain = open_bundle(sure_bundle())
    bundle = with_base(plain.path, ".sinks", lambda values: np.full_like(values, size), tmp_path / "bundle")
    check_engines(bundle, isa, 0.003)
    assert error(blocks(NativeDecoder(bundle, threads=1)), blocks(NativeDecoder(plain, threads=1))) > 0.05


def test_sinks_beside_a_wide_cache(sure_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = with_base(sure_bundle(), "k_proj.bias", lambda values: 3000 * np.sign(values), to=tmp_path / "bundle")
    check_engines(bundle, "auto", 0.003)
    assert NativeDecoder(bundle, threads=1).wide_layers == [0, 1, 2]


@pytest.mark.parametrize("role", ["gate_bias", "up_bias", "down_bias"])
def test_experts_add_their_biases(role: str, sure_bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sure_bundle(), tmp_path / "bundle"))

    def grow(tensors: dict[str, StoredTensor]) -> None:
        for name in [name for name in tensors if name.endswith(role)]:
            tensors[name] = StoredTensor("F32", 1.5 * tensors[name].array)

    for file in (LAYOUT.dense, LAYOUT.cluster(1)):
        change_tensors(folder, file, grow)
    check_engines(open_bundle(folder), "auto", 0.003)
    plain = NativeDecoder(open_bundle(sure_bundle()), threads=1)
    assert error(blocks(NativeDecoder(open_bundle(folder), threads=1)), blocks(plain)) > 0.02


def test_guessed_tokens_change_nothing(tiny_bundle: Callable[..., Path]) -> None:
    made = runtime.load(tiny_bundle("gpt_oss"), engine="native")
    prompt = "The kitchen text number 3 speaks of"
    dense = made.generate(prompt, mode="dense", max_new_tokens=24)
    assert made.generate(prompt, mode="lossless", max_new_tokens=24).text == dense.text
    together = made.generate([prompt, "court judge clause", prompt], mode="dense", max_new_tokens=24)
    assert [together[0].text, together[2].text] == [dense.text, dense.text]


# MXFP4


def meant(code: int, scale: int) -> float:
    """An element E2M1 times its scale E8M0, by the fields of its bits."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return float(sign * magnitude * 2.0 ** (scale - 127))


def pack(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], npt.NDArray[Any]]:
    """Blocks and scales of a tensor (experts, inputs, outputs), and that tensor."""
    num_experts, num_inputs, num_outputs = shape
    groups = (num_experts, num_outputs, num_inputs // 32)
    codes, scales = random.integers(0, 16, (*groups, 32)), random.integers(122, 126, groups)
    values = np.vectorize(meant)(codes, scales[..., None]).reshape(num_experts, num_outputs, num_inputs)
    parts = {"blocks": codes[..., ::2] + 16 * codes[..., 1::2], "scales": scales}
    return {name: torch.from_numpy(part.astype(np.uint8)) for name, part in parts.items()}, values.transpose(0, 2, 1)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder as OpenAI publishes them, and the weights that it means."""
    folder = save_model(tmp_path / "packed", "gpt_oss", intermediate_size=64)
    random, stored, plain = np.random.default_rng(0), {}, {}
    for name, values in load_file(folder / WEIGHTS).items():
        stored[name] = plain[name] = values
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parts, weight = pack(random, tuple(values.shape))
            del stored[name]
            stored |= {f"{name}_{part}": tensor for part, tensor in parts.items()}
            plain[name] = torch.from_numpy(weight).float()
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    change_settings(folder, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    return folder, plain


def test_packed_experts_are_read_exactly(packed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, plain = packed
    loaded = load(folder)
    for layer in range(3):
        tensors, root = loaded.mixture(layer).tensors, f"model.layers.{layer}.mlp.experts."
        for expert in range(6):
            both = plain[f"{root}gate_up_proj"][expert].T
            assert torch.equal(tensors[expert_role(expert, "gate")], both[::2])
            assert torch.equal(tensors[expert_role(expert, "up")], both[1::2])
            assert torch.equal(tensors[expert_role(expert, "down")], plain[f"{root}down_proj"][expert].T)
    reference = AutoModelForCausalLM.from_config(loaded.model.config, dtype=torch.float32).eval()
    reference.load_state_dict(plain, strict=True)
    ids = torch.tensor([IDS[:40]])
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    assert "quantization_config" not in loaded.record.config


def test_all_numbers_of_the_format_are_numbers_of_bf16(packed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = packed
    name = "model.layers.0.mlp.experts.down_proj"
    # 64 inputs: two groups of each of 32 outputs and 6 experts, with scales from 0 on.
    scales = np.arange(6 * 32 * 2).reshape(6, 32, 2) % 252

    def put(weights: dict[str, torch.Tensor]) -> None:
        halves = torch.arange(16, dtype=torch.uint8)
        weights[f"{name}_blocks"] = (halves + 16 * halves.flip(0)).expand(6, 32, 2, 16).contiguous()
        weights[f"{name}_scales"] = torch.from_numpy(scales.astype(np.uint8))

    change_weights(folder, put)
    source = find_source(str(folder))
    loaded = load_model(source, *read_config(source), device="cpu", dtype="bfloat16")
    codes = np.stack([np.arange(16), np.arange(16)[::-1]], axis=-1).reshape(32)
    for expert in range(6):
        expected = np.vectorize(meant)(codes, scales[expert][..., None]).reshape(32, 64)
        got = loaded.mixture(0).tensors[expert_role(expert, "down")]
        assert got.dtype == torch.bfloat16
        np.testing.assert_array_equal(got.double().numpy(), expected)


@pytest.mark.parametrize("scale", [254, 255])
def test_what_is_no_number_is_named(scale: int, packed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = packed
    name = "model.layers.1.mlp.experts.gate_up_proj_scales"
    change_weights(folder, lambda weights: weights[name].index_fill_(0, torch.tensor([2]), scale))
    assert "gate_up_proj" in refusal(folder)


def test_packed_experts_that_do_not_fit_are_named(packed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = packed
    name = "model.layers.1.mlp.experts.down_proj_scales"
    change_weights(folder, lambda weights: weights.update({name: weights[name][:, :, :1].contiguous()}))
    assert name in refusal(folder)
    change_weights(folder, lambda weights: weights.pop(name))
    assert name in refusal(folder)


def test_other_models_in_mxfp4_are_refused(tmp_path: Path) -> None:
    method = {"quant_method": "mxfp4"}
    for family, reason in (
        ("llama", "read of mixtures of experts alone, and llama models are none"),
        ("mixtral", "of mixtures of experts only plain ones are read"),
    ):
        save_model(tmp_path / family, family)
        change_json(tmp_path / family / "config.json", quantization_config=method)
        with pytest.raises(UnsupportedModelError, match=reason):
            read_config(find_source(str(tmp_path / family)))
    change_settings(tmp_path / "llama", quant_method="fp8")
    folder = save_model(tmp_path / "gpt_oss", "gpt_oss")
    change_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match="of mixtures of experts only plain ones or mxfp4 are read"):
        read_config(find_source(str(folder)))


def test_a_packed_model_is_compiled(
    packed: tuple[Path, dict[str, torch.Tensor]], tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    folder, plain = packed
    config = replace(tiny_inputs("gpt_oss"), model=str(folder), output=tmp_path / "bundle", evaluate=False)
    compile_model(config)
    stored = open_bundle(tmp_path / "bundle").dense
    assert stored is not None
    both = plain["model.layers.2.mlp.experts.gate_up_proj"][3].T
    got = stored[f"layers.2.{expert_role(3, 'up')}"].array
    expected = both[1::2].bfloat16().contiguous().view(torch.int16).numpy()
    np.testing.assert_array_equal(got.view(np.int16), expected)
