"""What importing costs, and which way dependencies point: read from the source, and seen in fresh interpreters."""

import ast
import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import coreinfer.bundles
import coreinfer.compiler
import coreinfer.evaluation
import coreinfer.runtime
import coreinfer.server
import pytest

PACKAGES = {
    "bundles": coreinfer.bundles,
    "compiler": coreinfer.compiler,
    "evaluation": coreinfer.evaluation,
    "runtime": coreinfer.runtime,
    "server": coreinfer.server,
}
FORBIDDEN = {
    "bundles": {
        "coreinfer.compiler",
        "coreinfer.evaluation",
        "coreinfer.runtime",
        "coreinfer.server",
        "torch",
        "transformers",
        "faiss",
        "tokenizers",
    },
    "compiler": {"coreinfer.evaluation", "coreinfer.server"},
    "evaluation": {"coreinfer.server"},
    "runtime": {"coreinfer.compiler", "coreinfer.evaluation", "coreinfer.server"},
    "server": {"coreinfer.compiler", "coreinfer.evaluation"},
}
HEAVY = ("torch", "transformers", "sentence_transformers", "sklearn", "datasets", "gguf", "model2vec", "pyarrow", "ray")
ON_RAY = ("coreinfer.compiler.team.on_ray", "coreinfer.runtime.commands.batch_ray", "coreinfer.server.replicas.")
MODULES = sorted(
    module.name
    for name, package in PACKAGES.items()
    for module in pkgutil.walk_packages(package.__path__, f"coreinfer.{name}.")
    if module.name.rpartition(".")[2] not in ("__main__", "_native", "_kernels", "_products")
    # Ray and Triton are not everywhere.
    and (importlib.util.find_spec("ray") or not module.name.startswith(ON_RAY))
    and (importlib.util.find_spec("triton") or not module.name.endswith(".column_kernels"))
)


def sources(package: str) -> list[Path]:
    files = sorted(Path(PACKAGES[package].__path__[0]).rglob("*.py"))
    assert len(files) > 8
    return files


def imported_names(path: Path, package: str) -> Iterator[str]:
    """Absolute names of all that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the folder that the module is in, each further one the folder around it.
            folders = ["coreinfer", package, *folder_names(path, package)]
            base = ".".join(folders[: len(folders) + 1 - node.level]) if node.level else ""
            whole = ".".join(part for part in (base, node.module) if part)
            yield whole
            yield from (f"{whole}.{alias.name}" for alias in node.names)


def folder_names(path: Path, package: str) -> tuple[str, ...]:
    """Names of the folders between a package and a module of it."""
    root = Path(PACKAGES[package].__path__[0])
    return path.parent.relative_to(root).parts if path.is_relative_to(root) else ()


def fresh(code: str) -> str:
    """Run code in an interpreter that has imported nothing of ours; warnings are errors there."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import coreinfer.runtime",
        "from coreinfer import runtime",
        "import coreinfer.bundles",
        "import coreinfer.compiler",
        "import coreinfer.runtime.commands.run, coreinfer.bundles.inspect, coreinfer.compiler.cli\n"
        "import coreinfer.evaluation.cli, coreinfer.server.cli",
    ],
)
def test_no_import_drags_in_the_heavy_packages(statement: str) -> None:
    loaded = json.loads(fresh(f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"))
    assert any(name.startswith("coreinfer.") for name in loaded)
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("from coreinfer import runtime", "coreinfer.compiler"),
        ("import coreinfer.compiler", "coreinfer.runtime"),
        ("import coreinfer.bundles", "faiss"),
    ],
)
def test_packages_load_apart(statement: str, absent: str) -> None:
    assert fresh(f"{statement}\nimport sys\nprint({absent!r} in sys.modules)") == "False\n"


def test_an_answer_waits_for_no_import_that_it_can_do_without(bundle: Path) -> None:
    """Each of these costs 5 ms or more before the first token."""
    absent = {"torch", "asyncio", "numpy.random", "statistics", "coreinfer.runtime.commands.chat"}
    code = (
        "import json, sys\nfrom coreinfer.runtime.commands.run import main\n"
        "print(json.dumps(['faiss' in sys.modules]))\n"
        f"main([{str(bundle)!r}, '-n', '1', '--engine', 'native', 'sea'], standalone_mode=False)\n"
        f"print(json.dumps(sorted({absent!r} & set(sys.modules))))"
    )
    lines = fresh(code).splitlines()
    # FAISS comes while the bundle's files are hashed.
    assert json.loads(lines[0]) == [False]
    assert json.loads(lines[-1]) == []


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_and_has_what_it_promises(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    promised = module.__all__
    assert len(set(promised)) == len(promised)
    for item in promised:
        assert hasattr(module, item), item
        assert not item.startswith("_")


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_have_what_they_promise(name: str) -> None:
    package = PACKAGES[name]
    namespace: dict[str, object] = {}
    exec(f"from coreinfer.{name} import *", namespace)
    assert set(package.__all__) <= namespace.keys()


def test_the_modules_are_all_here() -> None:
    """The tests above go by what is found: it must not be nothing."""
    assert len(MODULES) > 30
    assert {name.split(".")[1] for name in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package: str) -> None:
    wrong = [
        f"{path.name} imports {name}"
        for path in sources(package)
        for name in imported_names(path, package)
        for forbidden in FORBIDDEN[package]
        if name == forbidden or name.startswith(f"{forbidden}.")
    ]
    assert not wrong


def test_the_compiler_uses_the_runtime_for_three_things_only() -> None:
    """To write text, to take apart what transformers has as one or compares, and for what a token wants."""
    names = ("joined", "low_halves", "mixture", "sparse_gate", "wanted_inputs")
    apart = tuple(f"coreinfer.runtime.engines.torch.{name}" for name in names)
    users = {
        path.name
        for path in sources("compiler")
        for name in imported_names(path, "compiler")
        if name.startswith("coreinfer.runtime") and not name.startswith(apart)
    }
    assert users == {"writing.py"}


def test_the_scan_sees_every_form_of_import(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b\nfrom c import d\ndef f():\n"
        "    from . import e\n    from .g import h\n    from ..compiler import i\n"
    )
    names = set(imported_names(path, "runtime"))
    assert {"a.b", "c.d", "coreinfer.runtime.e", "coreinfer.runtime.g.h", "coreinfer.compiler"} <= names


def test_only_the_torch_engine_needs_torch() -> None:
    """At module level; the engine itself is imported when a bundle is loaded."""
    users = {
        f"{path.parent.name}/{path.name}"
        for path in sources("runtime")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and any(h in ast.unparse(node).split() for h in HEAVY if h != "ray")
    }
    assert users == {
        "torch/column_choice.py",
        "torch/column_kernels.py",
        "torch/column_layout.py",
        "torch/column_products.py",
        "torch/column_trial.py",
        "torch/decoder.py",
        "torch/host_weights.py",
        "torch/input_masks.py",
        "torch/joined.py",
        "torch/low_halves.py",
        "torch/mixture.py",
        "torch/model.py",
        "torch/needs.py",
        "torch/packed_linear.py",
        "torch/placement.py",
        "torch/sequences.py",
        "torch/sparse_gate.py",
        "torch/static_step.py",
        "torch/transfer.py",
        "torch/wanted_inputs.py",
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_prints(package: str) -> None:
    """stdout is the product: commands write with click.echo, the rest logs."""
    calls = [
        f"{path.name}:{node.lineno}"
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {"print", "sys.stdout.write", "pprint", "breakpoint"}
    ]
    assert not calls


@pytest.mark.parametrize("package", PACKAGES)
def test_only_commands_echo(package: str) -> None:
    commands = {"cli.py", "run.py", "chat.py", "batch_file.py", "inspect.py", "command.py", "bench.py", "drawing.py"}
    commands |= {"push_command.py"}
    users = {path.name for path in sources(package) if "click.echo" in path.read_text(encoding="utf-8")}
    assert users
    assert users <= commands
