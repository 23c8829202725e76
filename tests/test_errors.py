import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys

import coreinfer.bundles
import pytest
from coreinfer.bundles import errors

MODULES = [
    "coreinfer.bundles",
    *(f"coreinfer.bundles.{module.name}" for module in pkgutil.iter_modules(coreinfer.bundles.__path__)),
]


def drawn_tree() -> dict[str, str]:
    """Error -> parent, read from the drawing in the module's docstring: four columns a level."""
    parents: dict[str, str] = {}
    path = ["Exception"]
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"(?: {4})+(?:[├└]── |│   )*([A-Z]\w+)", line):
            depth = match.start(1) // 4
            parents[match[1]] = path[depth - 1]
            path[depth:] = [match[1]]
    return parents


def test_the_errors_are_as_drawn() -> None:
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value) and name in errors.__all__}
    assert {name: [base.__name__ for base in value.__bases__] for name, value in classes.items()} == {
        name: [parent] for name, parent in drawn_tree().items()
    }
    assert set(errors.__all__) == {*classes, "join_problems"}
    assert drawn_tree()["BundleCorrupt"] == "BundleError"


def test_the_package_offers_every_error_and_no_copies() -> None:
    for name in drawn_tree():
        assert name in coreinfer.bundles.__all__
        assert getattr(coreinfer.bundles, name) is getattr(errors, name)


@pytest.mark.parametrize("name", MODULES)
def test_what_a_module_offers_exists_and_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    assert module.__all__ or hasattr(module, "__path__")
    for offered in module.__all__:
        value = getattr(module, offered)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, offered


def test_one_problem_stands_alone_and_several_are_numbered_on_one_line() -> None:
    assert errors.join_problems(["a: missing"]) == "a: missing"
    assert errors.join_problems(["a: missing", "b: cut"]) == "2 problems: (1) a: missing; (2) b: cut"


THIRD_PARTY_OF_EACH = """
import importlib, json, sys
tops = lambda: {name.partition(".")[0] for name in sys.modules}
seen = tops() | set(sys.stdlib_module_names)
found = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    found[name] = sorted(tops() - seen)
    seen |= tops()
print(json.dumps(found))
"""


def test_the_package_needs_numpy_safetensors_and_click_only() -> None:
    """Whoever loads a bundle must not have to install torch, nor wait for its import."""
    command = [sys.executable, "-c", THIRD_PARTY_OF_EACH, *MODULES]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    imported = json.loads(result.stdout)
    assert list(imported) == MODULES
    allowed = {"coreinfer", "numpy", "safetensors", "click"}
    assert {name: tops for name, tops in imported.items() if not allowed.issuperset(tops)} == {}
    # The package alone is there before numpy is: commands must answer Ctrl-C by then.
    assert imported["coreinfer.bundles"] == ["coreinfer"]
    assert "numpy" in {top for tops in imported.values() for top in tops}
