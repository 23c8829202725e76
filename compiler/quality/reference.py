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

from .stored import StoredModel, base_in_use, dense_cut
from .tally import Tally, compare_logits
from .together import Batches, batch_texts, dense_logits, narrow_logits

__all__ = ["PlaceTexts", "Reference", "ReferenceText", "as_stored", "read_reference", "tallies_of", "texts_of"]

_STAGE = "reference"

_ALIGNMENT = 64

Kept = Callable[[], list[torch.Tensor]]
"""Returns tensors that are kept: mapped from their file, as long as they are in use."""


@dataclass(frozen=True, kw_only=True)
class ReferenceText:
    """A text that the dense model has read.

    Attributes:
        token_ids: of the whole text.
        start: where narrow decoding starts.
        logits: (tokens - start - 1, vocabulary) of the dense model with its own weights, in its dtype; one tensor.
        keys_values: of each layer keys and then values, (1, heads, start, head size) both; of the model that narrow
            decoding follows.
    """

    token_ids: Sequence[int]
    start: int
    logits: Kept
    keys_values: Kept

    def compare(self, logits: torch.Tensor, number: int) -> Tally:
        """Compare another model's predictions of the second half.

        Args:
            logits: (tokens - start - 1, vocabulary).
            number: of the text.
        """
        (dense,) = self.logits()
        targets = torch.tensor(self.token_ids[self.start + 1 :], device=logits.device)
        return compare_logits(dense.to(logits.device), logits, targets, number)


@dataclass(frozen=True, kw_only=True)
class PlaceTexts:
    """One place's texts, as they are sent there.

    Attributes:
        key: no other texts have it.
        token_ids: number of a text -> its token ids.
        batches: texts that are decoded together, which are the same wherever they are.
        stored: the dense model as it is stored; None for the model's own weights.
        folder: for files, of a stored model; None to keep all in memory.
    """

    key: str
    token_ids: Mapping[int, Sequence[int]]
    batches: Batches
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
        dealt = _deal_batches(team, texts, labels)
        numbers = {place: sorted(number for batch in batches for number in batch) for place, batches in dealt.items()}
        places = {
            place: team.share(
                PlaceTexts(
                    key=key,
                    token_ids={n: tuple(texts[n]) for n in numbers[place]},
                    batches=batches,
                    stored=stored,
                    folder=folder,
                )
            )
            for place, batches in dealt.items()
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


def _deal_batches(
    team: Team, texts: Sequence[Sequence[int]], labels: npt.NDArray[np.int64] | None
) -> Mapping[int, Batches]:
    """Deal texts to places, batch by batch."""
    lengths = [len(ids) for ids in texts]
    batches = batch_texts(lengths, labels, team.loaded.record.vocab_size)
    tokens = [sum(lengths[number] for number in batch) for batch in batches]
    of_batches = None if labels is None else np.array([labels[batch[0]] for batch in batches], dtype=np.int64)
    return {place: [batches[i] for i in ids] for place, ids in deal(tokens, team, of_batches).items()}


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


def tallies_of(
    loaded: LoadedModel, texts: Mapping[int, ReferenceText], batches: Batches, advance: Advance
) -> dict[int, Tally]:
    """Decode the second halves of some texts with what the model has in use now: number of a text -> its tally."""
    tallies = {}
    for batch in batches:
        own = [texts[number] for number in batch]
        second_halves = [text.token_ids[text.start :] for text in own]
        found = narrow_logits(loaded, second_halves, [text.keys_values() for text in own])
        for number, logits in zip(batch, found, strict=True):
            tallies[number] = texts[number].compare(logits, number)
        advance(len(batch))
    return tallies


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
    for number, (logits, halves) in _dense_passes(loaded, own, advance):
        token_ids = own.token_ids[number]
        texts[number] = ReferenceText(
            token_ids=token_ids,
            start=split_point(len(token_ids)),
            logits=_keep(own, f"{number}.logits", [logits]),
            # Of a stored model, keys and values are read below.
            keys_values=list if own.stored else _keep(own, f"{number}.keys", halves),
        )
    if own.stored is None:
        return _Read(
            texts=texts, tallies={number: text.compare(text.logits()[0], number) for number, text in texts.items()}
        )
    with base_in_use(loaded, own.stored), ffn_in_use(loaded, dense_cut(loaded, own.stored), 0):
        for number, (logits, halves) in _dense_passes(loaded, own, advance):
            tallies[number] = texts[number].compare(logits, number)
            texts[number] = replace(texts[number], keys_values=_keep(own, f"{number}.keys", halves))
    return _Read(texts=texts, tallies=tallies)


def _dense_passes(
    loaded: LoadedModel, own: PlaceTexts, advance: Advance
) -> Iterator[tuple[int, tuple[torch.Tensor, list[torch.Tensor]]]]:
    """Number of each text, logits of its second half, and keys and values of its first, as `ReferenceText` has them.

    A place's texts of like length are read together, whatever their clusters: less is padding.
    """
    numbers = sorted(own.token_ids)
    lengths = [len(own.token_ids[number]) for number in numbers]
    for members in batch_texts(lengths, None, loaded.record.vocab_size):
        batch = [numbers[member] for member in members]
        texts = [own.token_ids[number] for number in batch]
        yield from zip(batch, dense_logits(loaded, texts, [split_point(len(text)) for text in texts]), strict=True)
        advance(len(batch))


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
