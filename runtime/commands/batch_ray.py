"""`coreinfer-run --batch --ray`: pieces of the file are answered by engines in processes of Ray Data's.

A piece is a place in the file, not its text. Each engine reads its lines and answers them as a lone one would, so that
the file of answers has the same lines, and either way goes on where the other was interrupted.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from coreinfer.bundles.remote.opening import find_bundle
from coreinfer.bundles.shared.machine import usable_cores
from coreinfer.bundles.shared.ray_cluster import data_context, on_ray
from coreinfer.bundles.shared.ray_options import RayOptions
from coreinfer.runtime.engine import load_engine
from coreinfer.runtime.load_options import LoadOptions
from coreinfer.runtime.options import GenerationOptions

from .batch_answering import Done, answer_lines
from .batch_file import Skipped, salt_of, write_answers
from .batch_lines import Place, placed_lines, read_piece
from .batch_output import AnswerFile, digest_of

__all__ = ["answer_file_on_ray"]

_MAX_PIECE_LINES = 256
_PIECES_OF_ENGINE = 4
"""At least, so that engines end at about the same time."""

Columns = dict[str, Any]
"""A batch of Ray Data: a numpy array for each column."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What an engine must know to answer pieces."""

    bundle_dir: Path
    loading: LoadOptions
    options: GenerationOptions
    source: Path
    salt: str


def answer_file_on_ray(
    bundle_dir: Path, loading: LoadOptions, options: GenerationOptions, on: RayOptions, source: Path, target: Path
) -> None:
    """Answer a batch file with engines on Ray; see `batch_file.answer_file`.

    Args:
        bundle_dir, source: must be at the same paths on each machine of Ray's.
    """
    assert on.ray is not None
    task = _Task(
        # Each engine finds what is at an address by itself.
        bundle_dir=bundle_dir.resolve() if bundle_dir.exists() else bundle_dir,
        loading=loading,
        options=options,
        source=source.resolve(),
        salt=salt_of(find_bundle(bundle_dir).folder, loading.mode, options),
    )
    num_cpus = loading.threads or usable_cores()
    # One more than the engines need, for what Ray Data itself does.
    with on_ray(on.ray, num_cpus=on.replicas * num_cpus + 1):

        def answer(answers: AnswerFile, num_left: int, skipped: Skipped) -> Iterator[Done]:
            size = max(1, min(_MAX_PIECE_LINES, -(-num_left // (on.replicas * _PIECES_OF_ENGINE))))
            pieces = list(_pieces(source, answers, skipped, size))
            return _answered(task, pieces, on.replicas, num_cpus) if pieces else iter(())

        write_answers(task.salt, source, target, answer)


def _pieces(source: Path, answers: AnswerFile, skipped: Skipped, size: int) -> Iterator[str]:
    """Cut what is not answered yet into pieces of so many lines: their places, as JSON."""
    places: list[Place] = []
    for place, line in placed_lines(source):
        if answers.has(line):
            skipped()
            continue
        places.append(place)
        if len(places) == size:
            yield json.dumps(places)
            places = []
    if places:
        yield json.dumps(places)


def _answered(task: _Task, pieces: list[str], num_engines: int, num_cpus: int) -> Iterator[Done]:
    """Have pieces answered; an engine whose process dies is started again, and its piece is answered again."""
    rows = [{"piece": piece} for piece in pieces]
    with ray.data.DataContext.current(data_context(in_order=False)):
        answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Engine,
            fn_constructor_args=(task,),
            batch_size=1,
            concurrency=min(num_engines, len(rows)),
            num_cpus=num_cpus,
            num_gpus=1 if task.loading.device.startswith("cuda") else 0,
        )
    for batch in answered.iter_batches(batch_size=None, batch_format="numpy"):
        for result, failed, num_tokens in zip(batch["result"], batch["failed"], batch["num_tokens"], strict=True):
            yield Done(result=json.loads(result), failed=bool(failed), num_tokens=int(num_tokens))


class _Engine:
    """An engine in a process of its own."""

    def __init__(self, task: _Task) -> None:
        self._task = task
        self._engine = load_engine(task.bundle_dir, task.loading)

    def __call__(self, batch: Columns) -> Columns:
        """Answer a piece. What it became comes as a whole: in another try its answers may end in another order."""
        task = self._task
        lines = read_piece(task.source, json.loads(batch["piece"][0]))
        found = list(answer_lines(self._engine, task.options, lines, lambda line: digest_of(task.salt, line)))
        return {
            "result": np.array([json.dumps(done.result, ensure_ascii=False) for done in found], dtype=object),
            "failed": np.array([done.failed for done in found]),
            "num_tokens": np.array([done.num_tokens for done in found]),
        }
