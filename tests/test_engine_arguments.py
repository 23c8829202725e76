"""Arguments of `load`, `generate` and `stream` that are refused, and those that just fit."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles.layout import LAYOUT

from .bundle_factory import list_again
from .engine_inputs import DIALOGUE, MAX_POSITIONS, PROMPT, load
from .model_factory import corpus_texts


@pytest.fixture(scope="module")
def engine(tiny_bundle: Callable[..., Path]) -> runtime.Engine:
    return load(tiny_bundle("llama"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"stop": "text"}, "stop"),
        ({"stop": ["fine", ""]}, r"stop\[1\]"),
        ({"mode": "fast"}, "mode: expected auto, similarity, stability, fused, dense, lossless, got 'fast'"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(options: Any, named: str, engine: runtime.Engine) -> None:
    with pytest.raises(runtime.ConfigError, match=named):
        engine.stream(PROMPT, raw=True, **options)
    with pytest.raises(runtime.ConfigError, match=named):
        engine.generate(PROMPT, raw=True, **options)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("", "prompt: expected"),
        ("flour and butter " * 200, "prompt: expected 1 to 255 tokens, got"),
        ([], "messages: expected at least one"),
        ([{"role": "user"}], r"messages\[0\].content"),
        (None, "expected a list, got NoneType"),
        (b"bytes", "expected a list, got bytes"),
        ([{"role": "user", "content": "flour and butter " * 200}], "prompt: expected 1 to 255 tokens, got"),
    ],
)
def test_wrong_prompts_are_refused_at_the_call(prompt: Any, named: str, engine: runtime.Engine) -> None:
    with pytest.raises(runtime.ConfigError, match=named):
        engine.stream(prompt)
    assert engine.generate(PROMPT, raw=True, max_new_tokens=1).finish_reason


def test_a_prompt_may_fill_all_but_one_position(engine: runtime.Engine) -> None:
    prompt = ""
    for text in corpus_texts()[0] * 9:
        if len(engine.tokenizer.encode(prompt + text).ids) > MAX_POSITIONS - 1:
            break
        prompt += text
    num_tokens = len(engine.tokenizer.encode(prompt).ids)
    assert num_tokens >= MAX_POSITIONS - 2
    got = engine.generate(prompt, raw=True)
    assert (got.num_prompt_tokens, len(got.token_ids)) == (num_tokens, MAX_POSITIONS - num_tokens)


def test_messages_need_a_template(tiny_bundle: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle("llama"), tmp_path / "copy"))
    (copy / LAYOUT.chat_template).unlink()
    list_again(copy)
    engine = load(copy)
    with pytest.raises(runtime.ConfigError, match="has no chat template; give the prompt as text"):
        engine.stream(DIALOGUE)
    assert engine.generate(PROMPT, raw=True, max_new_tokens=2).text


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "fast"}, "mode: expected auto, similarity, stability, fused, dense, lossless, got 'fast'"),
        ({"mode": None}, "mode"),
        ({"engine": "native-2"}, "engine: expected auto, native, torch"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"device": "meta"}, "device 'meta'"),
        ({"dtype": "int3"}, "dtype: expected auto, bfloat16, float32, got 'int3'"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"threads": -3}, "threads: expected at least 1, got -3"),
        ({"threads": 1.5}, "threads: expected a whole number, got 1.5"),
        ({"threads": True}, "threads: expected a whole number, got True"),
        ({"isa": 2}, "isa: expected a str, got 2"),
        ({"device": None}, "device: expected a str, got None"),
        ({"kv_cache_mb": "9"}, "kv_cache_mb: expected a number above 0, got '9'"),
        ({"gpu_memory_mb": float("nan")}, "gpu_memory_mb: expected a number above 0, got nan"),
        ({"weights": "int4", "cuda_graphs": True}, "2 problems: .1. cuda_graphs: expected auto, on, off, got True"),
        ({"engine": "torch", "isa": "avx2"}, "isa: expected auto with the torch engine, got 'avx2'"),
    ],
)
def test_wrong_options_of_load_are_refused(options: Any, named: str, tiny_bundle: Callable[..., Path]) -> None:
    with pytest.raises(runtime.ConfigError, match=named) as caught:
        load(tiny_bundle("llama"), **options)
    assert "\n" not in str(caught.value)


def test_wrong_options_of_load_are_refused_before_the_bundle_is_read(tmp_path: Path) -> None:
    with pytest.raises(runtime.ConfigError, match="threads: expected"):
        runtime.load(tmp_path / "nothing", threads=0)
    with pytest.raises(TypeError, match="num_threads"):
        runtime.load(tmp_path / "nothing", num_threads=2)  # type: ignore[call-arg]


@pytest.mark.usefixtures("torch_threads")
def test_threads_are_those_of_torch(tiny_bundle: Callable[..., Path]) -> None:
    load(tiny_bundle("llama"), threads=2)
    assert torch.get_num_threads() == 2
    load(tiny_bundle("llama"))
    assert torch.get_num_threads() == 2
