"""`coreinfer`: all commands under one name, each imported when it is called."""

from importlib import import_module

import click
from click.shell_completion import CompletionItem

__all__ = ["SUBCOMMANDS", "SubcommandGroup", "main"]

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "compile": ("coreinfer.compiler.cli", "Compile a language model into a bundle."),
    "run": ("coreinfer.runtime.commands.run", "Generate with a bundle: an answer, a chat, a file of prompts."),
    "serve": ("coreinfer.server.cli", "Serve bundles over HTTP, with OpenAI's API and a page."),
    "eval": ("coreinfer.evaluation.cli", "Measure a bundle's quality, by task."),
    "bench": ("coreinfer.runtime.commands.bench", "Measure a bundle's speed next to the machine's read bandwidth."),
    "inspect": ("coreinfer.bundles.inspect", "Show what a bundle contains, and verify it."),
    "export": ("coreinfer.compiler.export.cli", "Write a pack or the dense model for llama.cpp or transformers."),
    "push": ("coreinfer.bundles.remote.push_command", "Upload a bundle to the Hugging Face Hub."),
}
"""Name -> module that has the command as `main`, and what it does; said here, for the help to import none of them."""


class SubcommandGroup(click.Group):
    """A group whose commands are imported when they are called; help and completion import none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in SUBCOMMANDS:
            return None
        command: click.Command = import_module(SUBCOMMANDS[cmd_name][0]).main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in SUBCOMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name, or an option of the group."""
        found = [
            CompletionItem(name, help=text) for name, (_, text) in SUBCOMMANDS.items() if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


@click.command(cls=SubcommandGroup, name="coreinfer")
@click.version_option(package_name="coreinfer")
def main() -> None:
    """Make language models small by clusters of text, and decode with them.

    Each command is also installed by itself, as coreinfer-run and so on.
    """
