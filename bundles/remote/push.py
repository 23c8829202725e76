"""Upload a bundle to the Hugging Face Hub, in one commit."""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from coreinfer.bundles.errors import BundleCorrupt, BundleError, ConfigError, join_problems
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import Manifest, read_manifest
from coreinfer.bundles.model_card import ModelCard, write_card
from coreinfer.bundles.reader import find_problems
from coreinfer.bundles.shared.extras import needs_extra

from .faults import reason_of
from .places import HubPlace

__all__ = ["Pushed", "push_bundle"]

_CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was uploaded.

    Attributes:
        commit: its id on the Hub.
        num_bytes: of all files of the bundle.
    """

    commit: str
    num_files: int
    num_bytes: int


def push_bundle(bundle_dir: Path, place: HubPlace, *, private: bool, message: str | None = None) -> Pushed:
    """Check a bundle whole, then upload it; a repository that does not exist is created.

    What an earlier upload had and this bundle has not, such as packs of more clusters, is deleted in the same commit.

    Raises:
        BundleError: there is no bundle, it is damaged, or the Hub does not take it.
        ConfigError: huggingface_hub is not installed, or the Hub takes no such names.
    """
    manifest = read_manifest(bundle_dir)
    if problems := find_problems(bundle_dir, manifest):
        raise BundleCorrupt(f"bundle {bundle_dir}: {join_problems(problems)}; copy or compile it again")
    with needs_extra("pushing a bundle", "remote"):
        from httpx2 import TransportError
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    api, names = HfApi(library_name="coreinfer"), [LAYOUT.manifest, *manifest.files]
    card = write_card(manifest, _card(manifest, place)).encode()
    try:
        api.create_repo(place.repo, private=private, exist_ok=True)
        if place.revision != "main":
            api.create_branch(place.repo, branch=place.revision, exist_ok=True)
        there = api.list_repo_files(place.repo, revision=place.revision)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=bundle_dir / name) for name in names
        ]
        operations.append(CommitOperationAdd(path_in_repo=_CARD, path_or_fileobj=card))
        operations += [CommitOperationDelete(path_in_repo=name) for name in there if _is_left_over(name, names)]
        done = api.create_commit(
            place.repo,
            operations,
            commit_message=message or f"Bundle of {manifest.model.name}",
            revision=place.revision,
        )
    except HFValidationError as error:
        raise ConfigError(f"{place}: {reason_of(error)}") from error
    except (HfHubHTTPError, LocalTokenNotFoundError, TransportError, OSError, RuntimeError) as error:
        # A RuntimeError is what a failed upload of one file becomes.
        raise BundleError(
            f"{place}: cannot be pushed ({reason_of(error)}); check name, token (HF_TOKEN) and connection"
        ) from error
    num_bytes = sum(record.bytes for record in manifest.files.values())
    return Pushed(commit=done.oid, num_files=len(names), num_bytes=num_bytes)


def _is_left_over(name: str, names: list[str]) -> bool:
    of_bundles = (f"{LAYOUT.clusters}/*.safetensors", LAYOUT.dense, LAYOUT.chat_template, LAYOUT.tool_template)
    return name not in names and any(fnmatch(name, pattern) for pattern in of_bundles)


def _card(manifest: Manifest, place: HubPlace) -> ModelCard:
    return ModelCard(
        title=f"{manifest.model.name}, a CoreInfer bundle",
        tags=("text-generation",),
        summary=(
            f"The model {manifest.model.name} with narrow FFNs for {len(manifest.clusters)} kinds of text. The runtime "
            "fetches the pack of a kind when the first prompt of it comes."
        ),
        usage=(
            "```python",
            "from coreinfer import runtime",
            "",
            f'print(runtime.load("{place}").generate("How do I make tomato soup?").text)',
            "```",
        ),
        facts={"formats": ", ".join(f"{group} {record.format}" for group, record in manifest.quantization.items())},
    )
