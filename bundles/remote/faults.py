"""What goes wrong between this machine and storage elsewhere."""

__all__ = ["is_of_network", "reason_of"]


def is_of_network(error: Exception) -> bool:
    """Whether an error comes from storage or the way there; each file system has its own kinds."""
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | TimeoutError) or bool(packages & {"aiohttp", "botocore", "fsspec"})


def reason_of(error: BaseException | None) -> str:
    """Its first line."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
