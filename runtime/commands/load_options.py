"""Options of commands that load a bundle, and the engine that they ask for."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, cast, get_args

import click
from coreinfer.runtime.engine import Engine, load
from coreinfer.runtime.engines.load import CudaGraphs, EngineName, Weights
from coreinfer.runtime.generation import MODES, Mode

__all__ = ["LoadOptions", "load_options"]

_OPTIONS = (
    click.option("--mode", type=click.Choice(MODES), default="auto", help="How FFN weights are chosen."),
    click.option(
        "--engine",
        type=click.Choice(get_args(EngineName)),
        default="auto",
        help="native: C++ on the CPU; torch: any device; auto: torch with a GPU, --device or --dtype, else native.",
    ),
    click.option(
        "--isa",
        default="auto",
        help="Kernels of the native engine, such as avx2; auto for the best that the CPU supports.",
    ),
    click.option("--device", default="auto", help="Device of the torch engine; auto for a GPU, if there is one."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float32"]),
        default="auto",
        help="Arithmetic of the torch engine.",
    ),
    click.option(
        "--threads",
        type=int,
        default=None,
        help="Number of CPU threads for each bundle.  [default: one per physical core]",
    ),
    click.option(
        "--kv-cache-mb",
        type=float,
        default=None,
        help="Maximum megabytes of each bundle's KV cache, for all generations together.  "
        "[default: half of the free memory, at most 64 whole contexts]",
    ),
    click.option(
        "--gpu-memory-mb",
        type=float,
        default=None,
        help="Maximum megabytes of each bundle's weights and KV cache on the GPU.  [default: what is free]",
    ),
    click.option(
        "--cuda-graphs",
        type=click.Choice(get_args(CudaGraphs)),
        default="auto",
        help="Decode with captured CUDA graphs of fixed shapes; auto: on a GPU.",
    ),
    click.option(
        "--weights",
        type=click.Choice(get_args(Weights)),
        default="auto",
        help="On the GPU, multiply by int4 weights as they are (packed) or unpack them (bfloat16); "
        "auto: packed if possible.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How bundles are loaded; the fields are arguments of `load`."""

    mode: str
    engine: EngineName
    isa: str
    device: str
    dtype: str
    threads: int | None
    kv_cache_mb: float | None
    gpu_memory_mb: float | None
    cuda_graphs: CudaGraphs
    weights: Weights

    def load(self, bundle_dir: Path) -> Engine:
        """Load a bundle; see `load`."""
        return load(
            bundle_dir,
            engine=self.engine,
            device=self.device,
            mode=cast(Mode, self.mode),
            threads=self.threads,
            dtype=self.dtype,
            isa=self.isa,
            kv_cache_mb=self.kv_cache_mb,
            gpu_memory_mb=self.gpu_memory_mb,
            cuda_graphs=self.cuda_graphs,
            weights=self.weights,
        )


def load_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of an engine to a command; their values come as one argument, `loading`."""

    # click calls by name, whatever the command's own options are.
    @wraps(command)
    def with_loading(**values: Any) -> None:
        own = {field.name: values.pop(field.name) for field in fields(LoadOptions)}
        command(loading=LoadOptions(**own), **values)

    for option in reversed(_OPTIONS):
        option(with_loading)
    return with_loading
