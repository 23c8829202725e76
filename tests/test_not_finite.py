"""A model whose numbers go wrong: one clear error wherever a token would be chosen, and the next answer is right."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from coreinfer import runtime
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.compiler.quality.tally import compare_logits
from coreinfer.evaluation.logits import diverge, greedy_ids, log_likelihood, predictions
from coreinfer.runtime.decoding.choosing import log_softmax
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.protocol import Decoder

from .bundle_factory import change_tensors
from .engine_inputs import PROMPT
from .server_process import serving
from .test_native_kernels import native_matrix, stored_matrix

Floats = npt.NDArray[np.float32]
SPOILS = {"nan": np.nan, "inf": np.inf}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 20, "seed": 1},
    "penalized": {"repetition_penalty": 1.3},
    "logprobs": {"logprobs": 2},
    "grammar": {"json_schema": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}},
}
MODES: list[runtime.Mode] = ["dense", "similarity", "stability", "fused", "lossless"]


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("kind", ["bf16", "int8", "int8-planes", "int4"])
@pytest.mark.parametrize("spoil", [np.nan, np.inf, -np.inf])
def test_no_product_hides_what_is_not_finite(spoil: float, kind: str, isa: str) -> None:
    """Activations are rounded to int8, where NaN has no code: int8 weights made finite numbers of it."""
    shape = (33, 70)
    matrix = native_matrix(stored_matrix(kind, shape), shape)
    for num_tokens in (1, 3):
        for place in (0, 5, 17, 40, 69):
            inputs = np.random.default_rng(0).standard_normal((num_tokens, shape[1])).astype(np.float32)
            inputs[0, place] = spoil
            products = np.asarray(_native.multiply(matrix, inputs, isa))
            assert not np.isfinite(products[0]).any()
            assert np.isfinite(products[1:]).all()


def spoiled(bundle_dir: Path, name: str, value: float) -> Path:
    """Put a number into a base's tensor, as a compiler with a mistake would."""

    def spoil(tensors: dict[str, StoredTensor]) -> None:
        tensors[name].array.flat[0] = value

    change_tensors(bundle_dir, LAYOUT.base, spoil)
    return bundle_dir


@pytest.mark.parametrize("isa", [*_native.available_isas(), "torch"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_model_that_computes_nan_says_so(
    quantize: str, isa: str, tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """A NaN that comes up in the first layer reaches the logits through all that follows."""
    copy = Path(shutil.copytree(tiny_bundle("llama", quantize=quantize), tmp_path / "copy"))
    spoiled(copy, "model.layers.0.post_attention_layernorm.weight", np.nan)
    engine = (
        runtime.load(copy, engine="torch", device="cpu", dtype="float32")
        if isa == "torch"
        else runtime.load(copy, engine="native", threads=1, isa=isa)
    )
    for mode in MODES:
        with pytest.raises(
            runtime.ModelOutputError, match=r"^token 1 after a prompt of \d+ tokens: .* \d+ NaN"
        ) as told:
            engine.generate(PROMPT, mode=mode, max_new_tokens=4)
        assert "\n" not in str(told.value)
        assert "coreinfer-inspect DIR --verify" in str(told.value)
        assert engine.decoder.num_cached == 0


@pytest.fixture(scope="module", params=["native", "torch"])
def engine(request: pytest.FixtureRequest, tiny_bundle: Callable[..., Path]) -> runtime.Engine:
    # An int8 head, which the native engine screens where only the likeliest token matters.
    return runtime.load(tiny_bundle("llama", quantize="int8"), engine=request.param, device="cpu", threads=1)


@pytest.fixture
def spoil_at(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """A function (n, value) that puts a value into one logit of each row, from the n-th call on."""
    calls = [0, 10**9]
    value = [np.nan]

    def spoiling(run: Callable[..., Floats]) -> Callable[..., Floats]:
        def forward(self: Decoder, *arguments: Any, **options: Any) -> Floats:
            logits = np.array(run(self, *arguments, **options))
            calls[0] += 1
            if calls[0] >= calls[1]:
                # A token that is never the likeliest.
                logits[..., 7] = value[0]
            return logits

        return forward

    for name in ("forward", "forward_rows"):
        monkeypatch.setattr(type(engine.decoder), name, spoiling(getattr(type(engine.decoder), name)))

    def start(number: int, spoil: float) -> None:
        calls[:], value[0] = [0, number], spoil

    return start


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("options", OPTIONS)
def test_one_logit_ends_a_generation(
    options: str, spoil: str, engine: runtime.Engine, spoil_at: Callable[[int, float], None]
) -> None:
    if options == "grammar":
        pytest.importorskip("llguidance")
    keywords = {"max_new_tokens": 6, "mode": "dense", **OPTIONS[options]}
    expected = engine.generate(PROMPT, **keywords)
    spoil_at(3, SPOILS[spoil])
    given: list[int] = []
    stream = engine.stream(PROMPT, **keywords, on_token=lambda token: given.append(token.token_id))
    num_prompt = expected.num_prompt_tokens
    with pytest.raises(runtime.ModelOutputError, match=f"^token 3 after a prompt of {num_prompt} tokens: logits"):
        list(stream)
    assert given == list(expected.token_ids[:2])
    assert engine.decoder.num_cached == 0
    spoil_at(10**9, 0.0)
    assert engine.generate(PROMPT, **keywords).token_ids == expected.token_ids


@pytest.mark.parametrize("number", [2, 4, 6])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_lossless_decoding_ends_too(
    temperature: float, number: int, engine: runtime.Engine, spoil_at: Callable[[int, float], None]
) -> None:
    """Whether it is the pack's draft or the dense model's verification that goes wrong."""
    spoil_at(number, np.nan)
    with pytest.raises(runtime.ModelOutputError, match=r"^token \d+ after a prompt of"):
        engine.generate(PROMPT, mode="lossless", max_new_tokens=20, temperature=temperature, seed=1)
    assert engine.decoder.num_cached == 0


def test_a_batch_ends_too(engine: runtime.Engine, spoil_at: Callable[[int, float], None]) -> None:
    expected = engine.generate([PROMPT, PROMPT], mode="dense", max_new_tokens=6)
    spoil_at(4, np.nan)
    with pytest.raises(runtime.ModelOutputError, match=r"^token [23] after a prompt of"):
        engine.generate([PROMPT, PROMPT], mode="dense", max_new_tokens=6)
    spoil_at(10**9, 0.0)
    again = engine.generate([PROMPT, PROMPT], mode="dense", max_new_tokens=6)
    assert [one.token_ids for one in again] == [one.token_ids for one in expected]


@pytest.mark.parametrize("spoil", SPOILS)
def test_scores_of_what_is_not_finite_are_refused(spoil: str) -> None:
    good = np.zeros((3, 8), dtype=np.float32)
    bad = good.copy()
    bad[1, 5] = SPOILS[spoil]
    targets, reference = [1, 2, 3], predictions(good)
    for refused in (
        lambda: predictions(bad),
        lambda: diverge(reference, bad, targets),
        lambda: log_likelihood(bad, targets),
        lambda: greedy_ids(lambda ids: bad[1:2], 0, max_new_tokens=2, eos_ids=(), stopped=lambda ids: False),
        lambda: log_softmax(bad[1]),
        lambda: compare_logits(torch.from_numpy(good), torch.from_numpy(bad), torch.tensor(targets), 0),
    ):
        with pytest.raises(runtime.ModelOutputError):
            refused()


def test_a_server_answers_with_one_line(tiny_bundle: Callable[..., Path], bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle("llama"), tmp_path / "damaged"))
    spoiled(copy, "model.norm.weight", np.nan)
    with serving(copy, bundle) as server:
        body = {"model": "damaged", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        for stream in (False, True):
            answer = server.post("/v1/chat/completions", json={**body, "stream": stream})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (500, "model_output_not_finite")
            assert error["message"].startswith("token 1 after a prompt of")
            assert "\n" not in error["message"]
            assert server.post("/v1/chat/completions", json={**body, "model": bundle.name}).status_code == 200
        assert [line for line in server.lines if "token 1 after a prompt of" in line]
