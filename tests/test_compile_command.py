import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from coreinfer.bundles.manifest import Manifest, read_manifest
from coreinfer.compiler import CompileConfig, Progress, cli
from coreinfer.compiler.cli import default_cache_dir, main, summary

PROGRESS = Progress(stage_seconds={"load": 1.0, "write": 2.5}, stage_peak_bytes={"load": 10**9, "write": 3 * 10**9})
SWITCHES = {"cache_dir": "--cache"}
"""Options whose name is not that of the field."""


@pytest.fixture(autouse=True)
def _quiet_loggers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands set up logging for their own process; tests share one. No test may touch the user's own cache."""
    monkeypatch.setattr(cli, "start_logging", lambda *, verbose: logging.getLogger("coreinfer"))
    monkeypatch.setenv("COREINFER_CACHE", str(tmp_path / "default-cache"))
    # What a command sets is taken back with it.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")


@pytest.mark.parametrize(("given_by_user", "expected"), [(None, "64"), ("1024", "1024")])
def test_few_compiled_products_are_kept_unless_the_user_says_otherwise(
    given: list[CompileConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    given_by_user: str | None,
    expected: str,
) -> None:
    if given_by_user is not None:
        monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given_by_user)
    assert run("--model", "model", "-o", tmp_path / "bundle").exit_code == 0
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == expected
    assert len(given) == 1


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def arguments_of(config: CompileConfig, output: Path) -> list[str | Path]:
    return [
        *("--model", config.model, "-o", output, "--clusters", str(config.clusters), "--keep", str(config.keep)),
        *("--encoder", str(config.encoder), "--calibration", config.calibration[0]),
        *("--dtype", config.dtype, "--budgets", config.effective_budgets, "--quantize", config.quantize),
    ]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Callable[..., Path]) -> list[CompileConfig]:
    """The configs that the command compiles; nothing is compiled."""
    configs: list[CompileConfig] = []

    def compile_nothing(config: CompileConfig, progress: Progress) -> Manifest:
        configs.append(config)
        return read_manifest(tiny_bundle("llama"))

    monkeypatch.setattr(cli, "compile_model", compile_nothing)
    return configs


def test_help_lists_every_option_of_a_compile() -> None:
    result = run("--help")
    assert result.exit_code == 0
    words = result.stdout.replace("/", " ").replace(",", " ").split()
    for field in fields(CompileConfig):
        assert SWITCHES.get(field.name, f"--{field.name.replace('_', '-')}") in words


def test_defaults_are_those_of_the_library(given: list[CompileConfig], tmp_path: Path) -> None:
    result = run("--model", "m", "-o", tmp_path / "b")
    assert result.exit_code == 0, result.stderr
    assert given == [CompileConfig(model="m", output=tmp_path / "b")]
    assert given[0].cache_dir == tmp_path / "default-cache"


OPTIONS: dict[str, tuple[list[str], Any]] = {
    "quantize": (["--quantize", "int8"], "int8"),
    "head_quantize": (["--head-quantize", "bf16"], "bf16"),
    "clusters": (["--clusters", "auto"], "auto"),
    "keep": (["--keep", "0.5"], 0.5),
    "effort": (["--effort", "quick"], "quick"),
    "encoder": (["--encoder", "e"], "e"),
    "calibration": (["--calibration", "a.txt", "--calibration", "builtin"], ("a.txt", "builtin")),
    "text_field": (["--text-field", "body"], "body"),
    "calibration_tokens": (["--calibration-tokens", "77"], 77),
    "document_tokens": (["--document-tokens", "99"], 99),
    "selection": (["--selection", "griffin"], "griffin"),
    "alpha": (["--alpha", "0.1"], 0.1),
    "beta": (["--beta", "0.2"], 0.2),
    "cluster_weight": (["--cluster-weight", "auto"], "auto"),
    "budgets": (["--budgets", "uniform"], "uniform"),
    "min_layer_keep": (["--min-layer-keep", "0.3"], 0.3),
    "reconstruct": (["--no-reconstruct"], False),
    "budget_mb": (["--budget-mb", "80"], 80.0),
    "max_kl": (["--max-kl", "0.1"], 0.1),
    "min_top1": (["--min-top1", "0.9"], 0.9),
    "removal": (["--removal", "top-k"], "top-k"),
    "carry": (["--no-carry"], False),
    "by_neuron": (["--by-neuron"], True),
    "token_share": (["--token-share", "0.6"], 0.6),
    "half_inputs": (["--no-half-inputs", "--token-share", "0.6"], False),
    "packs": (["--packs", "own"], "own"),
    "repair_rounding": (["--repair-rounding"], True),
    "experts": (["--experts", "narrow"], "narrow"),
    "heal_steps": (["--heal-steps", "7"], 7),
    "heal_cluster_steps": (["--heal-cluster-steps", "3"], 3),
    "heal_rate": (["--heal-rate", "0.01"], 0.01),
    "heal_optimizer": (["--heal-optimizer", "muon"], "muon"),
    "ridge": (["--ridge", "0.5"], 0.5),
    "dense": (["--no-dense"], False),
    "evaluate": (["--no-evaluate"], False),
    "controls": (["--no-controls"], False),
    "report_sentences": (["--report-sentences", "0"], 0),
    "seed": (["--seed", "9"], 9),
    "threads": (["--threads", "1"], 1),
    "ray": (["--ray", "local", "--workers", "2"], "local"),
    "workers": (["--workers", "2", "--ray", "local"], 2),
    "device": (["--device", "cuda"], "cuda"),
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
    "force": (["--force"], True),
    "max_memory": (["--max-memory", "6"], 6.0),
    "cache_dir": (["--cache", "somewhere"], Path("somewhere")),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_reaches_its_field(name: str, given: list[CompileConfig], tmp_path: Path) -> None:
    arguments, value = OPTIONS[name]
    result = run("--model", "m", "-o", tmp_path / "b", *arguments)
    assert result.exit_code == 0, result.stderr
    assert getattr(given[0], name) == value
    default = CompileConfig(model="m", output=tmp_path / "b")
    # Nothing without others.
    together = {"ray": ("workers",), "workers": ("ray",), "half_inputs": ("token_share",)}
    names = (name, *together.get(name, ()))
    assert replace(given[0], **{name: getattr(default, name) for name in names}) == default


def test_every_field_has_an_option_that_is_tested() -> None:
    assert {*OPTIONS, "model", "output"} == {field.name for field in fields(CompileConfig)}


def test_no_cache(given: list[CompileConfig], tmp_path: Path) -> None:
    assert run("--model", "m", "-o", tmp_path / "b", "--no-cache").exit_code == 0
    assert given[0].cache_dir is None
    result = run("--model", "m", "-o", tmp_path / "b", "--no-cache", "--cache", "x")
    assert result.exit_code == 2
    assert result.stderr == "error: --cache and --no-cache: expected one of them, got both\n"


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_cache_dir().name == "default-cache"
    monkeypatch.setenv("COREINFER_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/coreinfer")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/coreinfer")


def test_json_output_is_the_manifest(
    tiny_inputs: Callable[[str], CompileConfig], tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    result = run(*arguments_of(tiny_inputs("llama"), tmp_path / "bundle"), "--json", "--cache", tmp_path / "cache")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    seconds = printed.pop("stage_seconds")
    assert {"load", "profile", "reconstruct", "evaluate", "write"} <= set(seconds)
    assert printed.pop("stage_peak_bytes").keys() == seconds.keys()
    assert printed == json.loads(json.dumps(asdict(read_manifest(tmp_path / "bundle"))))
    name = "clusters/000.safetensors"
    assert (tmp_path / "bundle" / name).read_bytes() == (tiny_bundle("llama") / name).read_bytes()
    assert (tmp_path / "cache").is_dir()
    assert "profile" in result.stderr


def test_the_summary_shows_sizes_quality_and_seconds(given: list[CompileConfig], tmp_path: Path) -> None:
    result = run("--model", "m", "-o", tmp_path / "b")
    assert given
    for expected in ("4 clusters", "MB a token", "keep 0.667", "perplexity", "one static mask", "random assignment"):
        assert expected in result.stdout


def test_the_summary_of_a_bundle_without_quality(tiny_bundle: Callable[..., Path]) -> None:
    manifest = read_manifest(tiny_bundle("llama", evaluate=False))
    lines = [*summary(Path("b"), manifest, PROGRESS)]
    assert len(lines) == 4
    assert lines[-1] == "GB         3.00 resident at most; by the end of load 1.00, write 3.00"
    assert lines[-2] == "seconds    3.5: load 1.0, write 2.5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], "--keep"),
        (["--keep", "0", "--seed", "-1"], "2 problems"),
        (["--model", "./missing"], "--model ./missing: no such file"),
        (["--calibration", "missing.txt"], "--calibration missing.txt: no such file"),
    ],
)
def test_errors_are_one_line_and_exit_2(
    arguments: list[str], message: str, tiny_inputs: Callable[[str], CompileConfig], tmp_path: Path
) -> None:
    result = run(*arguments_of(tiny_inputs("llama"), tmp_path / "bundle"), *arguments, "--no-cache")
    if "--calibration" in arguments:
        # Options that repeat add up: the corpus is there, the other file is not.
        result = run(*arguments_of(tiny_inputs("llama"), tmp_path / "bundle")[:-6], *arguments, "--no-cache")
    assert result.exit_code == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.endswith(errors[0] + "\n")
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_an_existing_target_needs_force(
    tiny_inputs: Callable[[str], CompileConfig], tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle("llama"), tmp_path / "bundle")
    result = run(*arguments_of(tiny_inputs("llama"), tmp_path / "bundle"))
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'bundle'} exists; give another -o or add --force to replace it\n"


@pytest.mark.parametrize(
    "word", [["--clusters", "few"], ["--ridge", "x"], ["--selection", "best"], ["--dtype", "int8"]]
)
def test_words_that_click_refuses(word: list[str], tmp_path: Path) -> None:
    result = run("--model", "m", "-o", tmp_path / "b", *word)
    assert result.exit_code == 2
    assert word[0] in result.stderr
    assert word[1] in result.stderr


def test_ctrl_c_says_that_nothing_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: CompileConfig, progress: Progress) -> Manifest:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compile_model", interrupted)
    result = run("--model", "m", "-o", tmp_path / "b")
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted; nothing was left behind\n"


def test_bugs_show_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: CompileConfig, progress: Progress) -> Manifest:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "compile_model", broken)
    assert isinstance(run("--model", "m", "-o", tmp_path / "b").exception, ZeroDivisionError)


@pytest.mark.parametrize(("option", "value"), [("--max-kl", "0.1"), ("--min-top1", "0.9")])
def test_a_keep_ratio_and_a_quality_are_too_much(option: str, value: str, tmp_path: Path) -> None:
    result = run("--model", "m", "-o", tmp_path / "b", "--keep", "0.7", option, value)
    assert result.exit_code == 2
    assert f"--keep and {option}: expected one of them, got both" in result.stderr
    result = run("--model", "m", "-o", tmp_path / "b", "--budget-mb", "80", option, value)
    assert result.exit_code == 2
    assert "expected bytes or a quality to aim at, got both" in result.stderr


def test_a_keep_ratio_and_a_budget_are_too_much(tmp_path: Path) -> None:
    result = run("--model", "m", "-o", tmp_path / "b", "--keep", "0.7", "--budget-mb", "80")
    assert result.exit_code == 2
    assert "--keep and --budget-mb: expected one of them, got both" in result.stderr


@pytest.mark.parametrize("missing", ["--model", "--output"])
def test_model_and_output_are_required(missing: str, tmp_path: Path) -> None:
    arguments = {"--model": "m", "--output": str(tmp_path / "b")}
    del arguments[missing]
    result = run(*(word for pair in arguments.items() for word in pair))
    assert result.exit_code == 2
    assert "Missing option" in result.stderr
    assert missing in result.stderr
