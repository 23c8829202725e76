"""A table that a GGUF file holds twice, as embedding and as head in other bits."""

from pathlib import Path
from typing import TypeAlias

import gguf
import numpy as np
import pytest
import torch
from coreinfer.compiler.models.gguf.parts import read_parts
from coreinfer.compiler.models.gguf.tying import EMBEDDING, HEAD, table_of
from coreinfer.compiler.models.gguf.values import read_rows, read_tensor

from .gguf_factory import Contents, contents, tiny_config, tiny_model, write
from .loading import load

Q: TypeAlias = gguf.GGMLQuantizationType


def twice(embedding: Q, head: Q) -> Contents:
    """A tied Qwen 2 whose table stands in the file in two types."""
    what = contents(tiny_model(tiny_config("qwen2", tie_word_embeddings=True)), Q.Q8_0)
    what.tensors[HEAD] = what.tensors[EMBEDDING]
    what.kinds |= {EMBEDDING: embedding, HEAD: head}
    return what


@pytest.mark.parametrize(
    ("embedding", "head", "kept"),
    [
        (Q.Q5_0, Q.Q8_0, HEAD),
        (Q.Q4_0, Q.Q8_0, HEAD),
        (Q.Q4_1, Q.F16, HEAD),
        (Q.Q8_0, Q.Q5_1, EMBEDDING),
        (Q.Q8_0, Q.Q8_0, EMBEDDING),
    ],
)
def test_two_roundings_of_one_table_are_one(embedding: Q, head: Q, kept: str, tmp_path: Path) -> None:
    (path,) = write(tmp_path / "model.gguf", twice(embedding, head))
    header = read_parts(path)
    assert table_of(header) == kept
    loaded = load(path)
    assert loaded.record.tied_head
    weights = loaded.model.get_input_embeddings().weight  # type: ignore[operator]
    assert weights is loaded.model.get_output_embeddings().weight  # type: ignore[operator]
    assert torch.equal(weights, torch.from_numpy(read_tensor(header.tensors[kept]).astype(np.float32)))


def test_a_head_that_was_trained_is_another_table(tmp_path: Path) -> None:
    what = twice(Q.Q5_0, Q.Q8_0)
    head = what.tensors[HEAD].copy()
    head[-1, -32:] *= 1.25  # one group of the last row is enough
    what.tensors[HEAD] = head
    (path,) = write(tmp_path / "model.gguf", what)
    assert table_of(read_parts(path)) is None
    assert not load(path).record.tied_head


def test_types_of_unknown_error_are_left_alone(tmp_path: Path) -> None:
    what = contents(tiny_model(tiny_config("qwen2", tie_word_embeddings=True, hidden_size=256)))
    what.tensors[HEAD] = what.tensors[EMBEDDING]
    what.kinds |= {EMBEDDING: Q.TQ2_0}
    (path,) = write(tmp_path / "model.gguf", what)
    assert table_of(read_parts(path)) is None


def test_a_file_that_was_written_again_is_compared_again(tmp_path: Path) -> None:
    what, path = twice(Q.Q8_0, Q.Q8_0), tmp_path / "model.gguf"
    write(path, what)
    assert table_of(read_parts(path)) == EMBEDDING
    what.tensors[HEAD] = what.tensors[HEAD][::-1].copy()
    write(path, what)
    assert table_of(read_parts(path)) is None


def test_rows_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "model.gguf", twice(Q.Q5_0, Q.F16))
    for name in (EMBEDDING, HEAD, "blk.0.ffn_up.weight"):
        entry = read_parts(path).tensors[name]
        assert np.array_equal(read_rows(entry, slice(10, 20)), read_tensor(entry)[10:20])
