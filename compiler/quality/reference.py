"""Stage `reference`: what narrow models are compared with, read once and kept in files.

A compile that aims at a quality scores packs several times on the same texts. What the dense model predicts on their
second halves, and the keys and values of their first halves, are the same each time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from coreinfer.bundles.manifest import Score
from coreinfer.bundles.pages import map_file
from coreinfer.bundles.writer import disk_errors
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.progress import Advance, Progress
from coreinfer.compiler.text.corpus import split_point
from transformers import DynamicCache

from .stored import StoredModel, base_in_use, dense_cut
from .tally import Tally, compare_logits

__all__ = ["Reference", "ReferenceText", "as_stored", "read_reference"]

_ALIGNMENT = 64

Kept = Callable[[], list[torch.Tensor]]
"""Returns tensors that are kept: mapped from their file, as long as they are in use."""
_Keep = Callable[[Sequence[torch.Tensor]], Kept]


@dataclass(frozen=True, kw_only=True)
class ReferenceText:
    """A text that the dense model has read.

    Attributes:
        token_ids: (1, tokens).
        start: where narrow decoding starts.
        logits: (tokens - start - 1, vocabulary) of the dense model with its own weights, in its dtype; one tensor.
        keys_values: of each layer keys and then values, (1, heads, start, head size) both; of the model that narrow
            decoding follows.
    """

    token_ids: torch.Tensor
    start: int
    logits: Kept
    keys_values: Kept

    def cache(self) -> DynamicCache:
        """Keys and values of the first half, to which a run may add its own."""
        cache, device = DynamicCache(), self.token_ids.device
        halves = iter(self.keys_values())
        for layer, (keys, values) in enumerate(zip(halves, halves, strict=True)):
            cache.update(keys.to(device), values.to(device), layer)
        return cache

    def compare(self, logits: torch.Tensor, number: int) -> Tally:
        """Compare another model's predictions of the second half.

        Args:
            logits: (tokens - start - 1, vocabulary).
            number: of the text.
        """
        targets, (dense,) = self.token_ids[0, self.start + 1 :], self.logits()
        return compare_logits(dense.to(logits.device), logits, targets, number)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Texts that the dense model has read.

    Attributes:
        texts: in the order in which they were given.
        dense: the score of the dense model as it is stored.
    """

    texts: Sequence[ReferenceText]
    dense: Score


@contextmanager
def read_reference(
    loaded: LoadedModel,
    texts: Sequence[Sequence[int]],
    progress: Progress,
    stored: StoredModel | None = None,
) -> Iterator[Reference]:
    """Read texts with the dense model.

    Args:
        texts: token ids of each.
        stored: the dense model as stored there is scored, and narrow decoding follows its keys and values. Logits, keys
            and values are kept in files beside it for the time of the block. None for the model's own weights, in
            memory.
    Raises:
        BundleError: the disk cannot take them.
    """
    tally = Tally()
    with _storage(stored) as keep:
        with progress.stage("reference", (1 if stored is None else 2) * len(texts)) as advance, torch.inference_mode():
            read = []
            for token_ids in texts:
                logits, halves = _dense_pass(loaded, token_ids)
                # Of a stored model, keys and values are read below.
                read.append(_text(loaded, token_ids, keep([logits]), keep(halves) if stored is None else list))
                advance()
            if stored is not None:
                read = _read_stored(loaded, stored, read, keep, tally, advance)
            else:
                for number, text in enumerate(read):
                    tally.add(text.compare(text.logits()[0], number))
        yield Reference(texts=read, dense=tally.score("dense"))


def as_stored(stored: StoredModel | None) -> AbstractContextManager[None]:
    """Run the block with a stored model's matrices in the place of the model's own, but for the FFN."""
    return nullcontext() if stored is None else base_in_use(stored)


def _text(loaded: LoadedModel, token_ids: Sequence[int], logits: Kept, keys_values: Kept) -> ReferenceText:
    ids = torch.tensor([list(token_ids)], device=loaded.device)
    return ReferenceText(token_ids=ids, start=split_point(len(token_ids)), logits=logits, keys_values=keys_values)


def _dense_pass(loaded: LoadedModel, token_ids: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of the second half, and keys and values of the first, as `ReferenceText` has them."""
    ids = torch.tensor([list(token_ids)], device=loaded.device)
    start, cache = split_point(len(token_ids)), DynamicCache()
    logits = loaded.head(loaded.states(ids, cache)[0, start:-1])
    # Copies: a view of the first half would hold on to the whole.
    halves = [half[:, :, :start].clone() for keys, values, *_ in cache for half in (keys, values)]
    return logits, halves


def _read_stored(
    loaded: LoadedModel,
    stored: StoredModel,
    texts: Sequence[ReferenceText],
    keep: _Keep,
    tally: Tally,
    advance: Advance,
) -> list[ReferenceText]:
    """Score the stored dense model, and take its keys and values."""
    read = []
    with base_in_use(stored), ffn_in_use(loaded, dense_cut(stored), 0):
        for number, text in enumerate(texts):
            logits, halves = _dense_pass(loaded, text.token_ids[0].tolist())
            tally.add(text.compare(logits, number))
            read.append(replace(text, keys_values=keep(halves)))
            advance()
    return read


@contextmanager
def _storage(stored: StoredModel | None) -> Iterator[_Keep]:
    """Make a function that keeps tensors in a file beside the stored model, or in memory where there is none."""
    if stored is None:
        yield lambda tensors: lambda: list(tensors)
        return
    with disk_errors(stored.target):
        folder = TemporaryDirectory(dir=stored.folder, prefix="reference-")
    with folder as root:
        numbers = count()

        def keep(tensors: Sequence[torch.Tensor]) -> Kept:
            with disk_errors(stored.target):
                return _in_file(tensors, Path(root) / str(next(numbers)))

        yield keep


def _in_file(tensors: Sequence[torch.Tensor], path: Path) -> Kept:
    """Write tensors to a file, from which they are mapped each time: what stays mapped would count as in memory."""
    kinds, starts = [(tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors], []
    with path.open("wb") as file:
        for tensor in tensors:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            starts.append(file.tell())
            file.write(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    if not path.stat().st_size:
        return lambda: [torch.empty(shape, dtype=dtype) for dtype, shape, _ in kinds]

    def mapped() -> list[torch.Tensor]:
        whole = torch.frombuffer(map_file(path), dtype=torch.uint8)
        return [
            whole[start : start + num_bytes].view(dtype).view(shape)
            for start, (dtype, shape, num_bytes) in zip(starts, kinds, strict=True)
        ]

    return mapped
