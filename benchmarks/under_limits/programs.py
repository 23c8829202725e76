"""The C workers of the memory benchmark: engines in processes without Python."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

__all__ = ["build_coreinfer_worker", "build_llamacpp_worker", "worker_command"]

_ROOT = Path(__file__).parents[2]
_SOURCES = Path(__file__).with_name("c_workers")
_PYTHON_WORKER = Path(__file__).with_name("python_worker.py")
_LLAMA_INCLUDES = ("vendor/llama.cpp/include", "vendor/llama.cpp/ggml/include")


def build_coreinfer_worker(work: Path) -> Path:
    """Build libcoreinfer and the worker; returns the program."""
    library = work / "capi"
    subprocess.run(["bash", str(_ROOT / "tools/build-capi.sh"), str(library)], check=True)
    return _compile("coreinfer_worker", work, [library / "include"], library / "lib", ["coreinfer"])


def build_llamacpp_worker(work: Path, source: Path) -> Path:
    """Build the worker against the library that llama-cpp-python has installed; returns the program.

    Args:
        source: the unpacked sources of the same version of llama-cpp-python, which have the headers.
    """
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise click.ClickException("--llama-source: llama_cpp is not installed, whose library the worker uses")
    library = Path(found.origin).parent / "lib"
    return _compile("llamacpp_worker", work, [source / part for part in _LLAMA_INCLUDES], library, ["llama", "ggml"])


def _compile(name: str, work: Path, includes: list[Path], library: Path, names: list[str]) -> Path:
    program = work / name
    options = [*(f"-I{folder}" for folder in includes), f"-L{library}", *(f"-l{each}" for each in names)]
    # The library's own libraries lie beside it.
    paths = [f"-Wl,-rpath,{library}", f"-Wl,-rpath-link,{library}"]
    source = str(_SOURCES / f"{name}.c")
    subprocess.run(
        [*os.environ.get("CC", "cc").split(), "-O2", source, *options, *paths, "-o", str(program)], check=True
    )
    return program


def worker_command(spec: dict[str, Any]) -> list[str]:
    """The command that runs a contender; see python_worker.py for what a spec holds.

    With "program", the C worker of its engine, whose arguments c_workers/timing.h names.
    """
    if "program" not in spec:
        return [sys.executable, str(_PYTHON_WORKER), json.dumps(spec)]
    cluster = spec["cluster"] if spec.get("variant") == "pack" else -1
    limit_bytes = 0 if spec["limit_mb"] is None else round(spec["limit_mb"] * 1e6)
    counts = [spec[name] for name in ("prompt_tokens", "warm_tokens", "num_tokens")]
    own = [int(spec["mmap"]), int(spec["repack"])] if spec["engine"] == "llamacpp" else [spec["kv_bytes"]]
    values = [spec["path"], cluster, spec["threads"], limit_bytes, *counts, spec["seconds"], *own]
    return [spec["program"], *map(str, values)]
