"""The folder of files that all workers write and read."""

import platform
from pathlib import Path
from uuid import uuid4

from coreinfer.bundles.errors import ConfigError

from .team import Team, Worker

__all__ = ["check_folder"]


def check_folder(team: Team, folder: Path) -> None:
    """Check that what one process writes into a folder all others see there.

    Raises:
        ConfigError: a worker does not.
    """
    mark = folder / f"seen-{uuid4().hex}"
    mark.touch()
    for waiting in [team.call(place, "load", _sees, mark.absolute()) for place in range(team.size)]:
        if (machine := waiting.result()) is not None:
            raise ConfigError(
                f"--ray: worker on {machine}: does not see what is written in {folder.parent}; give an --output and a "
                "--cache on storage that all machines share, under the same path"
            )
    mark.unlink()


def _sees(_worker: Worker, mark: Path) -> str | None:
    """Name this machine, if it does not see a file."""
    return None if mark.exists() else platform.node()
