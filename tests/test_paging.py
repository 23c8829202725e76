"""Compiling with weights that stay in their file: the same bundle, in less memory."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coreinfer.bundles import ConfigError
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.models.load import LoadedModel, load_model, read_config
from coreinfer.compiler.models.memory import check_memory
from coreinfer.compiler.models.sources import find_source
from coreinfer.compiler.text.corpus import Corpus, Document

from .model_factory import SHAPES, UNLIKE, build_model, save_model

IDS = torch.tensor([[5, 9, 2, 77, 31, 8]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function (family) that saves a tiny model in bfloat16 and gives its folder."""
    folder = tmp_path_factory.mktemp("mapped")

    def save(family: str) -> Path:
        if not (folder / family).exists():
            save_model(folder / family, family)
            build_model(family).bfloat16().save_pretrained(folder / family)
        return folder / family

    return save


def load(folder: Path, *, mapped: bool, dtype: Any = "float32") -> LoadedModel:
    source = find_source(str(folder))
    family, config = read_config(source)
    return load_model(source, family, config, device="cpu", dtype=dtype, mapped=mapped)


def is_in_file(tensor: torch.Tensor, file: str) -> bool:
    with open("/proc/self/maps", encoding="ascii") as maps:
        for line in maps:
            first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return file in line
    return False


@pytest.mark.parametrize("name", [*SHAPES, "gpt2"])
def test_mapped_weights_compute_what_loaded_ones_do(name: str, saved: Callable[[str], Path]) -> None:
    loaded, mapped = (load(saved(name), mapped=each) for each in (False, True))
    assert (loaded.dtype, mapped.dtype) == (torch.float32, torch.float32)
    matrices = [parameter for parameter in mapped.model.parameters() if parameter.ndim == 2]
    with torch.inference_mode():
        expected, got = (each.model(IDS).logits for each in (loaded, mapped))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    # Back in the stored dtype, where they were.
    assert all(parameter.dtype == torch.bfloat16 for parameter in mapped.model.parameters())
    assert all(is_in_file(parameter, "model.safetensors") for parameter in matrices)
    assert mapped.column_norms == pytest.approx(loaded.column_norms)


def test_a_layer_that_fails_is_put_back(saved: Callable[[str], Path]) -> None:
    mapped = load(saved("llama"), mapped=True)

    def fail(module: torch.nn.Linear, _inputs: object) -> None:
        assert module.weight.dtype == torch.float32
        raise RuntimeError

    handle = mapped.projection(1, "down").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError), torch.inference_mode():
        mapped.model(IDS)
    handle.remove()
    assert {parameter.dtype for parameter in mapped.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "quantize"), [("llama", "bf16"), *((name, "int4") for name in UNLIKE)])
def test_the_bundle_is_the_same(
    name: str,
    quantize: Any,
    saved: Callable[[str], Path],
    tiny_inputs: Callable[[str], CompileConfig],
    tmp_path: Path,
) -> None:
    config = replace(
        tiny_inputs("llama"),
        model=str(saved(name)),
        quantize=quantize,
        repair_rounding=True,
        budgets="sensitivity",
        calibration_tokens=3000,
    )
    plain, mapped = (
        compile_model(replace(config, output=tmp_path / each, max_memory=limit))
        for each, limit in (("plain", None), ("mapped", 64.0))
    )
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "mapped"}
    files = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.safetensors")]
    assert len(files) >= 4
    for file in files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "mapped" / file).read_bytes(), file
    assert plain.quality == mapped.quality


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": 0.5}, "--max-memory: expected at least .* GB, .* got 0.5; give more, or take a smaller model"),
        ({"max_memory": 0.0}, "--max-memory: expected a number above 0"),
        ({"max_memory": 8.0, "heal_steps": 1}, "--max-memory: healing trains all layers at once"),
        ({"max_memory": 8.0, "device": "meta"}, "--max-memory: expected --device cpu"),
    ],
)
def test_what_cannot_be_is_one_line(
    options: dict[str, Any],
    message: str,
    saved: Callable[[str], Path],
    tiny_inputs: Callable[[str], CompileConfig],
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compile_model(replace(tiny_inputs("llama"), model=str(saved("llama")), output=tmp_path / "b", **options))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_is_unpacked_and_so_refused(tmp_path: Path, saved: Callable[[str], Path]) -> None:
    source = replace(find_source(str(saved("llama"))), gguf_file="model.gguf")
    family, config = read_config(find_source(str(saved("llama"))))
    with pytest.raises(ConfigError, match="--max-memory: expected a model in safetensors"):
        load_model(source, family, config, device="cpu", dtype="auto", mapped=True)


def test_what_has_to_be_copied_is_refused(
    saved: Callable[[str], Path], tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    config = replace(tiny_inputs("llama"), model=str(saved("gpt_neox")), output=tmp_path / "b", max_memory=8.0)
    with pytest.raises(ConfigError, match=r"--max-memory: .* gpt_neox is a gpt_neox: its queries, keys and values lie"):
        compile_model(config)
    assert not list(tmp_path.iterdir())


def test_too_much_text_is_told_how_much_would_fit(
    saved: Callable[[str], Path], tiny_inputs: Callable[[str], CompileConfig]
) -> None:
    loaded = load(saved("llama"), mapped=True)
    document = Document(text="", routing_text="", token_ids=tuple(range(4_000_000)))
    corpus = Corpus(calibration=(document,), validation=(), held_out=(), sha256="")
    config = replace(tiny_inputs("llama"), calibration_tokens=5_000_000, max_memory=2.0)
    message = r"at least ([0-9.]+) GB, .* for 4000000 tokens .*, got 2; give more or --calibration-tokens (\d+), or"
    with pytest.raises(ConfigError, match=message) as caught:
        check_memory(config, loaded, corpus)
    found = re.search(message, str(caught.value))
    assert found is not None
    bound, fitting = float(found[1]), int(found[2])
    assert 100_000 < fitting < 5_000_000
    some = replace(corpus, calibration=(replace(document, token_ids=document.token_ids[: fitting * 4 // 5]),))
    # What is advised does, and no less.
    check_memory(replace(config, calibration_tokens=fitting), loaded, some)
    check_memory(replace(config, max_memory=bound), loaded, corpus)
    with pytest.raises(ConfigError):
        check_memory(replace(config, max_memory=bound - 0.1), loaded, corpus)
    check_memory(replace(config, max_memory=None), loaded, corpus)
    # Of two workers each has half of the text, and the bound is of each.
    with pytest.raises(ConfigError, match="for 2000000 tokens"):
        check_memory(replace(config, ray="local", workers=2), loaded, corpus)
