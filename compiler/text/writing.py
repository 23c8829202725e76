"""Let the model write: the runtime decodes its dense form, many documents in each pass over the weights.

It is the only place of the compiler that uses the runtime. The runtime knows nothing of the compiler.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from coreinfer.bundles.errors import ConfigError, UnsupportedModelError
from coreinfer.bundles.writer import disk_errors
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.progress import Advance
from coreinfer.compiler.team.dealing import home
from coreinfer.compiler.team.steps import Steps
from coreinfer.compiler.team.team import Team, Worker
from coreinfer.runtime import Engine, GenerationOptions, LoadOptions, Token
from coreinfer.runtime.engine import load_engine
from coreinfer.runtime.prompts.requests import Request
from coreinfer.runtime.routing.modes import ModePlan
from coreinfer.runtime.routing.router import Route
from coreinfer.runtime.scheduling import Run, prepare

from .dense_bundle import write_dense_bundle

__all__ = ["Sampling", "continue_prompts", "open_engine", "stored_in_int8", "write_continuations"]

_KV_SHARE = 1 / 4
"""Share of `max_memory` for keys and values."""
_NOWHERE = Route(cluster=0, distance=0.0, margin=1.0, familiar=True)
_DENSE = ModePlan(mode="dense")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How texts are continued.

    Attributes:
        num_new: maximum number of tokens of a continuation.
        seed: each document draws with a seed of its own, made of this one and its number.
    """

    num_new: int
    temperature: float
    top_p: float
    seed: int


@contextmanager
def stored_in_int8(config: CompileConfig, loaded: LoadedModel, folder: Path) -> Iterator[Path]:
    """Store the model in int8 in a folder of its own, for the time of the block.

    Raises:
        BundleError: the disk cannot take the files.
    """
    with disk_errors(config.output):
        scratch = TemporaryDirectory(dir=folder, prefix="writing-")
    with scratch as name:
        with disk_errors(config.output):
            write_dense_bundle(Path(name), loaded)
        yield Path(name)


def continue_prompts(
    config: CompileConfig,
    team: Team,
    stored: Path,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    advance: Advance,
) -> list[list[int]]:
    """Continue prompts, given as token ids, until the model ends the text; the end is part of it.

    All places write. Models that the native engine does not compute are run by the torch engine, which is slower.

    Args:
        stored: of `stored_in_int8`.
        advance: called with each continuation that is complete.
    Returns:
        New token ids of each prompt.
    Raises:
        ConfigError: `max_memory` leaves no room for a document, or for the torch engine's weights.
    """
    steps, asked = Steps(advance), []
    numbers = range(len(prompts))
    for place in range(team.size):
        own = {number: prompts[number] for number in numbers if home(team, number) == place}
        asked.append(team.call(place, "corpus", _write, config, stored, own, sampling, steps))
    written = {number: ids for waiting in asked for number, ids in waiting.result().items()}
    steps.reach(len(prompts))
    return [written[number] for number in numbers]


def _write(
    _worker: Worker,
    config: CompileConfig,
    stored: Path,
    prompts: Mapping[int, Sequence[int]],
    sampling: Sampling,
    advance: Advance,
) -> dict[int, list[int]]:
    return write_continuations(open_engine(config, stored), prompts, sampling, advance)


def open_engine(config: CompileConfig, stored: Path) -> Engine:
    """Open what `stored_in_int8` stored with the runtime.

    Raises:
        ConfigError: `max_memory` leaves no room for a document, or for the torch engine's weights.
    """
    engine = _open(config, stored)
    if engine.loaded.max_tokens < config.document_tokens:
        raise ConfigError(
            f"--calibration builtin: expected memory for the keys and values of {config.document_tokens} tokens, a "
            f"document, got room for {engine.loaded.max_tokens}; raise --max-memory, or lower --document-tokens"
        )
    return engine


def _open(config: CompileConfig, folder: Path) -> Engine:
    bounded = config.max_memory is not None
    options = LoadOptions(
        mode="dense",
        engine="native" if bounded else "auto",
        device="cpu",
        threads=config.threads,
        kv_cache_mb=config.max_memory * 1e3 * _KV_SHARE if config.max_memory is not None else None,
    )
    try:
        return load_engine(folder, options)
    except UnsupportedModelError as error:
        if not bounded:
            raise
        raise ConfigError(
            "--max-memory, --calibration builtin: the native engine cannot write with this model, and the torch engine "
            "would load all of its weights; give text with --calibration FILE, or leave out --max-memory"
        ) from error


def write_continuations(
    engine: Engine, prompts: Mapping[int, Sequence[int]], sampling: Sampling, advance: Advance
) -> dict[int, list[int]]:
    """Continue prompts, given by their numbers as token ids, until the model ends the text; the end is part of it.

    A continuation depends on its prompt, its number, the seed, and the number of threads, by which the native engine
    divides its sums; not on what else is written.

    Args:
        advance: called with each continuation that is complete.
    Returns:
        New token ids of each prompt.
    """
    runs = {number: _run(engine, ids, sampling, number) for number, ids in prompts.items()}
    for run in runs.values():
        # Tokens are dropped as they come: the run has their ids.
        run.post = partial(_note, advance)
    engine.driver.finish([*runs.values()])
    return {number: run.token_ids for number, run in runs.items()}


def _run(engine: Engine, prompt_ids: Sequence[int], sampling: Sampling, number: int) -> Run:
    request = Request(
        token_ids=tuple(prompt_ids),
        route=_NOWHERE,
        plan=_DENSE,
        distance=_NOWHERE.distance,
        keeps_decoded=False,
        routing_seconds=0.0,
    )
    options = GenerationOptions(
        max_new_tokens=sampling.num_new,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed << 32 | number,
    )
    return prepare(engine.loaded, request, options)


def _note(advance: Advance, token: Token | Exception) -> None:
    if isinstance(token, Token) and token.finish_reason is not None:
        advance()
