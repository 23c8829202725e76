"""What a dry run counts has exact values; the command prints it without loading or writing anything."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from coreinfer.bundles.errors import ConfigError, UnsupportedModelError
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.compiler import CompileConfig
from coreinfer.compiler.checks import find_inputs
from coreinfer.compiler.config import BUILTIN
from coreinfer.compiler.estimate import work
from coreinfer.compiler.estimate.expert_work import expert_repair_work
from coreinfer.compiler.estimate.machine import Machine, measure_machine
from coreinfer.compiler.estimate.plan import Plan, make_plan
from coreinfer.compiler.estimate.shapes import Shapes, shapes_of
from coreinfer.compiler.estimate.sizes import (
    base_token_bytes,
    ffn_token_bytes,
    kept_neurons,
    scratch_bytes,
    stage_needs,
)
from coreinfer.compiler.estimate.speeds import DIVIDED, REACHED, Reached, stage_seconds
from coreinfer.compiler.estimate.text import size_text
from coreinfer.compiler.estimate.view import plan_lines
from coreinfer.compiler.estimate.work import Case, Work
from coreinfer.compiler.text.seeds import load_seeds

MACHINE = Machine(num_threads=2, float32_gflops=100.0, bfloat16_gflops=200.0, read_gbps=10.0)
SHAPES = Shapes(
    num_layers=2,
    hidden_size=64,
    ffn_dim=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=160,
    gated=True,
    tied_head=True,
)
CASE = Case(
    shapes=SHAPES,
    calibration_tokens=8192,
    validation_tokens=1024,
    held_out_tokens=1024,
    document_tokens=64.0,
    num_prompts=0,
    prompt_tokens=0,
    new_tokens=0,
    routing_tokens=1000,
    kept=64,
    num_clusters=3,
    num_assigned=(3, 1, 3),
    encoder_weights=5000,
    encoder_vocabulary=100,
)
CONFIG = CompileConfig(model="m", output=Path("b"), clusters=4, keep=2 / 3)


def test_shapes_count_weights() -> None:
    assert SHAPES.attention_weights == 64 * 64 * 2 + 64 * 32 * 2
    assert SHAPES.ffn_weights == 3 * 64 * 96
    assert SHAPES.body_weights == 2 * (12_288 + 18_432)
    assert SHAPES.all_weights == 61_440 + 160 * 64
    assert replace(SHAPES, tied_head=False).all_weights == 61_440 + 2 * 160 * 64
    assert replace(SHAPES, gated=False).ffn_weights == 2 * 64 * 96


def test_shapes_are_read_from_a_config() -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 160,
        "tie_word_embeddings": True,
    }
    assert shapes_of(config, "m") == SHAPES
    renamed = {"num_layers" if key == "num_hidden_layers" else key: value for key, value in config.items()}
    assert shapes_of(renamed, "m") == SHAPES
    with pytest.raises(ConfigError, match=r"--model m: config.json: hidden_size: expected a size, got None"):
        shapes_of({**config, "hidden_size": None}, "m")
    with pytest.raises(UnsupportedModelError):
        shapes_of({**config, "model_type": "mamba"}, "m")
    opt = {**config, "model_type": "opt", "ffn_dim": 96}
    del opt["tie_word_embeddings"], opt["num_key_value_heads"]
    assert shapes_of(opt, "m") == replace(SHAPES, gated=False, num_kv_heads=4)
    # Names of its own, and neurons that a config need not state.
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 160, "n_inner": None}
    assert shapes_of(gpt2, "m") == replace(SHAPES, gated=False, num_kv_heads=4, ffn_dim=256)
    with pytest.raises(ConfigError, match=r"config.json: n_embd: expected a size, got 0"):
        shapes_of({**gpt2, "n_embd": 0}, "m")


@pytest.mark.parametrize(("tokens", "expected"), [(4000, 4000), (8192, 8192), (16383, 16383), (32000, 10666)])
def test_samples_are_every_nth_document(tokens: int, expected: int) -> None:
    assert work.sampled(tokens, 8192) == expected


def test_works_have_the_values_of_their_formulas() -> None:
    token = 2 * 61_440 + 2 * 4 * 64 * 64
    assert CASE.token_flop == token
    assert work.load_work(CASE) == Work(moved_bytes=4 * SHAPES.all_weights)
    assert work.corpus_work(CASE) == Work()
    written = work.corpus_work(replace(CASE, num_prompts=5, prompt_tokens=50, new_tokens=160))
    assert written.model_flop == 2 * 61_440 * 50 + 2 * (61_440 + 10_240) * 160
    assert work.moments_work(CASE) == Work(model_flop=4096 * token, num_calls=64 * 2)
    assert work.pack_work(CASE, rounds=False) == Work(moved_bytes=8 * SHAPES.all_weights)
    down = 7 * 2 * 64 * 64
    assert work.packs_work(CASE, rounds=True) == Work(float_flop=100 * down, moved_bytes=8 * down + 2 * down)
    assert work.embed_work(CASE) == Work(model_flop=2 * 5000 * 1000, moved_bytes=0.08 * 5000 * 1000)
    assert work.distil_work(CASE) == Work(model_flop=3 * 2 * 5000 * 100)
    profile = work.profile_work(CASE, samples=True)
    assert profile == Work(model_flop=8192 * token, moved_bytes=16 * 2 * 8192 * 96, num_calls=256)
    sensitivity = work.sensitivity_work(CASE)
    assert sensitivity.model_flop == 4096 * (3 * token + 4 * 10_240)
    assert sensitivity.float_flop == 4096 * 2 * 2 * 64**2


def test_narrowing_counts_clusters_and_controls() -> None:
    f, h, k, tokens, layers = 96, 64, 64, 9216, 2
    dense = CASE.token_flop * tokens
    stream = 2 * tokens / 2 * (12_288 + 2 * f * h + k * h)
    removal = f**3 + 2 * f**2 * h + 2 / 3 * (f**3 - k**3) + (f**2 - k**2) * h
    repair = k**3 / 3 + 2 * k**2 * h
    sums = 2 * 8192 * f * (f / 2 + h)
    found = work.reconstruct_work(CASE, carries=True, removes=True, picks=False)
    assert found.model_flop == pytest.approx(dense + layers * 3 * (stream + sums))
    floats = 3 * (removal + 3 * repair) + 4 * (removal + repair)
    assert found.float_flop == pytest.approx(layers * floats)
    without = work.reconstruct_work(replace(CASE, num_assigned=(3,)), carries=False, removes=False, picks=False)
    assert without.model_flop == pytest.approx(dense + layers * sums)
    assert without.float_flop == pytest.approx(layers * 3 * 3 * repair)


def test_narrow_experts_are_counted_one_by_one() -> None:
    f, h, k, layers, chosen = 24, 64, 16, 2, 2
    case = replace(CASE, shapes=replace(SHAPES, num_experts=4, num_chosen=chosen))
    normal = replace(CONFIG, experts="narrow", budgets="energy", carry=False)
    removal = f**3 + 2 * f**2 * h + 2 / 3 * (f**3 - k**3) + (f**2 - k**2) * h
    repair = k**3 / 3 + 2 * k**2 * h
    found = expert_repair_work(normal, case)
    assert found.model_flop == pytest.approx(case.token_flop * 9216 + layers * 3 * 8192 * chosen * f**2)
    checked = 1024 * chosen * (f + 4 * k) * h
    solved = 7 * (removal + 2 * f**2 * h) + (3 * 3 + 4) * repair
    assert found.float_flop == pytest.approx(layers * (4 * solved + checked))
    quick = expert_repair_work(replace(normal, effort="quick"), replace(case, num_assigned=(3,)))
    checked = 1024 * chosen * (f + 2 * k) * h
    assert quick.float_flop == pytest.approx(layers * (4 * 3 * (2 * f**2 * h + repair) + checked))


def test_seconds_are_parts_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = Reached(model=0.5, floats=0.25, memory=0.1, call_seconds=0.01, fixed_seconds=1.0)
    monkeypatch.setitem(REACHED, "profile", reached)
    done = Work(model_flop=1e11, float_flop=1e11, moved_bytes=1e9, num_calls=100)
    assert stage_seconds("profile", done, MACHINE, model_dtype="bfloat16") == pytest.approx(1 + 1 + 1 + 4 + 1)
    assert stage_seconds("profile", done, MACHINE, model_dtype="float32") == pytest.approx(1 + 1 + 2 + 4 + 1)
    monkeypatch.setitem(REACHED, "profile", replace(reached, model_float32=1.0))
    assert stage_seconds("profile", done, MACHINE, model_dtype="bfloat16") == pytest.approx(1 + 1 + 1 + 4 + 1)
    assert stage_seconds("profile", done, MACHINE, model_dtype="float32") == pytest.approx(1 + 1 + 1 + 4 + 1)


def test_kept_neurons_follow_keep_and_budget() -> None:
    config = replace(CONFIG, budgets="uniform", head_quantize="bf16")
    assert kept_neurons(config, SHAPES) == 64
    assert kept_neurons(replace(config, budgets="sensitivity", keep=0.5), SHAPES) == 48
    assert kept_neurons(replace(config, keep=1.0), SHAPES) == 96
    block = ffn_token_bytes(SHAPES, "int4", 32)
    fixed = base_token_bytes(config, SHAPES)
    assert kept_neurons(replace(config, keep=None, budget_mb=(fixed + 2.5 * block) / 1e6), SHAPES) == 64
    with pytest.raises(ConfigError, match="--budget-mb: expected at least"):
        kept_neurons(replace(config, keep=None, budget_mb=fixed / 1e6), SHAPES)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3n"])
def test_bytes_a_token_are_those_of_the_bundle(
    tiny_bundle: Callable[..., Path], tiny_inputs: Callable[[str], CompileConfig], family: str
) -> None:
    options: dict[str, Any] = {"quantize": "int4", "evaluate": False, "controls": False}
    manifest = read_manifest(tiny_bundle(family, **options))
    config = replace(tiny_inputs(family), **options)
    plan = plan_of(config)
    assert plan.token_bytes_pack == token_bytes(manifest).pack
    assert plan.token_bytes_dense == token_bytes(manifest).dense
    assert plan.tok_s_dense == pytest.approx(0.92 * 10e9 / token_bytes(manifest).dense)
    assert plan.bundle_bytes == pytest.approx(sum(file.bytes for file in manifest.files.values()), rel=0.5)


def plan_of(config: CompileConfig) -> Plan:
    return make_plan(config, find_inputs(config), lambda: MACHINE)


def test_stages_are_those_that_run(tiny_inputs: Callable[[str], CompileConfig]) -> None:
    config = tiny_inputs("llama")
    names = [stage.name for stage in plan_of(config).stages]
    without = ["hash", "load", "corpus", "pack", "embed", "distil", "profile", "sensitivity", "reconstruct", "pack"]
    assert names == [*without[:4], "reference", *without[4:], "evaluate", "write"]
    by_curves = replace(config, budgets="sensitivity", quantize="int4", evaluate=False)
    names = [stage.name for stage in plan_of(by_curves).stages]
    assert names == [*without[:3], "moments", *without[3:8], "curves", *without[8:], "write"]
    whole = plan_of(replace(config, keep=1.0))
    assert not {"sensitivity", "curves"} & {stage.name for stage in whole.stages}
    shared = plan_of(replace(config, token_share=0.6))
    assert [stage.name for stage in shared.stages][-3:] == ["shares", "evaluate", "write"]
    assert shared.stages[-3].seconds > 0


def test_thin_clusters_are_planned(tiny_inputs: Callable[[str], CompileConfig]) -> None:
    config = replace(tiny_inputs("llama"), keep=None, budgets=None, token_share=0.6, packs="thin", quantize="int4")
    one, many = (plan_of(replace(config, clusters=count)) for count in (1, 64))
    names = [stage.name for stage in many.stages]
    before = ["hash", "load", "corpus", "moments", "pack", "reference", "embed", "distil"]
    assert names == [*before, "shares", "evaluate", "write"]
    assert many.bundle_bytes - one.bundle_bytes == 63 * 4 * 4 * 3 * 33
    found = plan_of(replace(config, token_share="auto"))
    assert [stage.name for stage in found.stages] == [*before, "shares", "evaluate", "evaluate", "write"]
    lines = "\n".join(plan_lines(many))
    assert "with a pack" not in lines
    assert "where the engine gains by it 0.60 of the layers' weights" in lines
    for stage, plain in zip(many.stages, plan_of(replace(config, clusters=64, half_inputs=False)).stages, strict=True):
        # The second product of inputs that are read in half.
        assert (stage.seconds > plain.seconds) is (stage.name in ("shares", "evaluate"))
    case = replace(CASE, num_assigned=(3,), held_out_tokens=1000)
    needs = [
        stage_needs(replace(config, half_inputs=asked), case, {}, item_bytes=2, num_read=1) for asked in (True, False)
    ]
    assert needs[0]["evaluate"] == needs[1]["evaluate"] + 2 * SHAPES.body_weights
    own = plan_of(replace(config, keep=0.67, packs="own", clusters=64))
    assert own.bundle_bytes > many.bundle_bytes + 64 * 10_000


def test_the_disk_holds_what_tries_are_compared_with_and_sums() -> None:
    config = replace(CONFIG, keep=0.5, controls=False, cache_dir=None)
    case = replace(CASE, num_assigned=(3,), held_out_tokens=1000)
    logits = 500 * (SHAPES.vocab_size + 2 * 2 * SHAPES.num_kv_heads * SHAPES.head_dim)
    assert scratch_bytes(config, case, item_bytes=2) == 2 * logits
    assert scratch_bytes(replace(config, evaluate=False), case, item_bytes=2) == 0
    quick = scratch_bytes(replace(config, effort="quick"), case, item_bytes=2)
    # Sums of three clusters and of all text: one triangle, with blocks of 64 rows on the diagonal.
    f, h = SHAPES.ffn_dim, SHAPES.hidden_size
    assert quick == 2 * logits + 4 * SHAPES.num_layers * 4 * f * ((f + 64) // 2 + h)


def test_controls_double_the_packs(tiny_inputs: Callable[[str], CompileConfig]) -> None:
    config = tiny_inputs("llama")
    assert plan_of(config).num_packs == 9
    assert plan_of(replace(config, controls=False)).num_packs == 4
    assert plan_of(replace(config, clusters=1)).num_packs == 2


def test_workers_divide_the_stages_that_go_by_text(tiny_inputs: Callable[[str], CompileConfig]) -> None:
    config = replace(tiny_inputs("llama"), effort="normal")
    pytest.importorskip("ray", reason="the extra ray is not installed")
    alone, two = plan_of(config), plan_of(replace(config, ray="auto", workers=2, threads=2))
    assert (alone.num_workers, two.num_workers) == (1, 2)
    assert two.start_seconds == 2 * alone.start_seconds
    for first, second in zip(alone.stages, two.stages, strict=True):
        assert first.name == second.name
        divided = first.name in DIVIDED - {"corpus"}
        assert second.seconds == pytest.approx(first.seconds / 2 if divided else first.seconds)
        assert second.peak_bytes <= first.peak_bytes
    assert {"profile", "reconstruct", "evaluate"} <= DIVIDED
    assert "workers    2 of 2 threads" in "\n".join(plan_lines(two))
    assert "workers" not in "\n".join(plan_lines(alone))


def test_text_is_cut_down_to_the_token_budget(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(["x" * 420] * 30), encoding="utf-8")
    config = replace(CONFIG, calibration=(str(path),), calibration_tokens=1500, document_tokens=64)
    found = size_text(config, config.calibration)
    assert (found.num_tokens, found.num_documents) == (1500, 30)
    whole = size_text(replace(config, calibration_tokens=10_000), config.calibration)
    assert (whole.num_tokens, whole.num_documents, whole.new_tokens) == (3000, 60, 0)


def test_the_builtin_corpus_is_written_up_to_the_budget() -> None:
    seeds = load_seeds()
    found = size_text(replace(CONFIG, calibration_tokens=20_000), (BUILTIN,))
    assert 0.3 * len(seeds) < found.num_prompts < 0.6 * len(seeds)
    assert found.new_tokens == 32 * found.num_prompts
    assert found.num_tokens == 20_000
    # Little more than is taken.
    assert found.prompt_tokens + found.new_tokens < 1.1 * 20_000
    large = size_text(replace(CONFIG, calibration_tokens=90_000), (BUILTIN,))
    assert large.num_tokens == pytest.approx(90_000, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"clusters": "auto"}, "--clusters auto"),
        ({"heal_steps": 3}, "--heal-steps"),
        ({"max_memory": 4.0}, "--max-memory"),
    ],
)
def test_what_cannot_be_foretold_is_refused(
    changes: dict[str, Any], named: str, tiny_inputs: Callable[[str], CompileConfig]
) -> None:
    with pytest.raises(ConfigError, match=f"--dry-run: what {named}.* takes is not known beforehand"):
        plan_of(replace(tiny_inputs("llama"), **changes))


def test_a_model_on_the_hub_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(ConfigError, match=r"--model some/model is not on this machine.*download it first"):
        plan_of(replace(CONFIG, model="some/model", calibration=(BUILTIN,)))


def test_a_model_in_the_cache_of_the_hub_is_read(
    monkeypatch: pytest.MonkeyPatch, tiny_inputs: Callable[[str], CompileConfig]
) -> None:
    config = tiny_inputs("llama")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name: str(Path(config.model) / name))
    there, local = plan_of(replace(config, model="some/model")), plan_of(config)
    assert there.token_bytes_pack == local.token_bytes_pack
    assert there.stages == local.stages[1:]


def test_the_machine_is_measured_within_seconds() -> None:
    import torch

    before, start = torch.get_num_threads(), time.perf_counter()
    machine = measure_machine(1, seconds=0.3)
    assert time.perf_counter() - start < 20
    assert torch.get_num_threads() == before
    assert machine.num_threads == 1
    assert min(machine.float32_gflops, machine.bfloat16_gflops) > 0.1
    assert 0.1 < machine.read_gbps < 2000


PROGRAM = """
import sys
from coreinfer.compiler.cli import main
try:
    main()
finally:
    print(*sorted({"torch", "transformers", "sentence_transformers", "sklearn"} & set(sys.modules)), file=sys.stderr)
"""


def dry_run(config: CompileConfig, folder: Path, *more: str) -> tuple[str, str, int]:
    arguments = [
        *("--model", config.model, "-o", str(folder / "bundle"), "--clusters", "4", "--keep", "0.67"),
        *("--encoder", str(config.encoder), "--calibration", config.calibration[0], "--dry-run", *more),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=120, cwd=folder
    )
    return done.stdout, done.stderr, done.returncode


def test_a_dry_run_loads_and_writes_nothing(tmp_path: Path, tiny_inputs: Callable[[str], CompileConfig]) -> None:
    config = tiny_inputs("llama")
    stdout, stderr, code = dry_run(config, tmp_path, "--cache", str(tmp_path / "cache"), "--dtype", "float32", "--json")
    assert (stderr, code) == ("torch\n", 0)
    assert not [*tmp_path.iterdir()]
    found = json.loads(stdout)
    expected = plan_of(replace(config, quantize="int4", budgets="sensitivity", cache_dir=tmp_path))
    same = asdict(expected)
    assert found.keys() == {*same, "seconds", "peak_bytes"}
    assert [stage["name"] for stage in found["stages"]] == [stage.name for stage in expected.stages]
    assert found["seconds"] == pytest.approx(found["start_seconds"] + sum(s["seconds"] for s in found["stages"]))
    assert found["peak_bytes"] == found["stages"][-1]["peak_bytes"]
    for name in ("num_tokens", "num_packs", "token_bytes_pack", "token_bytes_dense", "bundle_bytes", "scratch_bytes"):
        assert found[name] == same[name]


def test_refusals_come_before_the_machine_is_measured(
    tmp_path: Path, tiny_inputs: Callable[[str], CompileConfig]
) -> None:
    (tmp_path / "bundle").mkdir()
    stdout, stderr, code = dry_run(tiny_inputs("llama"), tmp_path)
    assert (stdout, code) == ("", 2)
    assert stderr.startswith("error: ")
    assert "torch" not in stderr.split()


def test_the_table_names_every_stage(tiny_inputs: Callable[[str], CompileConfig]) -> None:
    plan = plan_of(tiny_inputs("llama"))
    lines = [*plan_lines(plan)]
    for stage in plan.stages:
        assert any(stage.name in line.split() for line in lines)
    assert f"{plan.token_bytes_pack / 1e6:.1f} MB with a pack" in "\n".join(lines)
