"""Evaluate bundles: the main path."""

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from coreinfer.bundles import ConfigError, read_manifest
from coreinfer.bundles.errors import join_problems
from coreinfer.bundles.shared.checks import share
from coreinfer.bundles.shared.extras import require_package
from coreinfer.compiler.progress import Progress
from coreinfer.runtime import Engine
from coreinfer.runtime.load_options import EngineName, memory_option

from .corpus_scores import translation_scores
from .logits import greedy_ids
from .records import Dataset, Item, read_datasets
from .reference import LLAMACPP_FORMATS, LlamaCppSubject, TransformersSubject, check_original, gguf_path, has_llamacpp
from .scores import Evaluation, MetricScore, Variant, ratio_score
from .subjects import MODES, BundleSubject, Subject
from .tasks import Observation, Text, Tools, compare_text, is_task, predict_text, score_task

__all__ = ["DEFAULT_MODES", "EvaluationConfig", "evaluate"]

_log = logging.getLogger(__name__)
DEFAULT_MODES = ("dense", "similarity", "random", "griffin", "coreinfer")
_ANSWER_TOKENS = 256
# Longest context and answer of a task; longer items are left out. llama.cpp keeps logits for all of it.
_ROOM = 2048

OnDataset = Callable[[Dataset, Sequence[Variant], Sequence[MetricScore]], None]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What to evaluate.

    Attributes:
        bundles: folders.
        data: files, folders or patterns; the beginning of a file's name tells its task.
        modes: of `MODES`.
        against: the original model, against which KL is measured; None for the first bundle's dense FFN.
        llamacpp: quantize it with llama.cpp and evaluate the results too; None for where that can be had.
        limit: items a file; None for all.
        as_text: score all files as texts.
        max_tokens: texts are cut to this many tokens.
        token_shares: at which dense and similarity are run too; none for each bundle's own, where it has any.
        seed: of the bootstrap.
    """

    bundles: tuple[Path, ...]
    data: tuple[str, ...]
    modes: tuple[str, ...] = DEFAULT_MODES
    against: str | None = None
    llamacpp: bool | None = None
    limit: int | None = None
    as_text: bool = False
    max_tokens: int = 256
    engine: EngineName = "auto"
    threads: int | None = None
    memory_mb: float | None = memory_option()
    token_shares: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ConfigError: naming all that are wrong.
        """
        names = [path.name for path in self.bundles]
        problems = [
            None if self.bundles else "DIR: expected at least one bundle, got none",
            None if len(set(names)) == len(names) else f"DIR: expected bundles of different names, got {names}",
            None if self.data else "--data: expected at least one file, got none",
            None if self.limit is None or self.limit >= 1 else f"--limit: expected at least 1, got {self.limit}",
            None if self.max_tokens >= 4 else f"--max-tokens: expected at least 4, got {self.max_tokens}",
            *(share().problem("--token-share", value) for value in self.token_shares),
            *(None if mode in MODES else f"--mode: expected {', '.join(MODES)}, got {mode!r}" for mode in self.modes),
        ]
        if found := [problem for problem in problems if problem]:
            raise ConfigError(join_problems(found))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """All that is loaded.

    Attributes:
        subjects: that do tasks.
        original: the model that texts are also compared with, if there is one.
        reference: subject and mode that KL is measured against.
        engine: of the first bundle, for prompts' chat template.
    """

    subjects: Sequence[Subject]
    original: Subject | None
    reference: tuple[Subject, str]
    engine: Engine
    tools: Tools


def evaluate(
    config: EvaluationConfig, progress: Progress | None = None, on_dataset: OnDataset | None = None
) -> Evaluation:
    """Score bundles, and what they are compared with, on every data set.

    Args:
        progress: reports data sets as they run.
        on_dataset: called with each data set's scores as soon as they are complete.
    Raises:
        CoreInferError: the options, a bundle or the data are wrong.
    """
    progress = progress or Progress()
    datasets = read_datasets(config.data, limit=config.limit, as_text=config.as_text)
    if config.against:
        check_original(config.against)
    with ExitStack() as stack:
        run = _load(config, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coreinfer-eval-"))))
        result = Evaluation(reference=_reference_name(run), rows=_rows(run))
        for dataset in datasets:
            start = time.perf_counter()
            with progress.stage(dataset.name, len(dataset.items)) as advance:
                seen = _observe_all(run, config, dataset, advance)
            result.num_skipped[dataset.name] = len(dataset.items) - len(seen)
            scores = _scores(dataset, seen, config.seed)
            result.scores.extend(scores)
            result.seconds[dataset.name] = time.perf_counter() - start
            if on_dataset:
                on_dataset(dataset, result.rows, scores)
    return result


def _bundle_subject(path: Path, modes: Sequence[str], config: EvaluationConfig) -> BundleSubject:
    return BundleSubject(
        path,
        modes=modes,
        engine=config.engine,
        threads=config.threads,
        memory_mb=config.memory_mb,
        token_shares=config.token_shares,
    )


def _load(config: EvaluationConfig, folder: Path) -> _Run:
    bundles: list[BundleSubject] = []
    for path in config.bundles:
        modes = _modes(config, path, bundles)
        bundles.append(_bundle_subject(path, modes, config))
    engine = bundles[0].engine
    room = min(_ROOM, engine.manifest.model.max_positions)
    tools = Tools(tokenizer=engine.tokenizer, eos_ids=engine.eos_token_ids, room=room)
    original: Subject | None = None
    if config.against:
        original = TransformersSubject(config.against, threads=config.threads)
    others = _llamacpp_subjects(config, folder, room)
    subjects: list[Subject] = [*bundles, *others]
    for subject in [*subjects, *([original] if original else [])]:
        _check_vocabulary(subject, engine)
    return _Run(
        subjects=subjects,
        original=original,
        reference=(original, "original") if original else _dense_reference(bundles),
        engine=engine,
        tools=tools,
    )


def _modes(config: EvaluationConfig, path: Path, before: Sequence[BundleSubject]) -> tuple[str, ...]:
    """Leave out the dense row of a bundle whose model and formats an earlier one has: it would be the same row."""
    manifest = read_manifest(path)
    for subject in before:
        other = subject.engine.manifest
        same = other.provenance.model_sha256 == manifest.provenance.model_sha256
        if same and other.quantization == manifest.quantization and "dense" in subject.modes:
            return tuple(mode for mode in config.modes if mode != "dense") or config.modes
    return config.modes


def _dense_reference(bundles: Sequence[BundleSubject]) -> tuple[Subject, str]:
    if not bundles[0].engine.manifest.has_dense:
        raise ConfigError(f"bundle {bundles[0].name} has no dense FFN to compare with; give the model by --against")
    return bundles[0], "dense"


def _llamacpp_subjects(config: EvaluationConfig, folder: Path, room: int) -> list[LlamaCppSubject]:
    """llama.cpp's quantizations, where there is a GGUF file to make them of."""
    source = gguf_path(config.against) if config.against else None
    if config.llamacpp is False or (config.llamacpp is None and not (source and has_llamacpp())):
        return []
    if source is None:
        raise ConfigError("--llamacpp: expected a GGUF file by --against, which llama.cpp quantizes, got none")
    require_package("llama_cpp", "--llamacpp", "llama-cpp-python")
    return [LlamaCppSubject(source, kind, folder, room=room, threads=config.threads) for kind in LLAMACPP_FORMATS]


def _check_vocabulary(subject: Subject, engine: Engine) -> None:
    expected = engine.manifest.model.vocab_size
    if subject.vocab_size != expected:
        raise ConfigError(
            f"{subject.name}: expected {expected} tokens like the first bundle's, got {subject.vocab_size}"
        )


def _reference_name(run: _Run) -> str:
    subject, mode = run.reference
    return f"{subject.name}: {mode}"


def _rows(run: _Run) -> list[Variant]:
    subjects = [*([run.original] if run.original else []), *run.subjects]
    return [
        Variant(subject=subject.name, mode=mode, bytes_per_token=subject.bytes_per_token(mode))
        for subject in subjects
        for mode in subject.modes
    ]


Seen = Mapping[str, Observation]
"""Row name -> observation."""


def _observe_all(
    run: _Run, config: EvaluationConfig, dataset: Dataset, advance: Callable[[], None]
) -> list[tuple[Item, Seen]]:
    found = []
    for item in dataset.items:
        seen = _observe_task(run, dataset, item) if is_task(dataset.kind) else _observe_text(run, config, dataset, item)
        if seen is not None:
            found.append((item, seen))
        advance()
    if num_skipped := len(dataset.items) - len(found):
        _log.warning("%s: %d items left out: too short or too long", dataset.name, num_skipped)
    return found


def _observe_task(run: _Run, dataset: Dataset, item: Item) -> Seen | None:
    seen: dict[str, Observation] = {}
    for subject in run.subjects:
        found = score_task(subject, dataset.kind, item, run.tools)
        if found is None:
            return None
        seen |= _named(subject, found)
    return seen


def _observe_text(run: _Run, config: EvaluationConfig, dataset: Dataset, item: Item) -> Seen | None:
    text = _prompt_text(run, item) if dataset.kind == "prompt" else _plain_text(run, config, item)
    if text is None:
        return None
    predictions = predict_text(*run.reference, text)
    seen: dict[str, Observation] = {}
    for subject in [*([run.original] if run.original else []), *run.subjects]:
        seen |= _named(subject, compare_text(subject, text, predictions))
    return seen


def _named(subject: Subject, found: Mapping[str, Observation]) -> dict[str, Observation]:
    return {
        Variant(subject=subject.name, mode=mode, bytes_per_token=None).name: observation
        for mode, observation in found.items()
    }


def _plain_text(run: _Run, config: EvaluationConfig, item: Item) -> Text | None:
    """The second half is scored, as the compiler's own evaluation does."""
    ids = run.tools.encode(item.context)[: min(config.max_tokens, run.tools.room)]
    start = len(ids) // 2
    if len(ids) < 4:
        return None
    return Text(ids=tuple(ids), start=start, routing_text=run.tools.decode(ids[:start]))


def _prompt_text(run: _Run, item: Item) -> Text | None:
    """The reference's own greedy answer to a prompt, in the model's chat template where it has one."""
    ids = _prompt_ids(run, item.context)
    # A model of few positions answers in half of them.
    num_new = min(_ANSWER_TOKENS, run.tools.room // 2)
    if not 2 <= len(ids) <= run.tools.room - num_new:
        return None
    subject, mode = run.reference
    subject.read(ids[:-1], item.context)
    subject.begin(mode)
    answer = greedy_ids(
        subject.append, ids[-1], max_new_tokens=num_new, eos_ids=run.tools.eos_ids, stopped=lambda _ids: False
    )
    if len(answer) < 4:
        return None
    return Text(ids=(*ids, *answer), start=len(ids) - 1, routing_text=item.context)


def _prompt_ids(run: _Run, prompt: str) -> list[int]:
    if run.engine.chat_template is None:
        return run.tools.encode(prompt)
    return run.engine.prompt_ids([{"role": "user", "content": prompt}])


def _scores(dataset: Dataset, found: Sequence[tuple[Item, Seen]], seed: int) -> list[MetricScore]:
    """Sum up a data set, row by row."""
    scores: list[MetricScore] = []
    for row in found[0][1] if found else ():
        seen = [observations[row] for _, observations in found]
        for metric in seen[0].shares:
            shares = [observation.shares[metric] for observation in seen]
            scores.append(ratio_score(row, dataset.name, metric, shares, seed=seed))
        if dataset.kind == "translation":
            expected = [item.answers[0] for item, _ in found]
            answers = [observation.answer for observation in seen]
            scores += translation_scores(row, dataset.name, answers, expected, seed=seed)
    return scores
