"""The native engine leaves out what tokens do not want, and reads by columns what it would read by rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.bundles import ConfigError, open_bundle
from coreinfer.bundles.contract import INPUT_GROUPS
from coreinfer.bundles.reader import Bundle
from coreinfer.runtime.engines.native import _native, skipping
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch import input_masks
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from coreinfer.runtime.load_options import LoadOptions

from .skipping import masking_decoder, skipping_engine

PROMPT_IDS, NEXT_IDS = [1, 57, 200, 300, 21, 99, 140, 7], [9, 8, 77, 301]
SHARED = FfnChoice(cluster=1, token_share=0.6)

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def shared_bundle(tiny_bundle: Callable[..., Path]) -> Callable[..., Bundle]:
    def opened(family: str = "llama", quantize: str = "int4", *, half_inputs: bool = True) -> Bundle:
        bundle = open_bundle(tiny_bundle(family, token_share=0.6, quantize=quantize, half_inputs=half_inputs))
        record = bundle.manifest.token_shares
        assert record is not None
        assert record.halves == (half_inputs and quantize == "int4")
        return bundle

    return opened


def masking(bundle: Bundle, *, isa: str = "auto", columns: bool = False) -> NativeDecoder:
    """A decoder after the prompt, which counts as 0 what is not wanted; with `columns` it does not read it."""
    decoder = masking_decoder(bundle, isa=isa, columns=columns)
    decoder.use(DENSE)
    decoder.forward(PROMPT_IDS)
    return decoder


def decoded(decoder: NativeDecoder | TorchDecoder, choice: FfnChoice = SHARED) -> Floats:
    decoder.use(choice)
    return np.concatenate([decoder.forward([token_id]) for token_id in NEXT_IDS])


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "qwen3", "gpt_neox"])
def test_native_leaves_out_what_torch_leaves_out(family: str, shared_bundle: Callable[..., Bundle]) -> None:
    bundle = shared_bundle(family, "bf16")
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    torch_decoder.forward(PROMPT_IDS)
    expected, got = decoded_apart(torch_decoder), decoded_apart(masking(bundle, columns=True))
    whole = decoded_apart(masking(bundle), SHARED.whole)
    # An input on the threshold is wanted by one engine and not by the other, which counts in a model this narrow.
    differences = np.abs(got - expected)
    assert np.median(differences.max(axis=1)) < 0.01 * np.abs(expected).max()
    assert differences.mean() < 0.5 * np.abs(got - whole).mean()


def check_beside_torch(bundle: Bundle, thresholds: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    """With these thresholds the native engine decodes what torch does, but for its rounding of inputs."""
    for module in (input_masks, skipping):
        monkeypatch.setattr(module, "token_thresholds", lambda *_: thresholds)
    torch_decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
    torch_decoder.forward(PROMPT_IDS)
    expected, whole = decoded_apart(torch_decoder), decoded_apart(torch_decoder, SHARED.whole)
    rounding = np.abs(decoded_apart(masking(bundle), SHARED.whole) - whole).mean()
    differences = np.abs(decoded_apart(masking(bundle, columns=True)) - expected)
    assert differences.mean() < 2 * rounding
    assert differences.mean() < 0.25 * np.abs(expected - whole).mean()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_native_leaves_out_of_int8_what_torch_leaves_out(
    family: str, shared_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shared_bundle(family, "int8")
    # The first layer's heads and neurons are all left out, nothing else: no rounded input is near a threshold.
    thresholds = np.full((bundle.manifest.model.num_layers, len(INPUT_GROUPS), 2), -1, dtype=np.float32)
    thresholds[0, [INPUT_GROUPS.index("o"), INPUT_GROUPS.index("down")]] = 1e9
    check_beside_torch(bundle, thresholds, monkeypatch)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "qwen3", "gpt_neox"])
def test_native_reads_in_half_what_torch_reads_in_half(
    family: str, shared_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shared_bundle(family)
    assert bundle.token_shares is not None
    # All inputs in half: that none is near a threshold leaves only the native engine's own rounding of inputs.
    highest = np.where(bundle.token_shares["half_ratios"].array > 1, np.float32(1e9), np.float32(0))
    assert highest.any()
    thresholds = np.stack([np.zeros_like(highest), highest], axis=-1)
    check_beside_torch(bundle, thresholds, monkeypatch)


def decoded_apart(decoder: NativeDecoder | TorchDecoder, choice: FfnChoice = SHARED) -> Floats:
    """Logits of many tokens, each of them right after the prompt."""
    logits = []
    for token_id in range(20, 320, 20):
        decoder.truncate(len(PROMPT_IDS))
        decoder.use(choice)
        logits.append(decoder.forward([token_id]))
    return np.concatenate(logits)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize(
    ("family", "quantize", "half_inputs"),
    [
        ("llama", "int4", True),
        ("llama", "int4", False),
        ("opt", "int4", True),
        ("gpt_neox", "int4", True),
        ("llama", "int8", True),
        ("gpt_neox", "int8", True),
        ("llama", "bf16", True),
        ("opt", "bf16", True),
    ],
)
def test_columns_give_what_rows_give(
    family: str, quantize: str, half_inputs: bool, isa: str, shared_bundle: Callable[..., Bundle]
) -> None:
    bundle = shared_bundle(family, quantize, half_inputs=half_inputs)
    rows, columns = masking(bundle, isa=isa), masking(bundle, isa=isa, columns=True)
    for choice in (SHARED, FfnChoice(token_share=0.4), SHARED.whole):
        assert np.array_equal(decoded(columns, choice), decoded(rows, choice))
    # Of a tiny model's columns most is padding.
    num_bytes = []
    for share in (0.4, 0.9):
        columns.use(FfnChoice(token_share=share))
        columns.forward([5])
        num_bytes.append(columns.bytes_per_token(8))
    assert 0 < num_bytes[0] < num_bytes[1]


@pytest.mark.parametrize("quantize", ["int4", "int8", "bf16"])
def test_rows_of_a_batch_leave_out_what_each_leaves_out_alone(
    quantize: str, shared_bundle: Callable[..., Bundle]
) -> None:
    bundle = shared_bundle(quantize=quantize)
    alone = decoded(masking(bundle, columns=True))
    decoder = masking(bundle, columns=True)
    numbers = [0, decoder.fork_sequence(0, len(PROMPT_IDS)), decoder.fork_sequence(0, len(PROMPT_IDS))]
    decoder.use(SHARED)
    for step, token_id in enumerate(NEXT_IDS):
        rows = decoder.forward_rows(numbers, [token_id, 3 + step, token_id])
        assert np.array_equal(rows[0], alone[step])
        assert np.array_equal(rows[2], alone[step])
        assert not np.array_equal(rows[1], alone[step])


def test_nothing_is_left_out_where_it_is_not_to_be(shared_bundle: Callable[..., Bundle]) -> None:
    bundle = shared_bundle()
    off = NativeDecoder(bundle, threads=2, input_skipping="off")
    assert not off.token_shares_pay
    # Columns of the tiny model are too short for any machine.
    assert not NativeDecoder(bundle, threads=2).token_shares_pay
    off.forward(PROMPT_IDS)
    assert np.array_equal(decoded(off), decoded(masking(bundle), SHARED.whole))


@pytest.mark.parametrize("quantize", ["int4", "int8", "bf16"])
def test_generations_do_not_depend_on_how_weights_are_read(quantize: str, shared_bundle: Callable[..., Bundle]) -> None:
    path = shared_bundle(quantize=quantize).path
    texts: dict[str, Sequence[str]] = {}
    read = {}
    for asked in ("on", "masked", "off"):
        engine = skipping_engine(path, asked)
        made = [engine.generate(prompt, max_new_tokens=12) for prompt in ("a b c", "the sea is wide")]
        texts[asked] = [generation.text for generation in made]
        read[asked] = made[0].bytes_read
    assert texts["on"] == texts["masked"]
    assert texts["on"] != texts["off"]
    assert read["on"] is not None
    assert read["on"].mean != (read["masked"].mean if read["masked"] else 0)


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="input_skipping 'masked': with memory_mb"):
        LoadOptions(memory_mb=100, input_skipping="masked")
    assert replace(LoadOptions(), input_skipping="off").input_skipping == "off"
