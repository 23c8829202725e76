"""How commands start: what the console scripts call, light enough to answer Ctrl-C before the command is imported.

Importing a command takes up to a second, and an exception in the middle of an import ends in a traceback of somebody
else's. Until the command's own code runs, there is nothing to tidy up, so that a signal may end the process at once.
"""

import os
import signal
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

__all__ = [
    "EXIT_INTERRUPTED",
    "INTERRUPTED",
    "bench",
    "coreinfer",
    "compile_",
    "evaluate",
    "export",
    "inspect",
    "leave",
    "lm_eval",
    "push",
    "run",
    "serve",
    "start",
]

INTERRUPTED = "interrupted; nothing was left behind"
EXIT_INTERRUPTED = 130


def start(module: str) -> None:
    """Import a command and run it.

    Args:
        module: that has the command as `main`, wrapped in `command_errors`, which takes signals over.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        # A shell that starts a job in the background has it ignore Ctrl-C, which is meant for others.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, leave)
    with import_module("coreinfer.bundles.shared.command").errors_on_one_line():
        import_module(module).main()


def leave(signum: int, frame: Any) -> NoReturn:
    """Handle a signal while there is nothing to tidy up."""
    os.write(2, f"error: {INTERRUPTED}\n".encode())
    os._exit(EXIT_INTERRUPTED)


bench = partial(start, "coreinfer.runtime.commands.bench")
coreinfer = partial(start, "coreinfer.bundles.shared.subcommands")
compile_ = partial(start, "coreinfer.compiler.cli")
evaluate = partial(start, "coreinfer.evaluation.cli")
export = partial(start, "coreinfer.compiler.export.cli")
inspect = partial(start, "coreinfer.bundles.inspect")
lm_eval = partial(start, "coreinfer.evaluation.harness")
push = partial(start, "coreinfer.bundles.remote.push_command")
run = partial(start, "coreinfer.runtime.commands.run")
serve = partial(start, "coreinfer.server.cli")
