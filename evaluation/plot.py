"""KL against the bytes that a token reads, as a picture."""

from pathlib import Path

from coreinfer.bundles import ConfigError
from coreinfer.bundles.shared.extras import require_package

from .scores import Evaluation
from .tables import mean_scores

__all__ = ["check_plot", "write_plot"]

_SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Refuse what could not be drawn, before hours are spent on figures.

    Raises:
        ConfigError: another suffix than .png and .svg, a folder that is not there, or no matplotlib.
    """
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"--plot {path}: expected a name that ends in {' or '.join(_SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: expected a name in an existing folder")
    require_package("matplotlib", "--plot", "'coreinfer[eval]'")


def write_plot(result: Evaluation, path: Path) -> None:
    """Draw one point a row: mean KL over text data sets, on a logarithmic scale.

    Raises:
        ConfigError: no row has both a KL and bytes.
    """
    # A second of import, for those who want a picture.
    from matplotlib.figure import Figure

    means = mean_scores(result)
    points = [
        (row.bytes_per_token / 1e6, means[row.name]["KL"], row.name)
        for row in result.rows
        if row.bytes_per_token is not None and means.get(row.name, {}).get("KL", 0) > 0
    ]
    if not points:
        raise ConfigError("--plot: no row has both a KL and known bytes; give --data with lm_ files and a reference")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (megabytes, kl, name) in enumerate(points):
        axes.plot([megabytes], [kl], "s" if name.startswith("llama.cpp") else "o", color=f"C{number % 10}", label=name)
    axes.set_yscale("log")
    axes.set_xlabel("MB of weights read for a token")
    axes.set_ylabel(f"KL to {result.reference}, nats a token")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
