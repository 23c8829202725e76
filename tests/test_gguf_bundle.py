"""A GGUF file's positions, ends of turns and chat templates, in the bundle compiled of it and in both engines."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreinfer.bundles import open_bundle
from coreinfer.bundles.layout import LAYOUT
from coreinfer.compiler import CompileConfig, compile_model
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.prompts.prompt_format import PromptFormat

from .gguf_factory import contents, tiny_config, tiny_model, write
from .test_gguf_positions import LLAMA3, YARN, YARN_KEYS, llama3_factors

IDS = list(range(3, 43))
TEMPLATES = {
    "tokenizer.chat_template": "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}",
    "tokenizer.chat_template.tool_use": (
        "{{ tools }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    ),
}


@pytest.mark.parametrize("case", ["llama3", "yarn"])
def test_both_engines_scale_positions_as_transformers_does(
    case: str, tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    rope: dict[str, Any] = LLAMA3 if case == "llama3" else {"rope_theta": 10_000.0, **YARN, "attention_factor": 1.25}
    model = tiny_model(tiny_config("llama" if case == "llama3" else "qwen3", rope_parameters=rope)).bfloat16().float()
    what = contents(model)
    what.metadata["tokenizer.ggml.eot_token_id"] = 7
    what.metadata |= TEMPLATES
    if case == "llama3":
        what.tensors["rope_freqs.weight"] = llama3_factors(LLAMA3, 8)
    else:
        what.metadata |= {f"qwen3.{key}": value for key, value in YARN_KEYS.items()}
        what.metadata["qwen3.rope.scaling.attn_factor"] = 1.25
    parts = write(tmp_path / "model.gguf", what, parts=2)
    config = replace(tiny_inputs("llama"), evaluate=False, controls=False, report_sentences=0)
    compile_model(replace(config, model=str(parts[1]), output=tmp_path / "bundle"))
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    bundle = open_bundle(tmp_path / "bundle")
    for decoder in (TorchDecoder(bundle, device="cpu", dtype="float32"), NativeDecoder(bundle, threads=1)):
        got = decoder.forward(IDS, all_logits=True)
        # The native engine keeps keys and values in fp16.
        assert float(np.abs(got - expected).max() / np.abs(expected).max()) < 2e-3
    assert PromptFormat(bundle).eos_token_ids == {2, 7}
    stored = [(bundle.path / name).read_text(encoding="utf-8") for name in (LAYOUT.chat_template, LAYOUT.tool_template)]
    assert stored == list(TEMPLATES.values())
