"""The C library beside the Python engine: the same bundles, the same bits; and what it refuses."""

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer.bundles import open_bundle
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.tensors import StoredTensor
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE as DENSE_CHOICE
from coreinfer.runtime.engines.protocol import FfnChoice

from .bundle_factory import as_version_2, change_tensors, edit_manifest, flip_bit
from .c_library import DENSE, ROOT, CError, CModel, build_program, has_compilers, run_program
from .engine_inputs import MAX_POSITIONS
from .model_factory import FAMILIES, MIXTURES, UNLIKE, VOCABULARY

pytestmark = pytest.mark.skipif(not has_compilers(), reason="no C or C++ compiler here")

IDS = np.random.default_rng(5).integers(3, VOCABULARY, 90).tolist()
NUM_READ, NUM_STEPS = 80, 8


@pytest.fixture
def copied(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A llama bundle that may be damaged."""
    return Path(shutil.copytree(tiny_bundle("llama", quantize="int4"), tmp_path / "copy"))


def python_tokens(decoder: NativeDecoder) -> list[int]:
    """What the Python engine says greedily after the first tokens."""
    decoder.truncate(0)
    next_id = int(decoder.forward(IDS[:NUM_READ], greedy=True)[0].argmax())
    chosen = [next_id]
    for _ in range(NUM_STEPS - 1):
        next_id = int(decoder.forward([next_id], greedy=True)[0].argmax())
        chosen.append(next_id)
    return chosen


def c_tokens(model: CModel) -> list[int]:
    model.truncate(0)
    chosen = [model.feed_greedy(IDS[:NUM_READ])]
    while len(chosen) < NUM_STEPS:
        chosen.append(model.feed_greedy(chosen[-1:]))
    return chosen


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "int4") for family in (*FAMILIES, *MIXTURES)),
        *((family, kind) for family in (*UNLIKE, "mixtral") for kind in ("bf16", "int8")),
    ],
)
def test_logits_and_tokens_are_those_of_the_python_engine(
    family: str, kind: str, tiny_bundle: Callable[..., Path], open_in_c: Callable[..., CModel]
) -> None:
    """To the bit: dense and with each pack, a prompt as a block and tokens one by one, also after a truncation."""
    path = tiny_bundle(family, quantize=kind)
    bundle = open_bundle(path)
    decoder, model = NativeDecoder(bundle, threads=2), open_in_c(path, num_threads=2)
    assert model.num_clusters == len(bundle.manifest.clusters) == 4
    seen = set()
    for cluster in (DENSE, *range(model.num_clusters)):
        decoder.use(DENSE_CHOICE if cluster == DENSE else FfnChoice(cluster=cluster))
        model.use(cluster)
        decoder.truncate(0)
        model.truncate(0)
        for part in (IDS[:NUM_READ], *([token_id] for token_id in IDS[NUM_READ:])):
            expected = decoder.forward(part)[0]
            np.testing.assert_array_equal(model.feed(part), expected)
        seen.add(expected.tobytes())
        assert model.num_tokens == decoder.num_cached == len(IDS)
        decoder.truncate(NUM_READ - 30)
        model.truncate(NUM_READ - 30)
        np.testing.assert_array_equal(model.feed(IDS[:9]), decoder.forward(IDS[:9])[0])
        assert c_tokens(model) == python_tokens(decoder)
    # Each pack is its own; clusters may have the same experts.
    assert len(seen) == 1 + model.num_clusters or (family in MIXTURES and len(seen) > 1)


@pytest.mark.parametrize("isa", ["portable", "auto"])
def test_kernels_are_chosen(isa: str, tiny_bundle: Callable[..., Path], open_in_c: Callable[..., CModel]) -> None:
    path = tiny_bundle("qwen3", quantize="int4")
    decoder = NativeDecoder(open_bundle(path), threads=1, isa=isa)
    model = open_in_c(path, isa=isa.encode(), num_threads=1)
    assert (model.isa, model.num_threads) == (decoder.isa, 1)
    np.testing.assert_array_equal(model.feed(IDS), decoder.forward(IDS)[0])


def test_what_a_bundle_says_of_itself(copied: Path, open_in_c: Callable[..., CModel]) -> None:
    manifest = open_bundle(copied).manifest
    model = open_in_c(copied)
    assert (model.vocab_size, model.max_tokens, model.has_dense) == (VOCABULARY, MAX_POSITIONS, 1)
    assert [model.label(c) for c in range(4)] == [cluster.label for cluster in manifest.clusters]
    assert model.label(4) is None
    assert model.label(-1) is None
    assert [token_id for token_id in range(5) if model.is_end(token_id)] == [2]
    assert model.num_threads >= 1


def test_a_bundle_without_the_dense_ffn_begins_with_the_first_pack(
    tiny_bundle: Callable[..., Path], open_in_c: Callable[..., CModel]
) -> None:
    path = tiny_bundle("llama", dense=False)
    decoder, model = NativeDecoder(open_bundle(path), threads=1), open_in_c(path, num_threads=1)
    assert not model.has_dense
    np.testing.assert_array_equal(model.feed(IDS), decoder.forward(IDS)[0])
    with pytest.raises(CError, match=r"^NOT_FOUND: bundle .* has no dense FFN; use a cluster$"):
        model.use(DENSE)
    model.use(3)


def test_the_version_before_is_read(copied: Path, open_in_c: Callable[..., CModel]) -> None:
    expected = open_in_c(copied).feed(IDS)
    with edit_manifest(copied) as data:
        as_version_2(data)
    model = open_in_c(copied)
    np.testing.assert_array_equal(model.feed(IDS), expected)
    model.use(2)


# What it refuses


def test_wrong_arguments(copied: Path, open_in_c: Callable[..., CModel]) -> None:
    for options, message in (
        ({"num_threads": 257}, r"num_threads: expected 1 to 256, or 0, got 257"),
        ({"num_threads": -1}, r"num_threads"),
        ({"isa": b"z80"}, r"isa: expected auto, .*got 'z80'"),
        ({"struct_bytes": 8}, r"struct_bytes: expected 40 or 48, got 8"),
        ({"kv_cache_bytes": 10}, r"kv_cache_bytes: expected at least \d+, got 10"),
    ):
        with pytest.raises(CError, match=rf"^ARGUMENT: {message}"):
            open_in_c(copied, **options)
    model = open_in_c(copied)
    for ids in ([VOCABULARY], [-1], []):
        with pytest.raises(CError, match=r"^ARGUMENT: token id"):
            model.feed(ids)
    for cluster in (4, -2):
        with pytest.raises(CError, match=r"^NOT_FOUND: cluster: expected 0 to 3"):
            model.use(cluster)
    model.feed(IDS[:5])
    for num_tokens in (6, -1):
        with pytest.raises(CError, match=r"^ARGUMENT: num_tokens: expected 0 to 5"):
            model.truncate(num_tokens)
    assert model.num_tokens == 5


def test_there_is_no_more_room_than_there_is(copied: Path, open_in_c: Callable[..., CModel]) -> None:
    model = open_in_c(copied)
    with pytest.raises(CError, match=rf"^NO_ROOM: token ids: expected at most {MAX_POSITIONS} more"):
        model.feed([5] * (MAX_POSITIONS + 1))
    model.feed([5] * MAX_POSITIONS)
    with pytest.raises(CError, match=r"^NO_ROOM"):
        model.feed([5])
    page_bytes = NativeDecoder(open_bundle(copied), threads=1).page_bytes
    small = open_in_c(copied, kv_cache_bytes=page_bytes)
    assert small.max_tokens == 64
    small.feed(IDS[:64])
    with pytest.raises(CError, match=r"^NO_ROOM: KV cache"):
        small.feed([5])
    assert small.num_tokens == 64


def test_no_bundle_and_versions(copied: Path, open_in_c: Callable[..., CModel], tmp_path: Path) -> None:
    for path in (tmp_path / "absent", copied / "manifest.json"):
        with pytest.raises(CError, match=r"^NOT_FOUND: .*manifest\.json: cannot be read"):
            open_in_c(path)
    with edit_manifest(copied) as data:
        data["schema_version"] = 8
    with pytest.raises(CError, match=r"^VERSION: .*schema version 8, this library reads 2 to 7"):
        open_in_c(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "rwkv"}, "UNSUPPORTED: model .* the native engine has no family 'rwkv'"),
        ({"activation": "mish"}, "UNSUPPORTED: activation 'mish': the native engine has silu"),
        ({"hidden_size": 0}, "CORRUPT: .*hidden_size: expected 1 to"),
        ({"hidden_size": "32"}, "CORRUPT: .*'hidden_size': expected a number, got a string"),
        ({"num_heads": 3}, "CORRUPT: .*num_heads: expected a multiple of 2"),
        ({"vocab_size": 385}, r"CORRUPT: .*embed_tokens\.weight.*expected U8 \[25, 1, 256\], got U8 \[24, 1, 256\]"),
        ({"num_layers": 4}, r"CORRUPT: .*layers\.3.*is missing"),
        ({"ffn_bias": True}, r"CORRUPT: .*dense\.safetensors: expected layers\.0\.gate_bias"),
        ({"gated": None}, "CORRUPT: .*'gated': expected a truth value, got null"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_models_that_it_does_not_compute_are_named(
    change: dict[str, Any], message: str, copied: Path, open_in_c: Callable[..., CModel]
) -> None:
    with edit_manifest(copied) as data:
        data["model"] |= change
    with pytest.raises(CError, match=rf"^{message}"):
        open_in_c(copied)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "spiral"}}, "UNSUPPORTED: rotary embeddings 'spiral'"),
        ({"rope_parameters": 5}, "CORRUPT: .*rope_parameters.*an object, got a number"),
        ({"rms_norm_eps": None}, "CORRUPT: .*rms_norm_eps"),
    ],
    ids=["spiral", "number", "null"],
)
def test_settings_that_it_does_not_compute_are_named(
    setting: dict[str, Any], message: str, copied: Path, open_in_c: Callable[..., CModel]
) -> None:
    with edit_manifest(copied) as data:
        data["model"]["config"] |= setting
    with pytest.raises(CError, match=rf"^{message}"):
        open_in_c(copied)


def test_damage_is_found(copied: Path, open_in_c: Callable[..., CModel]) -> None:
    pack = copied / "clusters" / "001.safetensors"
    flip_bit(pack, pack.stat().st_size - 100)
    model = open_in_c(copied)
    model.use(0)
    with pytest.raises(CError, match=r"^CORRUPT: bundle .*001\.safetensors: expected sha256 \w{12}\.\.\., got"):
        model.use(1)
    open_in_c(copied, skip_checksums=1).use(1)
    pack.write_bytes(pack.read_bytes()[:-64])
    with pytest.raises(CError, match=r"^CORRUPT: bundle .*001\.safetensors: expected \d+ bytes, got \d+"):
        open_in_c(copied, skip_checksums=1).use(1)
    pack.unlink()
    with pytest.raises(CError, match=r"^NOT_FOUND: .*001\.safetensors"):
        open_in_c(copied).use(1)


def test_a_base_that_is_not_as_listed(copied: Path, open_in_c: Callable[..., CModel]) -> None:
    def put(tensors: dict[str, StoredTensor]) -> None:
        del tensors["model.norm.weight"]

    change_tensors(copied, LAYOUT.base, put)
    with pytest.raises(CError, match=r"^CORRUPT: .*base\.safetensors: tensor 'model\.norm\.weight' is missing"):
        open_in_c(copied)


@pytest.mark.parametrize("place", ["../../etc/passwd", "/etc/passwd", "clusters/../../x"])
def test_no_file_outside_is_opened(place: str, copied: Path, open_in_c: Callable[..., CModel]) -> None:
    with edit_manifest(copied) as data:
        data["clusters"][1]["file"] = place
        data["files"][place] = {"sha256": "0" * 64, "bytes": 1}
    with pytest.raises(CError, match=r"^CORRUPT: .*expected paths inside the bundle"):
        open_in_c(copied).use(1)


MANIFESTS = {
    "nothing": b"",
    "half": b'{"schema_version": 3',
    "twice": b'{"schema_version": 3, "schema_version": 3}',
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"schema_version": 3, "a": "\xff"}',
    "comma": b'{"schema_version": 3,}',
    "octal": b'{"schema_version": 03}',
    "NaN": b'{"schema_version": NaN}',
    "large": b'{"schema_version": 1e999}',
    "half character": b'{"schema_version": 3, "a": "\\ud800"}',
    "rest": b'{"schema_version": 3} 4',
    "array": b"[3]",
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_that_are_not_json(text: bytes, copied: Path, open_in_c: Callable[..., CModel]) -> None:
    (copied / LAYOUT.manifest).write_bytes(text)
    with pytest.raises(CError, match=r"^CORRUPT: "):
        open_in_c(copied)


def test_any_cut_of_a_file_is_refused(copied: Path, open_in_c: Callable[..., CModel]) -> None:
    """With sizes forged to match, so that the readers themselves must notice."""
    for name in (LAYOUT.base, LAYOUT.dense, LAYOUT.generation):
        whole = (copied / name).read_bytes()
        for length in (1, 7, 8, 9, len(whole) // 2, len(whole) - 65):
            if length < len(whole):
                (copied / name).write_bytes(whole[:length])
                with edit_manifest(copied) as data:
                    data["files"][name]["bytes"] = length
                with pytest.raises(CError, match=r"^CORRUPT: "):
                    open_in_c(copied, skip_checksums=1)
        (copied / name).write_bytes(whole)
        with edit_manifest(copied) as data:
            data["files"][name]["bytes"] = len(whole)
    open_in_c(copied)


def test_two_threads_cannot_share_a_model(copied: Path, open_in_c: Callable[..., CModel]) -> None:
    model = open_in_c(copied, num_threads=1)
    outcomes: list[str] = []

    def work() -> None:
        for _ in range(20):
            try:
                model.feed(IDS[:2])
                model.truncate(0)
                outcomes.append("done")
            except CError as error:
                outcomes.append(str(error).split(":")[0])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "done" in outcomes
    assert set(outcomes) <= {"done", "BUSY"}


# The example


@pytest.fixture(scope="module")
def generate(c_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """examples/generate.c, built by the C compiler."""
    return build_program(c_library, ROOT / "examples/generate.c", tmp_path_factory.mktemp("example") / "generate")


def test_the_example_says_what_the_python_engine_says(generate: Path, copied: Path) -> None:
    decoder = NativeDecoder(open_bundle(copied), threads=1)
    for cluster in (DENSE, 0, 3):
        decoder.use(DENSE_CHOICE)
        decoder.truncate(0)
        logits = decoder.forward(IDS[:7], greedy=True)
        decoder.use(DENSE_CHOICE if cluster == DENSE else FfnChoice(cluster=cluster))
        expected: list[int] = []
        while len(expected) < 12 and 2 not in expected:
            expected.append(int(logits[0].argmax()))
            logits = decoder.forward(expected[-1:], greedy=True)
        done = run_program(generate, copied, cluster, 12, *IDS[:7])
        assert (done.returncode, done.stderr) == (0, "")
        assert [int(line) for line in done.stdout.split()] == expected


def test_the_example_says_what_is_wrong(generate: Path, copied: Path) -> None:
    for arguments, status, message in (
        ((copied, 0), 2, "usage: "),
        ((copied, "x", 3, 5), 2, "error: expected a number, got 'x'"),
        ((copied / "absent", 0, 3, 5), 1, "error: "),
        ((copied, 9, 3, 5), 1, "error: cluster: expected 0 to 3 or COREINFER_DENSE, got 9"),
        ((copied, 0, 3, VOCABULARY), 1, f"error: token id: expected 0 to {VOCABULARY - 1}, got {VOCABULARY}"),
    ):
        done = run_program(generate, *arguments)
        assert (done.returncode, done.stdout) == (status, "")
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_library_shows_its_own_names_only(c_library: Path) -> None:
    """Of the C++ in it only what its standard library shares between libraries."""
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", str(c_library / "lib" / "libcoreinfer.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    names = {line.split()[-1] for line in shown if line and not line.split()[-1].startswith("_Z")}
    headers = "".join(file.read_text(encoding="utf-8") for file in (c_library / "include").iterdir())
    assert names == set(re.findall(r"\b(coreinfer_\w+)\(", headers))
