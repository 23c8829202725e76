"""Files that callers of the C library open themselves, and FFNs by choice: the bits of Python; and refusals."""

import ctypes
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from coreinfer.bundles import Bundle, open_bundle
from coreinfer.bundles.contract import kept_experts
from coreinfer.bundles.token_shares import token_thresholds
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE as DENSE_CHOICE
from coreinfer.runtime.engines.protocol import FfnChoice

from .c_engine import COUNT_PAGES, HALVES, CEngine, LentFile, record_of
from .c_library import COMPILERS, DENSE, CError, CModel, has_compilers
from .model_factory import VOCABULARY

pytestmark = pytest.mark.skipif(not has_compilers(), reason="no C or C++ compiler here")

IDS = np.random.default_rng(5).integers(3, VOCABULARY, 60).tolist()
THREADS = {"num_threads": 2}


def whole(bundle: Bundle) -> tuple[int, ...]:
    """Neurons of each layer of the dense FFN."""
    model = bundle.manifest.model
    return (model.ffn_dim,) * model.num_layers


def logits_of(model: CModel) -> list[Any]:
    model.truncate(0)
    return [model.feed(IDS[:50]), *(model.feed([token_id]) for token_id in IDS[50:])]


def python_logits(decoder: NativeDecoder, choice: FfnChoice) -> list[Any]:
    decoder.use(choice)
    decoder.truncate(0)
    return [decoder.forward(IDS[:50])[0], *(decoder.forward([token_id])[0] for token_id in IDS[50:])]


@pytest.mark.parametrize("family", ["gemma3", "mixtral"])
def test_files_that_the_caller_opens(family: str, tiny_bundle: Callable[..., Path], c_library: Path) -> None:
    """Base, dense FFN and packs, each given back when the last that is made of it is closed."""
    bundle = open_bundle(tiny_bundle(family, quantize="int4"))
    record, decoder = record_of(bundle), NativeDecoder(bundle, threads=2)
    assert bundle.dense is not None
    base, dense, pack = map(LentFile, (bundle.base, bundle.dense, bundle.pack(1)))
    model = CEngine.of_files(c_library, record, base, **THREADS)
    with pytest.raises(CError, match=r"^ARGUMENT: FFN: expected one in use, got none$"):
        model.feed(IDS)
    kind = "read_ffn" if family == "gemma3" else "read_experts"
    all_neurons = model.read_ffn(record, dense, whole(bundle), kind)
    if family == "gemma3":
        cluster = model.read_ffn(record, pack, bundle.manifest.clusters[1].layer_budgets)
    else:
        cluster = model.keep_experts(all_neurons, kept_experts(bundle.pack(1), bundle.manifest))
    for ffn, choice in ((all_neurons, DENSE_CHOICE), (cluster, FfnChoice(cluster=1))):
        model.use_ffn(ffn)
        for got, wanted in zip(logits_of(model), python_logits(decoder, choice), strict=True):
            np.testing.assert_array_equal(got, wanted)
    model.close_ffn(all_neurons)
    model.close_ffn(cluster)
    # The model still uses the cluster's.
    np.testing.assert_array_equal(logits_of(model)[-1], python_logits(decoder, FfnChoice(cluster=1))[-1])
    assert (base.num_released, dense.num_released + pack.num_released) == (0, int(family == "gemma3"))
    model.close()
    assert (base.num_released, dense.num_released) == (1, 1)
    assert pack.num_released == (family == "gemma3")


def test_it_has_no_bundle(tiny_bundle: Callable[..., Path], c_library: Path) -> None:
    bundle = open_bundle(tiny_bundle("llama"))
    model = CEngine.of_files(c_library, record_of(bundle), LentFile(bundle.base))
    assert (model.num_clusters, model.has_dense, model.is_end(2), model.label(0)) == (0, 0, False, None)
    assert (model.vocab_size, model.max_tokens) == (VOCABULARY, bundle.manifest.model.max_positions)
    for cluster in (0, DENSE):
        for call in (model.use, model.prepare, model.pack):
            with pytest.raises(CError, match=r"^NOT_FOUND: cluster: expected none of a model whose files the caller"):
                call(cluster)


def test_the_caller_counts_pages(tiny_bundle: Callable[..., Path], c_library: Path) -> None:
    bundle = open_bundle(tiny_bundle("llama", quantize="int8"))
    record, base = record_of(bundle), LentFile(bundle.base)
    seen: list[tuple[int, int, int]] = []

    def counts(num_pages: int) -> Any:
        def count(_: object, sizes: Any) -> int:
            seen.append((sizes.contents.page, sizes.contents.tables, sizes.contents.table_block))
            return num_pages

        return COUNT_PAGES(count)

    seven, none = counts(7), counts(0)
    model = CEngine.of_files(c_library, record, base, count_pages=seven)
    assert model.num_pages == 7
    assert seen[0][0] == model.page_bytes == NativeDecoder(bundle, threads=1).page_bytes
    assert 0 < seen[0][1] < len(bundle.base.mapped_bytes)
    assert seen[0][2] > 0
    assert seen[0][2] % 4096 == 0
    with pytest.raises(CError, match=r"^ARGUMENT: KV cache pages: expected at least 1, got 0$"):
        CEngine.of_files(c_library, record, base, count_pages=none)
    assert base.num_released == 0


def test_packs_of_a_bundle_are_ffns_too(tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]) -> None:
    model = engine_in_c(tiny_bundle("llama", quantize="int4"), **THREADS)
    model.use(2)
    expected = logits_of(model)
    ffn = model.pack(2)
    model.use(DENSE)
    assert model.max_neurons(model.pack(DENSE)) > model.max_neurons(ffn)
    model.use_ffn(ffn)
    for got, wanted in zip(logits_of(model), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    with pytest.raises(CError, match=r"^NOT_FOUND: cluster: expected 0 to 3 or COREINFER_DENSE, got 4$"):
        model.pack(4)


@pytest.mark.parametrize("kind", ["int4", "bf16"])
def test_neurons_are_gathered(kind: str, tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]) -> None:
    path = tiny_bundle("llama", quantize=kind)
    bundle = open_bundle(path)
    decoder, model = NativeDecoder(bundle, threads=2), engine_in_c(path, **THREADS)
    neuron_ids = tuple(np.arange(layer, count, 3, dtype=np.int32) for layer, count in enumerate(whole(bundle)))
    dense = model.pack(DENSE)
    ffn = model.gather_neurons(dense, neuron_ids)
    model.use_ffn(ffn)
    model.close_ffn(dense)
    model.close_ffn(ffn)
    choice = FfnChoice(neuron_ids=neuron_ids)
    for got, wanted in zip(logits_of(model), python_logits(decoder, choice), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_neurons_that_are_not_there(tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]) -> None:
    model = engine_in_c(tiny_bundle("llama"))
    dense = model.pack(DENSE)
    most = model.max_neurons(dense)
    for layers, message in (
        ([[0]] * 2, "neuron ids: expected 3 layers, got 2"),
        ([[0], [], [0]], "neuron ids: expected at least one a layer, got none"),
        ([[0], [most], [0]], f"neuron id: expected 0 to {most - 1}, got {most}"),
        ([[0], [-1], [0]], f"neuron id: expected 0 to {most - 1}, got -1"),
        ([[0], [2, 1], [0]], "neuron ids: expected ascending ones, got 1 after 2"),
    ):
        with pytest.raises(CError, match=rf"^ARGUMENT: {message}$"):
            model.gather_neurons(dense, layers)
    mixture = engine_in_c(tiny_bundle("mixtral", quantize="int4"))
    width = mixture.max_neurons(mixture.pack(DENSE))
    with pytest.raises(CError, match=r"^ARGUMENT: neuron ids of an expert: expected 2, as of the one before, got 1$"):
        mixture.gather_neurons(mixture.pack(DENSE), [[0, 1, width]] * 3)
    with pytest.raises(CError, match=r"^ARGUMENT: experts of a layer: expected numbers below 6, got 6$"):
        mixture.keep_experts(mixture.pack(DENSE), [[0, 6]] * 3)


# Token shares


@pytest.mark.parametrize("laid_out", [False, True])
def test_thresholds_and_columns(
    laid_out: bool, tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]
) -> None:
    path = tiny_bundle("llama", token_share=0.6, quantize="int4")
    bundle = open_bundle(path)
    decoder, model = NativeDecoder(bundle, threads=2, input_skipping="masked"), engine_in_c(path, **THREADS)
    expected = python_logits(decoder, FfnChoice(cluster=1, token_share=0.6))
    thresholds = np.ascontiguousarray(token_thresholds(bundle, 1, 0.6))
    if laid_out:
        model.call("lay_out_columns", model._model, 15 | HALVES, 0)
    pack = model.pack(1)
    model.use_ffn(pack, thresholds)
    assert (model.column_bytes > 0) is laid_out
    for got, wanted in zip(logits_of(model), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    alone, together = (model.bytes_per_token(0, alone=value) for value in (True, False))
    model.use_ffn(pack, thresholds_of(0.0, 0.0))
    logits_of(model)
    # A tiny model's columns are padding for the most part.
    assert alone < model.bytes_per_token(0) if laid_out else alone == together == model.bytes_per_token(0)
    # coreinfer_use reads all again.
    model.use(1)
    assert not np.array_equal(logits_of(model)[-1], expected[-1])
    gains = model.try_columns(0.5)
    assert len(gains) == 4
    assert all(gain >= 0 for gain in gains)
    with pytest.raises(CError, match=r"^ARGUMENT: thresholds: expected 3 layers of 4 pairs, got another shape$"):
        model.use_ffn(pack, thresholds[:2])


def thresholds_of(wanted: float, whole: float) -> npt.NDArray[np.float32]:
    return np.tile(np.array([wanted, whole], dtype=np.float32), (3, 4, 1))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_high_bits_alone(family: str, tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]) -> None:
    path = tiny_bundle(family, token_share=0.6, quantize="int4")
    logits: dict[str, Sequence[npt.NDArray[np.float32]]] = {}
    num_bytes: dict[str, int] = {}
    for name, layout, thresholds in (
        ("whole", 15 | HALVES, thresholds_of(0.0, 0.0)),
        ("halves", 15 | HALVES, thresholds_of(0.0, 0.4)),
        ("halves by rows", None, thresholds_of(0.0, 0.4)),
        ("high bits of all", 15 | HALVES, thresholds_of(0.0, 1e9)),
    ):
        model = engine_in_c(path, **THREADS)
        if layout is not None:
            model.call("lay_out_columns", model._model, layout, 0)
        model.use_ffn(model.pack(1), thresholds)
        logits[name], num_bytes[name] = logits_of(model), model.bytes_per_token(0)
    for got, wanted in zip(logits["halves"], logits["halves by rows"], strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert not np.array_equal(logits["halves"][-1], logits["whole"][-1])
    assert num_bytes["high bits of all"] < num_bytes["halves"] < num_bytes["whole"] < num_bytes["halves by rows"] * 4


def test_high_bits_that_cannot_be_read_alone(
    tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]
) -> None:
    model = engine_in_c(tiny_bundle("llama", token_share=0.6, quantize="int4"), **THREADS)
    with pytest.raises(
        CError, match=r"^ARGUMENT: thresholds: expected pairs of which the second is at least the first"
    ):
        model.use_ffn(model.pack(1), thresholds_of(0.2, 0.1))
    model.call("lay_out_columns", model._model, 15, 0)
    model.use_ffn(model.pack(1), thresholds_of(0.2, 0.2))
    with pytest.raises(CError, match=r"half of the bits of columns without COREINFER_HALVES, got others$"):
        model.use_ffn(model.pack(1), thresholds_of(0.1, 0.2))
    model = engine_in_c(tiny_bundle("llama", token_share=0.6, quantize="int8"), **THREADS)
    with pytest.raises(CError, match=r"half of the bits of weights that are not int4, got others$"):
        model.use_ffn(model.pack(1), thresholds_of(0.1, 0.2))


def test_python_says_the_same_of_thresholds(tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(tiny_bundle("llama"))
    decoder = NativeDecoder(bundle, threads=1)
    for shape in ((2, 4, 2), (3, 3, 2), (24,), (3, 4), (3, 4, 1)):
        with pytest.raises(ValueError, match=r"^thresholds: expected 3 layers of 4 pairs, got another shape$"):
            decoder._model.use(decoder._ffn(None), np.zeros(shape, dtype=np.float32))


# A limit of memory


def test_memory_is_limited(tiny_bundle: Callable[..., Path], c_library: Path) -> None:
    bundle = open_bundle(tiny_bundle("llama", quantize="bf16"))
    record, decoder = record_of(bundle), NativeDecoder(bundle, threads=2)
    assert bundle.dense is not None
    base, dense = LentFile(bundle.base), LentFile(bundle.dense)
    model = CEngine.of_files(c_library, record, base, **THREADS)
    assert model.reads() is None
    ffn = model.read_ffn(record, dense, whole(bundle))
    assert model.holds_ffn(ffn)
    model.call("limit_memory", model._model, base.path, 60_000, 0)
    with pytest.raises(CError, match=r"^ARGUMENT: FFN: expected one that is read in layers, as memory is limited"):
        model.use_ffn(ffn)
    with pytest.raises(CError, match=r"^ARGUMENT: FFN: expected one that is read in layers, as memory is limited"):
        model.holds_ffn(ffn)
    layered = model.read_in_layers(ffn, dense.path)
    assert not model.holds_ffn(layered)
    model.announce_ffn(layered)
    model.use_ffn(layered)
    for got, wanted in zip(logits_of(model), python_logits(decoder, DENSE_CHOICE), strict=True):
        np.testing.assert_array_equal(got, wanted)
    reads = model.reads()
    assert reads is not None
    assert model.bytes_read == reads.layer_bytes + reads.table_bytes > 0
    assert reads.num_hits + reads.num_misses > 0
    assert 0 < model.layer_bytes_used <= 60_000
    calls: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: model.call("limit_memory", model._model, base.path, 60_000, 0), "memory: expected no limit yet"),
        (lambda: model.call("lay_out_columns", model._model, 15, 0), "columns: expected memory without a limit"),
    )
    for call, message in calls:
        with pytest.raises(CError, match=rf"^ARGUMENT: {message}"):
            call()
    assert model.try_columns(0.5) == [0.0] * 4
    with pytest.raises(CError, match=r"^INTERNAL: .*absent: cannot be opened"):
        model.read_in_layers(ffn, b"absent")


def test_experts_are_limited_too(tiny_bundle: Callable[..., Path], c_library: Path) -> None:
    bundle = open_bundle(tiny_bundle("gpt_oss", quantize="bf16"))
    record, decoder = record_of(bundle), NativeDecoder(bundle, threads=2)
    assert bundle.dense is not None
    base, dense = LentFile(bundle.base), LentFile(bundle.dense)

    def limited(layer_bytes: int) -> tuple[CEngine, ctypes.c_void_p]:
        model = CEngine.of_files(c_library, record, base, **THREADS)
        ffn = model.read_ffn(record, dense, whole(bundle), "read_experts")
        model.call("limit_memory", model._model, base.path, layer_bytes, 0)
        with pytest.raises(CError, match=r"^ARGUMENT: FFN: expected one that is read in layers, as memory is limited"):
            model.use_ffn(ffn)
        return model, model.read_in_layers(ffn, dense.path)

    model, ffn = limited(100)
    with pytest.raises(CError, match=r"^ARGUMENT: layer_bytes: expected at least \d+ for one expert, got 100$"):
        model.use_ffn(ffn)
    # Two or three experts.
    model, ffn = limited(60_000)
    kept = model.keep_experts(ffn, kept_experts(bundle.pack(1), bundle.manifest))
    for own, choice in ((ffn, DENSE_CHOICE), (kept, FfnChoice(cluster=1))):
        assert not model.holds_ffn(own)
        model.announce_ffn(own)
        model.use_ffn(own)
        for got, wanted in zip(logits_of(model), python_logits(decoder, choice), strict=True):
            np.testing.assert_array_equal(got, wanted)
        assert 0 < model.layer_bytes_used <= 60_000
    # What is there of one is there of the other.
    model, ffn = limited(10_000_000)
    kept = model.keep_experts(ffn, kept_experts(bundle.pack(1), bundle.manifest))
    model.announce_ffn(ffn)
    while not model.holds_ffn(ffn):
        time.sleep(0.01)
    assert model.holds_ffn(kept)
    model.use_ffn(kept)
    logits_of(model)
    reads = model.reads()
    assert reads is not None
    assert reads.num_misses == 0 < reads.num_hits


def test_a_limit_comes_before_the_first_ffn(
    tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]
) -> None:
    model = engine_in_c(tiny_bundle("llama"))
    with pytest.raises(CError, match=r"^ARGUMENT: FFN: expected none in use, got one$"):
        model.call("limit_memory", model._model, b"base", 60_000, 0)


# What it refuses


@pytest.mark.parametrize("language", [["c", "-std=c99"], ["c++", "-std=c++17"]])
@pytest.mark.parametrize("header", ["coreinfer.h", "coreinfer_engine.h"])
def test_headers_are_strict(language: list[str], header: str, c_library: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text(f'#include "{header}"\n', encoding="utf-8")
    command = [*COMPILERS[language[0] == "c"], "-x", *language, "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    command += ["-fsyntax-only", f"-I{c_library / 'include'}", str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_files_that_are_no_bundles(tiny_bundle: Callable[..., Path], c_library: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle("llama"), tmp_path / "copy"))
    bundle = open_bundle(folder)
    record, base = record_of(bundle), LentFile(bundle.base)
    assert bundle.dense is not None
    dense = LentFile(bundle.dense)
    for given, file, message in (
        (b"{", base, "ARGUMENT: "),
        (b"{}", base, "ARGUMENT: 'name': expected a value, got none"),
        (record, dense, "ARGUMENT: .*dense.safetensors: tensor .* is missing"),
        (record.replace(b'"llama"', b'"rwkv"'), base, "UNSUPPORTED: model .* the native engine has no family 'rwkv'"),
    ):
        with pytest.raises(CError, match=rf"^{message}"):
            CEngine.of_files(c_library, given, file)
    for options, message in (
        ({"struct_bytes": 8}, r"struct_bytes: expected 40, got 8"),
        ({"num_threads": 257}, r"num_threads: expected 1 to 256, or 0, got 257"),
        ({"isa": b"z80"}, r"isa: expected auto, .*got 'z80'"),
    ):
        with pytest.raises(CError, match=rf"^ARGUMENT: {message}"):
            CEngine.of_files(c_library, record, base, **options)
    model = CEngine.of_files(c_library, record, base)
    for counts, kind, message in (
        ((64,), "read_ffn", "layers: expected 3, got 1"),
        ((10**6,) * 3, "read_ffn", "neurons of a layer: expected 1 to"),
        (whole(bundle), "read_experts", "experts: expected none, got some"),
    ):
        with pytest.raises(CError, match=rf"^ARGUMENT: {message}"):
            model.read_ffn(record, dense, counts, kind)
    dense.file.data += 4
    with pytest.raises(CError, match=r"^ARGUMENT: .*: expected an address that is a multiple of 64, got another$"):
        model.read_ffn(record, dense, whole(bundle))
    assert (base.num_released, dense.num_released) == (0, 0)


def test_an_ffn_of_another_model_is_not_used(
    tiny_bundle: Callable[..., Path], engine_in_c: Callable[..., CEngine]
) -> None:
    model = engine_in_c(tiny_bundle("llama"))
    mixture = engine_in_c(tiny_bundle("mixtral", quantize="int4"))
    expected = logits_of(model)
    with pytest.raises(CError, match=r"^ARGUMENT: .*expected"):
        model.use_ffn(mixture.pack(DENSE))
    for got, wanted in zip(logits_of(model), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
