"""`coreinfer-eval` on tiny bundles: every kind of data, rows that are what they say, and the plain lines of errors."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from coreinfer import runtime
from coreinfer.bundles import ConfigError
from coreinfer.compiler import CompileConfig
from coreinfer.evaluation import EvaluationConfig, evaluate
from coreinfer.evaluation.cli import main
from coreinfer.evaluation.reference import TransformersSubject
from coreinfer.evaluation.subjects import MODES, BundleSubject
from coreinfer.evaluation.tasks import Tools, encode_pair
from coreinfer.runtime.engines.protocol import DENSE
from tokenizers.processors import TemplateProcessing

from .model_factory import build_tokenizer, corpus_texts

TEXTS = corpus_texts()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small file of each kind."""
    folder = tmp_path_factory.mktemp("data")
    words = [text.split() for text in TEXTS[:40:10]]
    pairs = [{"context": " ".join(each[:-2]), "continuation": " ".join(each[-2:])} for each in words]
    files: dict[str, list[dict[str, Any]]] = {
        "lm_a": [{"text": text} for text in TEXTS[:40:10]],
        "code_a": pairs,
        "completion_a": pairs,
        "ie_a": pairs,
        "translation_a": pairs,
        "summarization_a": [{"context": pair["context"], "summary": pair["continuation"]} for pair in pairs],
        "mc_a": [{"query": pair["context"], "choices": [pair["continuation"], "tide"], "gold": 0} for pair in pairs],
        "prompts_a": [{"prompt": pair["context"]} for pair in pairs],
    }
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, list(map(str, arguments)))


def scores_of(result: Any, row: str, metric: str) -> dict[str, float]:
    return {s["dataset"]: s["value"] for s in result["scores"] if s["row"] == row and s["metric"] == metric}


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_chosen_neurons_read_the_bytes_of_a_pack(kind: str, tiny_bundle: Callable[..., Path], data: Path) -> None:
    done = run(tiny_bundle("llama", quantize=kind), "--data", data / "lm_a.jsonl", *modes_of(MODES), "--json")
    sizes = {row["mode"]: row["bytes_per_token"] for row in json.loads(done.stdout)["rows"]}
    assert sizes["similarity"] == sizes["random"] == sizes["griffin"] == sizes["fused"] < sizes["dense"]


def test_experts_that_prompts_choose_are_measured(tiny_bundle: Callable[..., Path], data: Path) -> None:
    """A token reads as many experts, whichever there are; without some of them it gives something else."""
    bundle = tiny_bundle("mixtral", quantize="int4")
    done = run(bundle, "--data", data / "lm_a.jsonl", *modes_of(MODES), "--json", "--limit", 2)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["mode"] for row in result["rows"]] == list(MODES)
    assert len({row["bytes_per_token"] for row in result["rows"]}) == 1
    kl = {mode: scores_of(result, f"{bundle.name}: {mode}", "KL")["lm_a"] for mode in MODES}
    assert kl["dense"] < 1e-4 < min(kl[mode] for mode in ("stability", "fused", "griffin", "coreinfer"))


def modes_of(names: Sequence[str]) -> list[str]:
    return [word for name in names for word in ("--mode", name)]


def test_every_kind_gets_every_row(tiny_bundle: Callable[..., Path], data: Path) -> None:
    bundle = tiny_bundle("llama", quantize="int4")
    done = run(bundle, "--data", data, *modes_of(MODES), "--json", "--threads", 1)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["mode"] for row in result["rows"]] == list(MODES)
    sizes = {row["mode"]: row["bytes_per_token"] for row in result["rows"]}
    # Neurons that a prompt chooses have down projections of int8.
    assert sizes["similarity"] == sizes["random"] < sizes["griffin"] == sizes["coreinfer"] < sizes["dense"]
    names = [f"{bundle.name}: {mode}" for mode in MODES]
    expected: dict[str, set[str]] = {
        "KL": {"lm_a", "code_a", "prompts_a"},
        "exact match": {"completion_a"},
        "entity F1": {"ie_a"},
        "accuracy": {"mc_a"},
        "ROUGE-L": {"summarization_a"},
        "BLEU": {"translation_a"},
    }
    for metric, datasets in expected.items():
        for name in names:
            assert scores_of(result, name, metric).keys() == datasets
    assert max(scores_of(result, names[0], "KL").values()) < 1e-4
    assert set(scores_of(result, names[0], "top-1").values()) == {1.0}
    for name in names[1:]:
        assert min(scores_of(result, name, "KL").values()) > 1e-4
    assert set(result["num_skipped"].values()) == {0}
    for score in result["scores"]:
        assert score["low"] - 1e-9 <= score["value"] <= score["high"] + 1e-9


def test_tables_and_a_plot(tiny_bundle: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    for name in ("plot.svg", "plot.png"):
        done = run(tiny_bundle("llama"), "--data", data / "lm_a.jsonl", "--plot", tmp_path / name, "--limit", 2)
        assert done.exit_code == 0, done.stderr
        assert "### lm_a, 2 items" in done.stdout
        assert "### Means over data sets" in done.stdout
    assert b"<svg" in (tmp_path / "plot.svg").read_bytes()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_kl_against_the_original(
    tiny_bundle: Callable[..., Path], tiny_inputs: Callable[[str], CompileConfig], data: Path
) -> None:
    """A bf16 bundle's dense FFN is the original but for rounding; tasks are not run on the original."""
    config = EvaluationConfig(
        bundles=(tiny_bundle("llama"),),
        data=(str(data / "lm_a.jsonl"), str(data / "mc_a.jsonl")),
        modes=("dense", "similarity"),
        against=tiny_inputs("llama").model,
    )
    result = evaluate(config)
    found = {(score.row.split(": ")[1], score.metric): score.value for score in result.scores}
    assert found["original", "KL"] < 1e-5
    assert found["dense", "KL"] < 0.01 < found["similarity", "KL"]
    assert ("original", "accuracy") not in found
    assert result.reference.endswith(": original")


def test_the_original_reads_on_as_in_one_piece(tiny_inputs: Callable[[str], CompileConfig]) -> None:
    subject = TransformersSubject(tiny_inputs("llama").model, threads=1)
    ids = list(range(5, 25))
    subject.read([], "")
    subject.begin("original")
    whole = subject.append(ids, all_logits=True)
    subject.read(ids[:12], "")
    for _ in range(2):
        subject.begin("original")
        np.testing.assert_allclose(subject.append(ids[12:], all_logits=True), whole[12:], atol=1e-4)


def test_a_mode_is_the_runtimes_own(tiny_bundle: Callable[..., Path]) -> None:
    """The prefix is read dense and the rest with the pack, as `generate` does it."""
    path = tiny_bundle("llama")
    engine = runtime.load(path, device="cpu", threads=1)
    subject = BundleSubject(path, modes=("similarity", "stability", "fused"), threads=1)
    ids = list(engine.tokenizer.encode(TEXTS[0]).ids)
    subject.read(ids, TEXTS[0])
    for mode in ("similarity", "stability", "fused"):
        expected = engine.generate(TEXTS[0], raw=True, mode=mode, max_new_tokens=6)
        subject.begin(mode)
        got = [expected.token_ids[0]]
        while len(got) < len(expected.token_ids):
            got.append(int(subject.append([got[-1]])[-1].argmax()))
        assert tuple(got) == expected.token_ids


def test_choice_tokens_are_scored_narrow(tiny_bundle: Callable[..., Path]) -> None:
    path = tiny_bundle("llama")
    subject = BundleSubject(path, modes=("dense", "similarity"), threads=1)
    tools = Tools(tokenizer=subject.engine.tokenizer, eos_ids=frozenset(), room=100)
    context, answer = encode_pair(tools, TEXTS[0], " tide and anchor")
    assert context
    assert answer
    subject.read(context[:-1], TEXTS[0])
    subject.begin("similarity")
    narrow = subject.append([context[-1], *answer[:-1]], all_logits=True)
    decoder = subject.engine.decoder
    decoder.truncate(0)
    decoder.use(DENSE)
    decoder.forward(context[:-1])
    dense = decoder.forward([context[-1], *answer[:-1]], all_logits=True)
    # Already the first choice token is predicted by the narrow FFN.
    assert (np.abs(narrow - dense).max(axis=1) > 1e-3).all()


def test_random_packs_are_drawn_by_the_text(tiny_bundle: Callable[..., Path]) -> None:
    subject = BundleSubject(tiny_bundle("llama"), modes=("random",), threads=1)
    drawn = []
    for text in TEXTS[:40]:
        subject.read([5, 6], text)
        drawn.append(subject._choice("random").cluster)
    subject.read([5, 6], TEXTS[3])
    assert subject._choice("random").cluster == drawn[3]
    assert len(set(drawn)) > 1


def test_one_dense_row_for_bundles_that_share_it(tiny_bundle: Callable[..., Path], data: Path) -> None:
    first, second = tiny_bundle("llama"), tiny_bundle("llama", clusters=1)
    assert first.name != second.name
    done = run(first, second, "--data", data / "lm_a.jsonl", "--limit", 1, "--json")
    assert done.exit_code == 0, done.stderr
    rows = [(row["subject"], row["mode"]) for row in json.loads(done.stdout)["rows"]]
    assert rows.count((first.name, "dense")) == 1
    assert (second.name, "dense") not in rows
    assert (second.name, "random") not in rows
    assert (second.name, "similarity") in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{data}", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--data", "{data}", "--max-tokens", "2"], "--max-tokens: expected at least 4"),
        (["--data", "{data}", "--plot", "x.pdf"], "expected a name that ends in .png or .svg"),
        (["--data", "{data}", "--llamacpp"], "--llamacpp: expected a GGUF file by --against"),
        (["--data", "nowhere"], "found nothing"),
        (["--data", "{data}", "--against", "./nowhere"], "--against"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, tiny_bundle: Callable[..., Path], data: Path) -> None:
    done = run(tiny_bundle("llama"), *(word.format(data=data) for word in arguments))
    assert done.exit_code == 2
    assert message in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_a_bundle_without_dense_needs_the_original(tiny_bundle: Callable[..., Path], data: Path) -> None:
    bundle = tiny_bundle("llama", dense=False)
    with pytest.raises(ConfigError, match="no dense FFN to compare with; give the model by --against"):
        evaluate(EvaluationConfig(bundles=(bundle,), data=(str(data),)))
    subject = BundleSubject(bundle, modes=("dense", "similarity", "griffin"))
    assert subject.modes == ("similarity",)
    with pytest.raises(ConfigError, match="expected modes of similarity, random, got dense"):
        BundleSubject(bundle, modes=("dense",))


def test_modes_that_a_bundle_cannot_have_are_named(
    tiny_bundle: Callable[..., Path], data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limited = BundleSubject(tiny_bundle("llama"), modes=MODES, memory_mb=16)
    assert limited.modes == ("dense", "similarity", "pack-prompt", "random")
    assert "left out modes that it cannot have: stability, fused, griffin, coreinfer" in caplog.text


def test_what_does_not_fit_is_left_out_and_counted(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "completion_a.jsonl"
    records = [{"context": TEXTS[0], "continuation": "tide"}, {"context": TEXTS[0] * 60, "continuation": "tide"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = evaluate(EvaluationConfig(bundles=(tiny_bundle("llama"),), data=(str(path),), modes=("dense",)))
    assert result.num_skipped == {"completion_a": 1}
    assert {score.num_items for score in result.scores} == {1}


def test_texts_begin_once_and_never_end() -> None:
    tokenizer = build_tokenizer().backend_tokenizer
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tools = Tools(tokenizer=tokenizer, eos_ids=frozenset({2}), room=256)
    plain = tokenizer.encode("tide", add_special_tokens=False).ids
    # A chat template has written the first token already.
    assert tools.encode("tide") == tools.encode("<s>tide") == [1, *plain]
    more = tokenizer.encode(" ship", add_special_tokens=False).ids
    assert encode_pair(tools, "tide", " ship") == ([1, *plain], more)
    # Where nothing of the answer comes after the context's tokens, it has its own, without a beginning.
    assert 1 not in encode_pair(tools, "tide and whale", "")[1]


def test_the_harness_continues_what_the_assistant_began(tiny_bundle: Callable[..., Path]) -> None:
    from coreinfer.evaluation.harness import CoreInferLM

    model = CoreInferLM(bundle=str(tiny_bundle("llama")), threads=1)
    history = [{"role": "user", "content": "soup"}, {"role": "assistant", "content": "salt"}]
    assert model.apply_chat_template(history, add_generation_prompt=False) == "<|user|>soup</s><|assistant|>salt"
    assert model.apply_chat_template(history[:1]) == "<|user|>soup</s><|assistant|>"


HARNESS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import lm_eval
from lm_eval.tasks import TaskManager
import coreinfer.evaluation.harness
found = lm_eval.simple_evaluate(
    model="coreinfer",
    model_args={"bundle": sys.argv[1], "mode": "similarity", "threads": 1},
    tasks=["tiny_choice", "tiny_text", "tiny_answer"],
    task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False),
    bootstrap_iters=0,
)
print("RESULT", json.dumps(found["results"], default=str))
"""

TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{query}}"
metric_list: [{metric: word_perplexity}]
""",
    "tiny_answer": """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: [" the"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def test_lm_evaluation_harness(tiny_bundle: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    """Three local tasks, one for each kind of request, through the harness's own interface; no network."""
    for name, body in TASKS.items():
        where = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data / 'mc_a.jsonl'}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"{where}test_split: test\n{body}")
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(tiny_bundle("llama")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    results = json.loads(line.removeprefix("RESULT "))
    assert 0 <= results["tiny_choice"]["acc_norm,none"] <= 1
    assert results["tiny_text"]["word_perplexity,none"] > 1
    assert 0 <= results["tiny_answer"]["exact_match,none"] <= 1
