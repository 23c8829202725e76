"""Write docs/cli.md: every option of every command, from the commands themselves.

    python tools/cli_docs.py            # writes docs/cli.md; `make docs` does
    python tools/cli_docs.py --check    # exits 1 where the file is not what would be written

Commands are those of pyproject.toml, so that a new one joins by itself.
"""

import importlib
import inspect
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from coreinfer.bundles import ConfigError
from coreinfer.bundles.shared.command_options import GroupedCommand
from coreinfer.bundles.shared.subcommands import SUBCOMMANDS, SubcommandGroup

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "cli.md"
_INTRODUCTION = """# Commands

Written by `make docs` from the commands themselves; do not edit. Each command shows the same with `--help`. Results go
to stdout, progress and figures to stderr. An expected error prints one line and exits with code 2; Ctrl-C and SIGTERM
exit with code 130.
"""


@dataclass(frozen=True, kw_only=True)
class Script:
    """A console script of pyproject.toml.

    Attributes:
        entry: what it calls; None where its module cannot be imported.
        missing: why it cannot, such as the package that is not installed.
    """

    name: str
    entry: Any
    missing: str | None = None

    @property
    def command(self) -> click.Command | None:
        """The click command, None where the script is something else."""
        return self.entry if isinstance(self.entry, click.Command) else None


def read_scripts(pyproject: Path = ROOT / "pyproject.toml") -> list[Script]:
    """Import the console scripts."""
    return [
        _import(name, target) for name, target in tomllib.loads(pyproject.read_text())["project"]["scripts"].items()
    ]


def _import(name: str, target: str) -> Script:
    module, _, attribute = target.partition(":")
    try:
        entry = getattr(importlib.import_module(module), attribute)
        if isinstance(entry, partial):
            # Of coreinfer.bundles.shared.starting, which imports the command itself when it is called.
            entry = importlib.import_module(*entry.args).main
        return Script(name=name, entry=entry)
    except (ImportError, ConfigError) as error:
        return Script(name=name, entry=None, missing=str(error))


def document(scripts: list[Script]) -> str:
    """Describe the commands in Markdown."""
    return "\n".join([_INTRODUCTION, *(line for script in scripts for line in _section(script))])


def _section(script: Script) -> Iterator[str]:
    yield f"## {script.name}\n"
    if script.command is not None:
        yield from _command(script.name, script.command)
    elif script.missing is not None:
        yield f"Not described: it needs what is not installed here ({script.missing}).\n"
    else:
        yield f"{inspect.getdoc(script.entry) or ''}\n"
        yield f"Its options are those of another program; `{script.name} --help` lists them.\n"


def _command(name: str, command: click.Command) -> Iterator[str]:
    # With the command's own settings, such as show_default, and without parsing anything.
    with command.make_context(name, [], resilient_parsing=True) as context:
        yield f"```\n{name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
        yield f"{inspect.cleandoc(command.help or '')}\n"
        if isinstance(command, SubcommandGroup):
            yield from (
                "| command | |\n|---|---|",
                *(f"| `{name} {sub}` | {_cell(text)} |" for sub, (_, text) in SUBCOMMANDS.items()),
                "",
            )
        if isinstance(command, GroupedCommand):
            for heading, records in command.sections(context):
                yield from (f"### {heading}\n", *_table(records), "")
        else:
            yield from (*_table(_records(command, context)), "")


def _records(command: click.Command, context: click.Context) -> list[tuple[str, str]]:
    # Arguments are explained by the text above.
    options = [parameter for parameter in command.get_params(context) if isinstance(parameter, click.Option)]
    return [record for parameter in options if (record := parameter.get_help_record(context))]


def _table(records: list[tuple[str, str]]) -> Iterator[str]:
    yield "| option | |\n|---|---|"
    for switches, text in records:
        yield f"| `{_cell(switches)}` | {_cell(text)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where docs/cli.md is not current.")
def main(check: bool) -> None:
    """Write docs/cli.md."""
    scripts = read_scripts()
    for script in scripts:
        if script.missing is not None:
            click.echo(f"{script.name}: not described, {script.missing}; install .[compile,eval,lm-eval,dev]", err=True)
    text = document(scripts)
    if not check:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        click.echo("docs/cli.md is not current; run make docs", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
