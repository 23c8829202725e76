"""docs/cli.md is current, and each option says what it is for and what it is otherwise."""

import re
from pathlib import Path
from typing import Any

import click
import pytest

from .programs import load_program

tool: Any = load_program("tools/cli_docs.py")
SCRIPTS = tool.read_scripts()
COMMANDS = [script for script in SCRIPTS if script.command is not None]
OPTIONS = [
    pytest.param(script, parameter, id=f"{script.name} {parameter.opts[-1]}")
    for script in COMMANDS
    for parameter in script.command.params
    if isinstance(parameter, click.Option)
]


def test_the_file_is_current() -> None:
    missing = [f"{script.name}: {script.missing}" for script in SCRIPTS if script.missing]
    if missing:
        pytest.skip(f"extras are not installed: {'; '.join(missing)}")
    assert tool.TARGET.read_text(encoding="utf-8") == tool.document(SCRIPTS), "run make docs"


def test_every_command_has_a_section() -> None:
    text = tool.document(SCRIPTS)
    assert re.findall(r"^## (\S+)", text, re.MULTILINE) == [script.name for script in SCRIPTS]
    assert {"coreinfer-run", "coreinfer-compile", "coreinfer-inspect", "coreinfer-bench"} <= {
        script.name for script in COMMANDS
    }


@pytest.mark.parametrize(("script", "option"), OPTIONS)
def test_each_option_is_in_help_and_docs_with_its_default(script: Any, option: click.Option) -> None:
    section = tool.document([script])
    with script.command.make_context(script.name, [], resilient_parsing=True) as context:
        names, text = option.get_help_record(context) or ("", "")
        shown = script.command.get_help(context)
    for name in [*option.opts, *option.secondary_opts]:
        assert re.search(rf"(?<!\S){re.escape(name)}\b", shown)
        assert re.search(rf"^\| `[^`]*(?<![\w-]){re.escape(name)}\b", section, re.MULTILINE), names
    assert option.help
    assert len(option.help.split()) >= 2
    if not option.is_flag or option.secondary_opts:
        assert "[default: " in text or "[required]" in text


def test_what_is_missing_or_no_click_command_is_said(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project.scripts]\na = "not_there_at_all:main"\nb = "json.tool:main"\n', encoding="utf-8")
    text = tool.document(tool.read_scripts(pyproject))
    assert "Not described: it needs what is not installed here (No module named 'not_there_at_all')" in text
    assert "Its options are those of another program; `b --help` lists them." in text
