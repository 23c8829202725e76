"""Where a bundle is: in a folder, or behind an address."""

import re
from dataclasses import dataclass
from pathlib import Path

from coreinfer.bundles.errors import ConfigError

__all__ = ["HubPlace", "WebPlace", "hub_place", "is_address", "parse_place"]

_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# A Path has one slash where the address had two.
_WEB = re.compile(r"(?P<scheme>https?|s3):/+(?P<rest>[^/].*)")
_ADDRESS = re.compile(r"hf:.*|[a-z][a-z0-9+.-]+:(/.*)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class HubPlace:
    """A repository of the Hub.

    Attributes:
        repo: "USER/NAME".
        revision: branch, tag or commit.
    """

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        """Return the form in which it was given."""
        return f"hf:{self.repo}" if self.revision == "main" else f"hf:{self.repo}@{self.revision}"


@dataclass(frozen=True, kw_only=True)
class WebPlace:
    """A folder that fsspec reads, by its address without a slash at the end."""

    address: str

    def __str__(self) -> str:
        """Return the address."""
        return self.address


def parse_place(text: str | Path) -> HubPlace | WebPlace | None:
    """Tell an address from a folder, which is None.

    Raises:
        ConfigError: it begins like an address, and is none from which bundles are fetched.
    """
    given = str(text)
    if given.startswith("hf:"):
        return hub_place(given)
    if match := _WEB.fullmatch(given):
        return WebPlace(address=f"{match['scheme']}://{match['rest'].rstrip('/')}")
    if is_address(given):
        raise ConfigError(f"{given}: expected a folder, hf:USER/NAME, https://HOST/PATH or s3://BUCKET/PATH")
    return None


def is_address(text: str | Path) -> bool:
    """Whether a text begins like an address, of whatever kind, and no file has it as its name."""
    return _ADDRESS.fullmatch(str(text)) is not None and not Path(text).exists()


def hub_place(given: str) -> HubPlace:
    """Read "hf:USER/NAME[@REVISION]".

    Raises:
        ConfigError: it is not of this form.
    """
    match = _HUB.fullmatch(given)
    if match is None:
        raise ConfigError(f"{given}: expected hf:USER/NAME or hf:USER/NAME@REVISION")
    return HubPlace(repo=match["repo"], revision=match["revision"] or "main")
