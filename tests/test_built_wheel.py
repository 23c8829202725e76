"""The wheel: what is in it, and what works where only it and its own requirements are installed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from .model_factory import corpus_texts

ROOT = Path(__file__).parent.parent
SHIPPED = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "bundles",
    "compiler",
    "evaluation",
    "runtime",
    "server",
    "tests",
    "benchmarks",
)
COMMANDS = (
    "coreinfer",
    "coreinfer-bench",
    "coreinfer-compile",
    "coreinfer-eval",
    "coreinfer-export",
    "coreinfer-inspect",
    "coreinfer-push",
    "coreinfer-run",
    "coreinfer-serve",
)


def execute(*arguments: object, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program away from the source, with nothing of this environment on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        list(map(str, arguments)),
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables},
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing that an earlier build left in the tree can get in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    # What the optimizer does to the modules, every other test shows; here it would take minutes.
    execute(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", source, COREINFER_CXXFLAGS="-O0")
    built = list((folder / "dist").glob("*.whl"))
    assert len(built) == 1
    return built[0]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that holds the wheel and its base requirements."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    execute(sys.executable, "-m", "venv", environment)
    execute(environment / "bin/python", "-m", "pip", "install", "--quiet", wheel)
    return environment / "bin"


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    packages = ("bundles", "compiler", "evaluation", "runtime", "server")
    expected = {
        f"coreinfer/{path.relative_to(ROOT)}" for package in packages for path in (ROOT / package).rglob("*.py")
    }
    expected |= {f"coreinfer/{package}/py.typed" for package in packages}
    expected |= {"coreinfer/server/routes/page.html", "coreinfer/compiler/text/seeds.jsonl"}
    expected |= {f"coreinfer/{path.relative_to(ROOT)}" for path in (ROOT / "compiler/report/page").iterdir()}
    for module in ("runtime/engines/native/_native", "compiler/quantize/_kernels", "compiler/prune/_products"):
        expected |= {f"coreinfer/{module}{suffix}" for suffix in (".pyi", sysconfig.get_config_var("EXT_SUFFIX"))}
    assert set(names) == expected
    assert len(names) == len(expected)


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
    required = re.findall(r"^Requires-Dist: ([A-Za-z0-9_.-]+)(.*)$", archive.read(metadata).decode(), re.MULTILINE)
    base = {name for name, rest in required if "extra ==" not in rest}
    assert base == {"click", "jinja2", "numpy", "safetensors", "tokenizers", "tqdm"}
    extras = {extra for _, rest in required for extra in re.findall(r"extra == ['\"]([\w-]+)", rest)}
    assert extras == {"torch", "compile", "dev", "eval", "faiss", "json", "lm-eval", "ray", "remote", "serve", "unpack"}
    assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())


def test_everything_imports_from_the_wheel(installed: Path) -> None:
    code = (
        "import sys, coreinfer.bundles, coreinfer.compiler, coreinfer.compiler.cli\n"
        "from coreinfer import runtime\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "print(runtime.__file__)\nprint(runtime.load.__name__, coreinfer.compiler.compile_model.__name__)"
    )
    # Warnings of this project's own modules are errors; faiss has some of its own.
    where, names = execute(installed / "python", "-W", "error::SyntaxWarning", "-c", code).stdout.splitlines()
    assert Path(where).is_relative_to(installed.parent)
    assert names == "load compile_model"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_installed(command: str, installed: Path) -> None:
    shown = execute(installed / command, "--help")
    assert shown.stdout.startswith(f"Usage: {command} [OPTIONS]")
    assert shown.stderr == ""
    assert re.fullmatch(r"\S+, version \d+\.\d+\.\d+\n", execute(installed / command, "--version").stdout)


def test_the_compiler_is_a_module_too(installed: Path) -> None:
    shown = execute(installed / "python", "-m", "coreinfer.compiler", "--help").stdout
    assert shown.startswith("Usage: ")
    assert "--calibration" in shown


def test_compiling_names_the_extra(installed: Path, tmp_path: Path) -> None:
    done = execute(installed / "coreinfer-compile", "--model", "any", "-o", tmp_path / "out", "--no-cache", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: compiling needs the package \w+; pip install 'coreinfer\[compile\]'\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_serving_names_the_extra(installed: Path, tmp_path: Path) -> None:
    done = execute(installed / "coreinfer-serve", tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: serving needs the package \w+; pip install 'coreinfer\[serve\]'\n", done.stderr)


def test_exporting_names_the_extra(installed: Path, tmp_path: Path) -> None:
    done = execute(installed / "coreinfer", "export", tmp_path, "--to", "gguf", "-o", tmp_path / "out", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: exporting needs the package \w+; pip install 'coreinfer\[compile\]'\n", done.stderr)


def test_the_harness_names_the_extra(installed: Path) -> None:
    done = execute(installed / "coreinfer-lm-eval", "--help", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: lm-evaluation-harness needs the package lm_eval; pip install 'coreinfer\[lm-eval\]'\n", done.stderr
    )


def test_running_needs_no_extra(installed: Path, tiny_bundle: Callable[..., Path]) -> None:
    done = execute(installed / "coreinfer-run", tiny_bundle("llama"), corpus_texts()[0], "-n", 8)
    assert done.stdout.strip()
    assert "tok/s" in done.stderr


def test_the_torch_engine_names_the_extra(installed: Path, tiny_bundle: Callable[..., Path]) -> None:
    done = execute(
        installed / "coreinfer-run", tiny_bundle("llama"), corpus_texts()[0], "--engine", "torch", check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the torch engine needs the package torch; pip install 'coreinfer[torch]'\n"


def test_inspecting_needs_no_extra(installed: Path, tiny_bundle: Callable[..., Path]) -> None:
    shown = execute(installed / "coreinfer-inspect", tiny_bundle("llama"), "--verify")
    assert "no problems" in shown.stdout
    assert shown.stderr == ""
