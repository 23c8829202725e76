"""Options of a server whose engines run on Ray."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

from coreinfer.bundles.shared.checks import raise_problems, whole_number
from coreinfer.bundles.shared.option_fields import field_problems, option
from coreinfer.bundles.shared.ray_options import RayOptions

__all__ = ["ReplicaConfig", "RouteBy"]

RouteBy = Literal["cluster", "load"]


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig(RayOptions):
    """How many engines answer for each bundle, and which of them gets a request."""

    max_replicas: int | None = field(
        default=None,
        metadata=option(
            "With --ray: let the number of engines of each bundle grow from --replicas to this while requests wait.",
            check=whole_number(1),
            unset="it stays",
        ),
    )
    route_by: RouteBy = field(
        default="cluster",
        metadata=option(
            "With --ray: ask the engine that used the pack of a request's cluster before (cluster), or Ray's own "
            "choice by load (load)."
        ),
    )

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ConfigError: naming all options that are wrong.
        """
        raise_problems(field_problems(self))
        raise_problems(_conflicts(self))

    @property
    def most_replicas(self) -> int:
        """Engines of a bundle, at most, when no bundle is exchanged."""
        return self.max_replicas or self.replicas


def _conflicts(config: ReplicaConfig) -> Iterator[str]:
    if config.ray is None and any(getattr(config, item.name) != item.default for item in fields(config)):
        yield "--replicas, --max-replicas, --route-by: they are for engines on Ray; give --ray ADDRESS, or --ray local"
    if config.max_replicas is not None and config.max_replicas < config.replicas:
        yield f"--max-replicas: expected at least --replicas {config.replicas}, got {config.max_replicas}"
