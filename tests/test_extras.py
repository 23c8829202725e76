"""A missing package is named with the extra that brings it; faults of our own are not hidden."""

import sys

import pytest
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.extras import needs_extra, require_package


def test_a_missing_package_is_one_line() -> None:
    message = r"^serving needs the package not_there_at_all; pip install 'coreinfer\[serve\]'$"
    with pytest.raises(ConfigError, match=message), needs_extra("serving", "serve"):
        import not_there_at_all  # type: ignore[import-not-found]  # noqa: F401


@pytest.mark.parametrize("name", ["coreinfer", "coreinfer.runtime.no_such_module"])
def test_a_missing_module_of_ours_is_a_fault(name: str) -> None:
    with pytest.raises(ModuleNotFoundError), needs_extra("serving", "serve"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_another_package_whose_name_begins_like_ours_is_missing_too() -> None:
    with pytest.raises(ConfigError, match="the package coreinfer_plugins"), needs_extra("serving", "serve"):
        raise ModuleNotFoundError("No module named 'coreinfer_plugins'", name="coreinfer_plugins")


def test_a_required_package_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    require_package("this", "--zen", "this")
    assert "this" not in sys.modules
    with pytest.raises(ConfigError, match=r"^--zen needs the package not_there_at_all; pip install that$"):
        require_package("not_there_at_all", "--zen", "that")
