"""Options of a compile that do not apply to models whose layers pass several streams, and keys and values."""

from coreinfer.bundles.errors import ConfigError, join_problems
from coreinfer.bundles.families import Family

from .config import CompileConfig

__all__ = ["check_stream_options"]


def check_stream_options(config: CompileConfig, family: Family, name: str) -> None:
    """Refuse options that are not there for such models.

    Args:
        name: of the model in an error.
    Raises:
        ConfigError: some were given; all are named.
    """
    if not family.has_streams:
        return
    given = {
        "--token-share: what goes around the attention reads its inputs too, and no share was tried there": (
            config.token_share is not None
        ),
        "--max-memory: each layer needs parts of tables that lie outside of it": config.max_memory is not None,
    }
    if wrong := [option for option, is_given in given.items() if is_given]:
        raise ConfigError(
            f"--model {name} is a {family.name}, for which some options do not apply: {join_problems(wrong)}; "
            "leave these out"
        )
