"""Work that needs no model, on Ray Data: its tasks run beside the workers, and what they return comes in order.

Workers hold all CPUs that a compile asks Ray for, and have nothing to do meanwhile. So tasks ask for none: one that
asked for a part of a CPU would wait for as long as the workers live. For the same reason files are not read by Ray
Data's own `read_parquet`, which looks at them in tasks that ask for CPUs, whatever its reading is told to ask for.
"""

import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
from coreinfer.bundles.errors import ConfigError, CoreInferError
from coreinfer.bundles.shared.ray_cluster import data_context
from ray.exceptions import RayError, RayTaskError

__all__ = ["ray_stream"]

Item = TypeVar("Item")
T = TypeVar("T")
_Columns = dict[str, Any]
"""A batch of Ray Data: of each column its rows."""

_FIRST_ITEMS = 16
"""That are asked for at once; then twice as many, and so on: who stops early has not asked for much more."""

_TASKS_OF_PROCESS = 4
"""At least, so that processes end at about the same time."""
_ITEMS_OF_TASK = 16
"""At most. A task costs a tenth of a second."""


def ray_stream(
    task: Callable[..., T], items: Iterable[Item], arguments: Sequence[object], *, num_at_once: int
) -> Generator[T, None, None]:
    """Run a task on items; see `Team.stream`. Of a process that dies Ray asks its items again.

    Args:
        num_at_once: items.
    Raises:
        CoreInferError: the task raised it, of the first item in order.
        ConfigError: tasks cannot be kept running.
    """
    coming, num_items = iter(items), _FIRST_ITEMS
    # Large, and the same for all: a process fetches them once.
    work = ray.put((task, *arguments))
    while asked := list(islice(coming, num_items)):
        yield from _streamed(work, asked, num_at_once)
        num_items *= 2


def _streamed(work: Any, items: Sequence[object], num_at_once: int) -> Generator[Any, None, None]:
    rows = [{"item": pickle.dumps(item)} for item in items]
    num_tasks = min(len(rows), max(num_at_once * _TASKS_OF_PROCESS, -(-len(rows) // _ITEMS_OF_TASK)))
    with ray.data.DataContext.current(data_context(in_order=True)):
        results = ray.data.from_items(rows, override_num_blocks=num_tasks).map_batches(
            _run,
            fn_args=(work,),
            batch_size=None,
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=num_at_once),
        )
        batches = results.iter_batches(batch_size=None, batch_format="numpy")
    try:
        for batch in batches:
            for pickled in batch["result"]:
                result = pickle.loads(pickled)
                if isinstance(result, CoreInferError):
                    raise result
                yield result
    except RayError as error:
        if isinstance(error, RayTaskError):
            raise
        raise ConfigError(f"--ray: a task cannot be kept running ({' '.join(str(error).split())})") from error


def _run(batch: _Columns, work: Any) -> Iterator[_Columns]:
    """Run the task on items. Errors that are told are results too: nothing of them is lost on the way."""
    task, *arguments = _fetched(work)
    for item in batch["item"]:
        try:
            result: Any = task(pickle.loads(item), *arguments)
        except CoreInferError as error:
            result = error
        yield {"result": np.array([pickle.dumps(result)], dtype=object)}


@lru_cache(maxsize=1)
def _fetched(work: Any) -> Any:
    return ray.get(work)
