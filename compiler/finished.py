"""Whole bundles in the cache: the same command again copies what it compiled before, and imports no torch.

A bundle is found by all that shapes it: options, the bytes of model, encoder and text, the machine's arithmetic, the
versions of packages, and the bytes of this program.
"""

import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coreinfer.bundles.checksums import file_sha256
from coreinfer.bundles.errors import BundleError
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import Manifest, read_manifest
from coreinfer.bundles.reader import find_problems
from coreinfer.bundles.shared.machine import bf16_products_are_faster, usable_cores
from coreinfer.bundles.writer import stage_bundle

from .cache import stage_key
from .checks import Inputs
from .config import BUILTIN, CompileConfig
from .models.primitives import PRIMITIVES_VARIABLE
from .program import program_sha256
from .progress import Progress
from .stage_store import local_folder
from .text.reading import is_local

__all__ = ["Identity", "identify", "keep_finished", "take_finished"]

_log = logging.getLogger(__name__)
_STAGE = "bundle"
_ELSEWHERE = frozenset({"output", "force", "cache_dir", "model", "encoder", "ray", "workers"})
"""Options that shape nothing, or are in the key by what they name."""
_PACKAGES = (
    "accelerate",
    "datasets",
    "faiss-cpu",
    "gguf",
    "jinja2",
    "markupsafe",
    "model2vec",
    "numpy",
    "pyarrow",
    "safetensors",
    "scikit-learn",
    "scipy",
    "sentence-transformers",
    "skeletoken",
    "tokenizers",
    "torch",
    "transformers",
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_ARITHMETIC_PREFIXES = ("ATEN_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_", "TORCH_")
"""Of environment variables that may change how many threads add, and in which order."""
_WITHOUT_EFFECT = frozenset({PRIMITIVES_VARIABLE, "KMP_BLOCKTIME", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"})
"""Of those: what this package, llama.cpp and scikit-learn set in a running process, and which changes no sum."""
_DIGEST_CHARACTERS = 24
_MOST_BUNDLES = 4
"""That the cache keeps: the ones that were made or taken last."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What is compiled, in hashes.

    Attributes:
        model_sha256: of `ModelSource.sha256`.
        key: of all that shapes the bundle; None where there is no cache, or where something comes from the Hub that may
            change there.
    """

    model_sha256: str
    key: str | None


def identify(config: CompileConfig, inputs: Inputs, model_config: Mapping[str, Any] | None = None) -> Identity:
    """Hash what is compiled.

    Args:
        model_config: of a model on the Hub, whose files are not hashed, with its `revision`.
    """
    stated = model_config or {}
    model_sha256 = inputs.model.sha256(stated)
    files = [source for source in inputs.texts if is_local(source)]
    is_fixed = inputs.encoder.path and (inputs.model.path or stated.get("revision"))
    if config.cache_dir is None or not is_fixed or {*inputs.texts} - {*files, BUILTIN}:
        return Identity(model_sha256=model_sha256, key=None)
    key = stage_key(
        _STAGE,
        options={name: value for name, value in asdict(config).items() if name not in _ELSEWHERE},
        model=[inputs.model.name, model_sha256],
        encoder=[inputs.encoder.name, inputs.encoder.sha256({})],
        texts=[[source, file_sha256(Path(source).expanduser())] for source in files],
        places=config.num_places,
        machine=[platform.machine(), bf16_products_are_faster(), _num_threads(config), usable_cores()],
        environment=_arithmetic_variables(),
        packages={name: _version(name) for name in _PACKAGES},
        program=[*sys.version_info[:3], program_sha256()],
    )
    return Identity(model_sha256=model_sha256, key=key)


def _num_threads(config: CompileConfig) -> int | str | None:
    """What bounds torch's threads; a program that uses torch already may have set them."""
    if config.threads is not None:
        return config.threads
    if (torch := sys.modules.get("torch")) is not None:
        return min(int(torch.get_num_threads()), usable_cores())
    stated = next((os.environ[name] for name in _THREAD_VARIABLES if name in os.environ), None)
    return min(int(stated), usable_cores()) if stated and stated.isdigit() else stated or usable_cores()


def _arithmetic_variables() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_ARITHMETIC_PREFIXES) and name not in _WITHOUT_EFFECT
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def take_finished(config: CompileConfig, identity: Identity, progress: Progress) -> Manifest | None:
    """Copy a bundle from the cache to `config.output`; None if it is not there, or is damaged, which is logged.

    Raises:
        BundleError: the target exists, or the disk cannot take the bundle.
    """
    if config.cache_dir is None or identity.key is None:
        return None
    for entry in sorted(local_folder(config.cache_dir).glob(f"{identity.key}.*")):
        manifest = _whole(entry)
        if manifest is not None:
            with progress.stage("copy", 1) as advance, stage_bundle(config.output, force=config.force) as stage:
                # Copied, not linked: what is done to one bundle must not happen to another.
                shutil.copytree(entry, stage, dirs_exist_ok=True, copy_function=shutil.copyfile)
                advance()
            with suppress(OSError):
                os.utime(entry)
            _log.info("%s: nothing to compile, taken whole from %s", config.output, entry)
            return manifest
    return None


def _whole(entry: Path) -> Manifest | None:
    """Read the manifest of a bundle in the cache whose files are all as they were stored."""
    try:
        problems = [] if _place(entry).name == entry.name else [f"{LAYOUT.manifest}: not as it was stored"]
        manifest = read_manifest(entry)
        problems += find_problems(entry, manifest)
    except (OSError, BundleError) as error:
        problems = [str(error)]
    if not problems:
        return manifest
    _log.warning("cache folder %s cannot be used (%s); compiling again", entry, problems[0])
    return None


def keep_finished(config: CompileConfig, identity: Identity, bundle: Path) -> None:
    """Put a complete bundle into the cache: by hard links where the disk is the same, which takes no room.

    A cache that cannot take it is logged: the bundle is there all the same.
    """
    if config.cache_dir is None or identity.key is None:
        return
    folder = local_folder(config.cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{identity.key}.", dir=folder))
        try:
            shutil.copytree(bundle, temporary, dirs_exist_ok=True, copy_function=_link)
            for damaged in folder.glob(f"{identity.key}.*"):
                shutil.rmtree(damaged)
            os.utime(temporary)
            temporary.rename(_place(temporary, folder / identity.key))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in sorted(folder.glob(f"{_STAGE}-*"), key=_time_of, reverse=True)[_MOST_BUNDLES:]:
            shutil.rmtree(old)
    except OSError as error:
        _log.warning("cache folder %s cannot keep the bundle (%s), which next time is compiled again", folder, error)


def _time_of(entry: Path) -> int:
    return entry.stat().st_mtime_ns


def _place(bundle: Path, stem: Path | None = None) -> Path:
    """Name a bundle in the cache by the hash of its manifest too, which has those of all other files."""
    digest = file_sha256(bundle / LAYOUT.manifest)[:_DIGEST_CHARACTERS]
    return (stem or bundle).with_suffix(f".{digest}")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
