"""A bundle on the Hugging Face Hub, in the Hub's own cache."""

import logging
from collections.abc import Callable
from pathlib import Path

from coreinfer.bundles.errors import BundleError, BundleNotFound, ConfigError
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import FileRecord
from coreinfer.bundles.shared.extras import needs_extra

from .faults import reason_of
from .opening import Mirror
from .places import HubPlace

__all__ = ["mirror_hub"]

_log = logging.getLogger(__name__)
_NUM_TRIES = 5


def mirror_hub(place: HubPlace) -> Mirror:
    """Fetch the manifest of a repository; its other files then come from the same commit.

    Without a connection, what was fetched before serves.

    Raises:
        BundleNotFound: there is no such repository, revision or bundle, or it may not be read.
        BundleError: the Hub cannot be reached.
        ConfigError: huggingface_hub is not installed, or the Hub has no such names.
    """
    with needs_extra(f"a bundle at {place}", "remote"):
        # Releases of huggingface_hub before 2, which tokenizers takes too, have another HTTP library.
        import httpx2  # noqa: F401
        import huggingface_hub
    manifest = _tried(place, LAYOUT.manifest, lambda: _download(place, LAYOUT.manifest, place.revision, anew=False))
    # .../snapshots/COMMIT/manifest.json
    folder, commit = manifest.parent, manifest.parent.name
    _log.info("%s is commit %s, huggingface_hub %s", place, commit[:12], huggingface_hub.__version__)

    def download(name: str, record: FileRecord, anew: bool) -> None:
        _tried(place, name, lambda: _download(place, name, commit, anew=anew))

    return Mirror(place=str(place), folder=folder, download=download)


def _download(place: HubPlace, name: str, revision: str, *, anew: bool) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(place.repo, name, revision=revision, force_download=anew, library_name="coreinfer"))


def _tried(place: HubPlace, name: str, download: Callable[[], Path]) -> Path:
    """Download, again where the connection broke in a way that huggingface_hub does not go on from."""
    from httpx2 import TransportError
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    problem: BaseException | None = None
    for _ in range(_NUM_TRIES):
        try:
            return download()
        except HFValidationError as error:
            raise ConfigError(f"{place}: {reason_of(error)}") from error
        except LocalEntryNotFoundError as error:
            # The Hub was not reached, and nothing was fetched before; its cause says why.
            problem = error.__cause__ or error
            break
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise BundleNotFound(
                f"{place}: no {name} there ({reason_of(error)}); check name, revision and token"
            ) from error
        except HfHubHTTPError as error:
            raise BundleError(f"{place}: {name} cannot be fetched ({reason_of(error)}); try again later") from error
        except (OSError, TransportError) as error:
            problem = error
            _log.info("%s: %s broke off (%s); trying again", place, name, error)
    raise BundleError(
        f"{place}: {name} cannot be fetched ({reason_of(problem)}); check the connection and run the same again"
    ) from problem
