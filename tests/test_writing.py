"""The runtime writes the builtin corpus: with the model's own distribution, the same whatever is written beside."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from coreinfer.bundles.errors import BundleError, ConfigError
from coreinfer.bundles.families import family_of_config
from coreinfer.compiler import CompileConfig, Progress, compile_model
from coreinfer.compiler.models.load import LoadedModel, wrap_model
from coreinfer.compiler.text import builtin
from coreinfer.compiler.text.writing import Sampling, open_engine, stored_in_int8, write_continuations
from coreinfer.runtime.decoding.sampling import SamplingParams, distribution
from coreinfer.runtime.engines.native.decoder import NativeDecoder

from .model_factory import SHAPES, VOCABULARY, build_model, build_tokenizer
from .test_config import make_config

SAMPLING = Sampling(num_new=48, temperature=0.7, top_p=0.95, seed=3)


def wrap(model: transformers.PreTrainedModel) -> LoadedModel:
    family = family_of_config(model.config.to_dict(), "tiny")
    return wrap_model(model, build_tokenizer(), family=family, name="tiny", config=model.config)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return wrap(build_model("llama"))


def some_prompts(count: int) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in generator.integers(4, 40, count)]


def write(
    loaded: LoadedModel,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling = SAMPLING,
    **options: Any,
) -> list[list[int]]:
    config = make_config(threads=1, **options)
    with stored_in_int8(config, loaded, folder) as stored:
        numbered = dict(enumerate(prompts))
        written = write_continuations(open_engine(config, stored), numbered, sampling, lambda steps=1: None)
    return [written[number] for number in numbered]


@pytest.mark.parametrize("family", SHAPES)
def test_text_is_drawn_from_the_models_own_distribution(family: str, tmp_path: Path) -> None:
    """Log-probabilities of what is drawn are, in the mean, those that the float32 model's nucleus lets expect."""
    loaded, prompts = wrap(build_model(family)), some_prompts(80)
    written = write(loaded, tmp_path, prompts)
    surprises, params = [], SamplingParams(temperature=SAMPLING.temperature, top_p=SAMPLING.top_p)
    for prompt, new_ids in zip(prompts, written, strict=True):
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([[*prompt, *new_ids]])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.double().log_softmax(dim=-1).numpy()
        for row, token_id, row_logprobs in zip(logits.numpy(), new_ids, logprobs, strict=True):
            expected = distribution(row, params, ()) @ row_logprobs
            surprises.append(row_logprobs[token_id] - expected)
    assert len(surprises) > 2000
    assert abs(np.mean(surprises)) < 0.1


def test_neighbours_change_nothing(loaded: LoadedModel, tmp_path: Path) -> None:
    prompts = some_prompts(70)
    together = write(loaded, tmp_path, prompts)
    assert write(loaded, tmp_path, prompts[:3]) == together[:3]
    # Equal prompts are continued differently: each has a seed of its own.
    assert len({tuple(ids) for ids in write(loaded, tmp_path, prompts[:1] * 5)}) == 5


def test_a_text_is_cut_after_what_ends_it(loaded: LoadedModel, tmp_path: Path) -> None:
    prompts, stops = some_prompts(40), set(range(100, 120))
    ending = copy.copy(loaded.model)
    ending.generation_config = SimpleNamespace(eos_token_id=sorted(stops))  # type: ignore[assignment]
    whole = write(loaded, tmp_path, prompts)
    cut = write(replace(loaded, model=ending), tmp_path, prompts)
    for long, short in zip(whole, cut, strict=True):
        end = next((place + 1 for place, token_id in enumerate(long) if token_id in stops), len(long))
        assert short == long[:end]
    assert {len(ids) for ids in whole} >= {SAMPLING.num_new}
    assert sum(len(ids) < SAMPLING.num_new for ids in cut) > 20


def test_each_continuation_is_a_step(loaded: LoadedModel, tmp_path: Path) -> None:
    steps: list[int] = []
    with stored_in_int8(make_config(threads=1), loaded, tmp_path) as stored:
        engine = open_engine(make_config(threads=1), stored)
        write_continuations(
            engine, dict(enumerate(some_prompts(9))), SAMPLING, lambda steps_done=1: steps.append(steps_done)
        )
    assert steps == [1] * 9
    assert [*tmp_path.iterdir()] == []


def test_what_the_native_engine_cannot_compute_is_written_by_the_torch_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = copy.deepcopy(build_model("llama").config)
    config.hidden_act = "relu2"
    torch.manual_seed(0)
    squared = wrap(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    with caplog.at_level(logging.WARNING):
        written = write(squared, tmp_path, some_prompts(3))
    assert "going on with the torch engine" in caplog.text
    assert all(0 < len(ids) <= SAMPLING.num_new for ids in written)
    with pytest.raises(ConfigError, match="--max-memory, --calibration builtin: the native engine cannot write"):
        write(squared, tmp_path, some_prompts(3), max_memory=1.0)


def test_keys_and_values_keep_within_the_memory(loaded: LoadedModel, tmp_path: Path) -> None:
    prompts = some_prompts(20)
    config = make_config(threads=1, max_memory=0.0004)
    with stored_in_int8(config, loaded, tmp_path) as stored:
        engine = open_engine(config, stored)
        decoder = cast(NativeDecoder, engine.decoder)
        assert decoder.num_pages * decoder.page_bytes <= 0.0001e9
        assert decoder.num_pages < 20
        written = write_continuations(engine, dict(enumerate(prompts)), SAMPLING, lambda steps=1: None)
    assert [*written.values()] == write(loaded, tmp_path, prompts)
    with pytest.raises(ConfigError, match=r"--calibration builtin: expected memory .* of 256 tokens, .* for 65;"):
        write(loaded, tmp_path, prompts, max_memory=0.0001)


def test_a_full_disk_is_told_of_the_bundle(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coreinfer.compiler.text.writing.write_dense_bundle", fail)
    with pytest.raises(BundleError, match="No space left on device"):
        write(loaded, tmp_path, some_prompts(1))


@pytest.mark.parametrize("max_memory", [None, 4.0])
def test_a_compile_with_the_builtin_corpus(
    max_memory: float | None, tiny_inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = builtin.load_seeds()[::14]
    monkeypatch.setattr(builtin, "load_seeds", lambda: seeds)
    config: CompileConfig = replace(
        tiny_inputs("llama"),
        output=tmp_path / "bundle",
        calibration=("builtin",),
        calibration_tokens=6000,
        clusters=2,
        evaluate=False,
        threads=1,
        max_memory=max_memory,
    )
    progress = Progress()
    manifest = compile_model(config, progress)
    assert progress.stage_seconds["corpus"] > 0
    assert 20 < sum(cluster.num_sentences for cluster in manifest.clusters) <= len(seeds)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
