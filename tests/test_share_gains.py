"""What a compile says of token shares that can save no time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from coreinfer.bundles.families import family_by_name
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.options import Format
from coreinfer.compiler.shares.gains import LEAST_OUTPUTS, short_share, warn_of_no_gain
from coreinfer.runtime.engines.native import _native
from transformers import LlamaConfig, LlamaForCausalLM

from .test_config import make_config


def model_of(hidden_size: int, intermediate_size: int) -> LoadedModel:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    family = family_by_name("llama")
    return wrap_model(LlamaForCausalLM(config), None, family=family, name="tiny", config=config)


def test_the_engine_reads_as_short_columns_whole() -> None:
    bytes_of_a_weight: dict[Format, float] = {"int4": 0.5, "int8": 1, "bf16": 2}
    assert {name: LEAST_OUTPUTS[name] * size for name, size in bytes_of_a_weight.items()} == dict.fromkeys(
        LEAST_OUTPUTS, _native.LEAST_COLUMN_BYTES
    )


def test_short_columns_are_counted() -> None:
    """Query, key and value have 96 outputs together, output and down 32, gate and up 2,048."""
    loaded = model_of(32, 1024)
    long, short = 2 * 32 * 1024, 4 * 32 * 32 + 32 * 1024
    assert short_share(loaded, "int4") == pytest.approx(short / (long + short))
    assert short_share(model_of(32, 1008), "int4") == 1


def test_longer_weights_make_longer_columns() -> None:
    """Query, key and value have 192 outputs together, output and down 64, gate and up 1,024 or 512."""
    loaded, narrow = model_of(64, 512), model_of(64, 256)
    long, short = 2 * 64 * 512, 4 * 64 * 64 + 64 * 512
    assert short_share(loaded, "int4") == 1
    assert short_share(loaded, "int8") == pytest.approx(short / (long + short))
    assert short_share(narrow, "int8") == 1
    assert 0 < short_share(narrow, "bf16") < 1
    assert short_share(model_of(512, 512), "bf16") == 0


def test_it_is_said_before_anything_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    loaded, config = model_of(32, 1024), make_config(token_share=0.6)
    warn_of_no_gain(config, loaded)
    assert "with --quantize int4 columns of 36% of the layers' weights are shorter than 1 kB" in caplog.text
    caplog.clear()
    warn_of_no_gain(replace(config, quantize="bf16"), model_of(512, 512))
    assert not caplog.text


def test_a_compile_says_it(
    tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compile_model(replace(tiny_inputs("llama"), token_share=0.6, output=tmp_path / "bundle"))
    assert caplog.text.count("with --quantize bf16 columns of 100% of the layers' weights are shorter than 1 kB") == 1
