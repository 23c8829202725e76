"""A model of a file or folder, in float32, as a compile loads it."""

from pathlib import Path

from coreinfer.compiler.models.load import LoadedModel, load_model, read_config
from coreinfer.compiler.models.sources import ModelSource, find_source


def load(path: Path, *, mapped: bool = False, source: ModelSource | None = None) -> LoadedModel:
    source = source or find_source(str(path))
    family, config = read_config(source)
    return load_model(source, family, config, device="cpu", dtype="float32", mapped=mapped)
