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

_Keep = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
"""Keeps tensors for a while, and returns them as they are kept."""


@dataclass(frozen=True, kw_only=True)
class ReferenceText:
    """A text that the dense model has read.

    Attributes:
        token_ids: (1, tokens).
        start: where narrow decoding starts.
        logits: (tokens - start - 1, vocabulary) of the dense model with its own weights, in its dtype.
        keys_values: of each layer, (1, heads, start, head size) both; the model's that narrow decoding follows.
    """

    token_ids: torch.Tensor
    start: int
    logits: torch.Tensor
    keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]

    def cache(self) -> DynamicCache:
        """Keys and values of the first half, to which a run may add its own."""
        cache, device = DynamicCache(), self.token_ids.device
        for layer, (keys, values) in enumerate(self.keys_values):
            cache.update(keys.to(device), values.to(device), layer)
        return cache

    def compare(self, logits: torch.Tensor, number: int) -> Tally:
        """Compare another model's predictions of the second half.

        Args:
            logits: (tokens - start - 1, vocabulary).
            number: of the text.
        """
        targets = self.token_ids[0, self.start + 1 :]
        return compare_logits(self.logits.to(logits.device), logits, targets, number)


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
                text = _dense_pass(loaded, token_ids)
                # Of a stored model, keys and values are read below.
                halves = text.keys_values if stored is None else ()
                read.append(replace(text, logits=keep([text.logits])[0], keys_values=halves))
                advance()
            if stored is not None:
                read = _read_stored(loaded, stored, read, keep, tally, advance)
            else:
                for number, text in enumerate(read):
                    tally.add(text.compare(text.logits, number))
        yield Reference(texts=read, dense=tally.score("dense"))


def as_stored(stored: StoredModel | None) -> AbstractContextManager[None]:
    """Run the block with a stored model's matrices in the place of the model's own, but for the FFN."""
    return nullcontext() if stored is None else base_in_use(stored)


def _dense_pass(loaded: LoadedModel, token_ids: Sequence[int]) -> ReferenceText:
    ids = torch.tensor([list(token_ids)], device=loaded.device)
    start, cache = split_point(len(token_ids)), DynamicCache()
    logits = loaded.head(loaded.states(ids, cache)[0, start:-1])
    # Copies: a view of the first half would hold on to the whole.
    halves = [(keys[:, :, :start].clone(), values[:, :, :start].clone()) for keys, values, *_ in cache]
    return ReferenceText(token_ids=ids, start=start, logits=logits, keys_values=halves)


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
            own = _dense_pass(loaded, text.token_ids[0].tolist())
            tally.add(text.compare(own.logits, number))
            kept = iter(keep([half for halves in own.keys_values for half in halves]))
            read.append(replace(text, keys_values=list(zip(kept, kept, strict=True))))
            advance()
    return read


@contextmanager
def _storage(stored: StoredModel | None) -> Iterator[_Keep]:
    """Make a function that keeps tensors in a file beside the stored model, or in memory where there is none."""
    if stored is None:
        yield list
        return
    with disk_errors(stored.target):
        folder = TemporaryDirectory(dir=stored.folder, prefix="reference-")
    with folder as root:
        numbers = count()

        def keep(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            with disk_errors(stored.target):
                return _mapped(tensors, Path(root) / str(next(numbers)))

        yield keep


def _mapped(tensors: Sequence[torch.Tensor], path: Path) -> list[torch.Tensor]:
    """Write tensors to a file and map it: the system may drop from memory what is not in use."""
    starts = []
    with path.open("wb") as file:
        for tensor in tensors:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            starts.append(file.tell())
            file.write(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    if not path.stat().st_size:
        return [tensor.cpu() for tensor in tensors]
    mapped = torch.frombuffer(map_file(path), dtype=torch.uint8)
    return [
        mapped[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]
