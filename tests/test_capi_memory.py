"""The C library under a limit of memory: the same bits as without, from a process that holds less."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreinfer.bundles import open_bundle

from .c_library import DENSE, CError, CModel, has_compilers
from .model_factory import MIXTURES, UNLIKE, VOCABULARY
from .page_residency import resident_bytes

pytestmark = pytest.mark.skipif(not has_compilers(), reason="needs a C and a C++ compiler")

PROMPT = np.random.default_rng(5).integers(3, VOCABULARY, 40).tolist()
CACHE = {"num_threads": 2, "kv_cache_bytes": 400_000}


def least_bytes(open_in_c: Callable[..., CModel], bundle: Path) -> int:
    """The smallest limit that a bundle can be open_in_c with, as the refusal of a smaller one says."""
    with pytest.raises(CError, match=r"^ARGUMENT: memory_bytes: expected at least .* got 0\.0; raise it$") as caught:
        open_in_c(bundle, memory_bytes=1, **CACHE)
    return round(1e6 * (float(str(caught.value).split("at least ")[1].split(" MB")[0]) + 0.06))


def all_logits(model: CModel) -> list[Any]:
    """Logits of a block and of single tokens with each FFN in turn, each announced before."""
    rows: list[Any] = []
    for cluster in (DENSE, *range(model.num_clusters), 1, DENSE):
        model.truncate(0)
        model.prepare(cluster)
        rows.append(model.feed(PROMPT))
        model.use(cluster)
        rows += [model.feed([token_id]) for token_id in PROMPT[:4]]
        rows.append(np.float32(model.feed_greedy(PROMPT[:1])))
    return rows


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"quantize": "int4"}),
        *((family, {"quantize": "bf16"}) for family in UNLIKE),
        *((family, {"quantize": "bf16"}) for family in MIXTURES),
        ("gpt_oss", {"quantize": "bf16", "experts": "narrow", "dense": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_logits_are_those_without_a_limit(
    family: str, options: dict[str, Any], tiny_bundle: Callable[..., Path], open_in_c: Callable[..., CModel]
) -> None:
    path = tiny_bundle(family, **options)
    free = open_in_c(path, **CACHE)
    expected = all_logits(free)
    assert free.bytes_read == 0
    least = least_bytes(open_in_c, path)
    reads = []
    for limit in (least, 13 * least // 10, 100_000_000):
        model = open_in_c(path, memory_bytes=limit, **CACHE)
        for _ in range(2):
            for got, wanted in zip(all_logits(model), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)
        reads.append(model.bytes_read)
    assert reads[0] >= reads[2] > 0


def test_pages_of_files_are_let_go(
    tiny_bundle: Callable[..., Path], tmp_path: Path, open_in_c: Callable[..., CModel]
) -> None:
    # A copy, which no other test has in memory.
    path = Path(shutil.copytree(tiny_bundle("llama", quantize="bf16"), tmp_path / "copy"))
    bundle = open_bundle(path, checksums=False)
    assert bundle.dense is not None
    files = (bundle.pack(2), bundle.dense)
    for file in files:
        file.forget()
    model = open_in_c(path, memory_bytes=100_000_000, **CACHE)
    model.use(2)
    model.feed(PROMPT)
    for file in files:
        assert resident_bytes(file) < len(file.mapped_bytes) / 2


def test_a_caller_of_the_first_header_has_no_limit(
    tiny_bundle: Callable[..., Path], open_in_c: Callable[..., CModel]
) -> None:
    """Its options end before memory_bytes, whatever lies there."""
    path = tiny_bundle("llama", quantize="int4")
    model = open_in_c(path, struct_bytes=40, memory_bytes=1, **CACHE)
    model.feed(PROMPT)
    assert model.bytes_read == 0


def test_preparing_says_what_using_says(tiny_bundle: Callable[..., Path], open_in_c: Callable[..., CModel]) -> None:
    model = open_in_c(tiny_bundle("llama", quantize="int4"), memory_bytes=100_000_000, **CACHE)
    for call in (model.prepare, model.use):
        with pytest.raises(CError, match=r"^NOT_FOUND: cluster: expected 0 to 3 or COREINFER_DENSE, got 4$"):
            call(4)
