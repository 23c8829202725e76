"""Options of commands that can run on Ray: where it is, and how many engines it gets."""

from dataclasses import dataclass, field

from .checks import whole_number
from .option_fields import option

__all__ = ["RayOptions"]


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where engines run that are not in this process."""

    ray: str | None = field(
        default=None,
        metadata=option(
            "Run engines on Ray at this address, such as 10.0.0.1:6379; local starts Ray here. Needs the extra ray.",
            unset="one engine in this process",
            metavar="ADDRESS",
        ),
    )
    replicas: int = field(
        default=1, metadata=option("With --ray: number of engines, each with --threads.", check=whole_number(1))
    )
