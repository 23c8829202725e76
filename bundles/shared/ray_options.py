"""Options of commands that can run on Ray: where it is, and how many engines it gets."""

from dataclasses import dataclass, field

from .checks import raise_problems, whole_number
from .option_fields import field_problems, option

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

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ConfigError: naming all options that are wrong.
        """
        raise_problems(field_problems(self))
        if self.ray is None and self.replicas != 1:
            raise_problems(["--replicas: it is for engines on Ray; give --ray ADDRESS, or --ray local"])
