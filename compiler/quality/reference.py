"""Stage `reference`: what narrow models are compared with, read once and kept in files.

A compile that aims at a quality scores packs several times on the same texts. What the dense model predicts on their
second halves, and the keys and values of their first halves, are the same each time; they stay where they were read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.manifest import Score
from coreinfer.bundles.pages import map_file
from coreinfer.bundles.writer import disk_errors
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.swapping import ffn_in_use
from coreinfer.compiler.progress import Advance, Progress, ignore_steps
from coreinfer.compiler.team.dealing import deal
from coreinfer.compiler.team.steps import Steps
from coreinfer.compiler.team.team import Shared, Team, Worker, forget
from coreinfer.compiler.text.corpus import split_point
from transformers import DynamicCache

from .stored import StoredModel, base_in_use, dense_cut
from .tally import Tally, compare_logits

__all__ = ["PlaceTexts", "Reference", "ReferenceText", "as_stored", "read_reference", "texts_of"]

_STAGE = "reference"

_ALIGNMENT = 64

Kept = Callable[[], list[torch.Tensor]]
"""Returns tensors that are kept: mapped from their file, as long as they are in use."""


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
class PlaceTexts:
    """One place's texts, as they are sent there.

    Attributes:
        key: no other texts have it.
        token_ids: number of a text -> its token ids.
        stored: the dense model as it is stored; None for the model's own weights.
        folder: for files, of a stored model; None to keep all in memory.
    """

    key: str
    token_ids: Mapping[int, Sequence[int]]
    stored: StoredModel | None
    folder: Path | None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Texts that the dense model has read.

    Attributes:
        places: place -> its texts.
        numbers: place -> numbers of its texts.
        dense: the score of the dense model as it is stored.
    """

    places: Mapping[int, Shared[PlaceTexts]]
    numbers: Mapping[int, Sequence[int]]
    dense: Score

    @property
    def num_texts(self) -> int:
        """Texts of all places."""
        return sum(map(len, self.numbers.values()))


@contextmanager
def read_reference(
    team: Team,
    texts: Sequence[Sequence[int]],
    progress: Progress,
    stored: StoredModel | None = None,
    labels: npt.NDArray[np.int64] | None = None,
) -> Iterator[Reference]:
    """Read texts with the dense model.

    Args:
        texts: token ids of each.
        labels: (texts,) clusters, by which texts are dealt: each place then needs its own clusters' packs, for packs
            that are scored by these. None to deal them as they come.
        stored: the dense model as stored there is scored, and narrow decoding follows its keys and values. Logits, keys
            and values are kept in files beside it for the time of the block. None for the model's own weights, in
            memory.
    Raises:
        BundleError: the disk cannot take them.
    """
    key = uuid4().hex
    with _folder(stored) as folder:
        numbers = {place: ids.tolist() for place, ids in deal([len(ids) for ids in texts], team, labels).items()}
        places = {
            place: team.share(
                PlaceTexts(key=key, token_ids={n: tuple(texts[n]) for n in own}, stored=stored, folder=folder)
            )
            for place, own in numbers.items()
        }
        num_steps = (1 if stored is None else 2) * len(texts)
        with progress.stage(_STAGE, num_steps) as advance:
            steps, tally = Steps(advance), Tally()
            asked = [team.call(place, _STAGE, _read_place, own, steps) for place, own in places.items()]
            found = {number: text for waiting in asked for number, text in waiting.result().items()}
            steps.reach(num_steps)
        for number in range(len(texts)):
            tally.add(found[number])
        try:
            yield Reference(places=places, numbers=numbers, dense=tally.score("dense"))
        finally:
            forget(team, _STAGE, _slot(key))


@contextmanager
def _folder(stored: StoredModel | None) -> Iterator[Path | None]:
    """Make a folder beside the stored model, for the time of the block."""
    if stored is None:
        yield None
        return
    with disk_errors(stored.target):
        folder = TemporaryDirectory(dir=stored.folder, prefix="reference-")
    with folder as root:
        yield Path(root)


def as_stored(loaded: LoadedModel, stored: StoredModel | None) -> AbstractContextManager[None]:
    """Run the block with a stored model's matrices in the place of the model's own, but for the FFN."""
    return nullcontext() if stored is None else base_in_use(loaded, stored)


def _slot(key: str) -> str:
    return f"reference {key}"


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What a worker has read: number of a text -> the text, and how far the stored dense model is from the model."""

    texts: Mapping[int, ReferenceText]
    tallies: Mapping[int, Tally]


def _read_place(worker: Worker, shared: Shared[PlaceTexts], advance: Advance) -> Mapping[int, Tally]:
    own = shared.value()
    return worker.recall(_slot(own.key), own.key, partial(_read, worker.loaded, own, advance)).tallies


def texts_of(worker: Worker, shared: Shared[PlaceTexts]) -> Mapping[int, ReferenceText]:
    """A place's texts by their numbers, which its worker has read, or reads now if it replaces the one that had."""
    own = shared.value()
    return worker.recall(_slot(own.key), own.key, partial(_read, worker.loaded, own, ignore_steps)).texts


@torch.inference_mode()
def _read(loaded: LoadedModel, own: PlaceTexts, advance: Advance) -> _Read:
    texts, tallies = {}, {}
    for number, token_ids in own.token_ids.items():
        logits, halves = _dense_pass(loaded, token_ids)
        ids = torch.tensor([list(token_ids)], device=loaded.device)
        texts[number] = ReferenceText(
            token_ids=ids,
            start=split_point(len(token_ids)),
            logits=_keep(own, f"{number}.logits", [logits]),
            # Of a stored model, keys and values are read below.
            keys_values=list if own.stored else _keep(own, f"{number}.keys", halves),
        )
        advance()
    if own.stored is None:
        return _Read(
            texts=texts, tallies={number: text.compare(text.logits()[0], number) for number, text in texts.items()}
        )
    with base_in_use(loaded, own.stored), ffn_in_use(loaded, dense_cut(loaded, own.stored), 0):
        for number, token_ids in own.token_ids.items():
            logits, halves = _dense_pass(loaded, token_ids)
            tallies[number] = texts[number].compare(logits, number)
            texts[number] = replace(texts[number], keys_values=_keep(own, f"{number}.keys", halves))
            advance()
    return _Read(texts=texts, tallies=tallies)


def _dense_pass(loaded: LoadedModel, token_ids: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of the second half, and keys and values of the first, as `ReferenceText` has them."""
    ids = torch.tensor([list(token_ids)], device=loaded.device)
    start, cache = split_point(len(token_ids)), DynamicCache()
    logits = loaded.head(loaded.states(ids, cache)[0, start:-1])
    # Copies: a view of the first half would hold on to the whole.
    halves = [half[:, :, :start].clone() for keys, values, *_ in cache for half in (keys, values)]
    return logits, halves


def _keep(own: PlaceTexts, name: str, tensors: Sequence[torch.Tensor]) -> Kept:
    """Keep tensors in a file beside the stored model, or in memory where there is none."""
    if own.stored is None or own.folder is None:
        return lambda: list(tensors)
    with disk_errors(own.stored.target):
        return _in_file(tensors, own.folder / name)


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
