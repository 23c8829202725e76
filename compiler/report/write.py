"""The report that ships in a bundle: one self-contained page, readable without its script."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import jinja2
from coreinfer.bundles.manifest import Manifest
from markupsafe import Markup

from .map_points import MapPoint
from .view import report_view

__all__ = ["file_sizes", "write_report"]


def write_report(
    path: Path, manifest: Manifest, points: Sequence[MapPoint] = (), file_bytes: Mapping[str, int] | None = None
) -> None:
    """Write what was compiled as a page: map, clusters, quality, layer budgets, bytes, expected speed, origin.

    Args:
        points: calibration sentences on the map.
        file_bytes: sizes of the bundle's files, by name; the manifest lists them only after the report is written.
    """
    script = _part("page.js")
    page = _environment().get_template("page.html.jinja")
    html = page.render(
        # Ours, and nothing of the bundle's: the only text that is not escaped.
        script=Markup(script),
        style=Markup(_part("page.css")),
        script_hash=_policy_hash(script),
        **report_view(manifest, points, file_bytes or {}),
    )
    path.write_text(html.lstrip(), encoding="utf-8")


def file_sizes(folder: Path) -> dict[str, int]:
    """List the files of a folder and their bytes, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _environment() -> jinja2.Environment:
    """Sentences and labels are other people's text: autoescape keeps it text."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(_part),
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "megabytes": lambda size: f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB",
        "ratio": lambda value: f"{value:.2f}",
    }
    return environment


def _part(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text(encoding="utf-8")


def _policy_hash(script: str) -> str:
    """Name the one script that the page's content security policy lets run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
