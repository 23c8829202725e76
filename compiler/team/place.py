"""The process at a place: it loads the model by itself, and runs what is asked of it. Ray makes one an actor."""

import importlib
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import faiss
import torch
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.machine import bf16_products_are_faster
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel, load_model, read_config
from coreinfer.compiler.models.primitives import keep_few_primitives
from coreinfer.compiler.models.sources import ModelSource
from coreinfer.compiler.program import program_sha256
from coreinfer.compiler.progress import peak_memory_bytes

from .spent import Spent, num_bytes
from .team import Worker

__all__ = ["Place", "Setup", "arithmetic", "send_tensors"]

_PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all places have in common.

    Attributes:
        model_sha256: of the model's files; None where they are not compared.
        threads: of each process.
        arithmetic: of the main process, which that of each place must equal.
    """

    config: CompileConfig
    source: ModelSource
    model_sha256: str | None
    threads: int
    arithmetic: Mapping[str, str]


def arithmetic() -> dict[str, str]:
    """What rounding depends on: programs, and the kind of CPU."""
    return {
        "machine": platform.machine(),
        "CPU instructions": f"{torch.backends.cpu.get_cpu_capability()}, bf16 {bf16_products_are_faster()}",
        "Python": ".".join(map(str, sys.version_info[:3])),
        **{package: version(package) for package in _PACKAGES},
        "coreinfer": program_sha256(),
    }


class Place:
    """Runs tasks one after another."""

    def __init__(self, place: int, setup: Setup) -> None:
        """Take the place; the model is loaded for the first task, whose error then says what is wrong with it."""
        self._place, self._setup = place, setup
        self._worker: Worker | None = None

    def run(self, stage: str, task: Callable[..., Any], *arguments: object) -> tuple[Any, Spent]:
        """Run a task of a stage; see `Team.call`."""
        start = time.perf_counter()
        if self._worker is None:
            self._worker = Worker(place=self._place, loaded=self._load(self._setup))
        result = task(self._worker, *arguments)
        spent = Spent(
            stage=stage,
            process=f"{platform.node()} {os.getpid()}",
            seconds=time.perf_counter() - start,
            result_bytes=num_bytes(result),
            peak_bytes=peak_memory_bytes(),
        )
        return result, spent

    def _load(self, setup: Setup) -> LoadedModel:
        """Load the model.

        Raises:
            ConfigError: it cannot be loaded here, is another one, or this machine rounds otherwise than the main one.
        """
        keep_few_primitives()
        # Else the first task of each stage would wait for imports.
        importlib.import_module("coreinfer.compiler.stages")
        torch.set_num_threads(setup.threads)
        faiss.omp_set_num_threads(setup.threads)
        send_tensors()
        _check(setup)
        family, model_config = read_config(setup.source)
        return load_model(
            setup.source,
            family,
            model_config,
            device=setup.config.device,
            dtype=setup.config.dtype,
            mapped=setup.config.max_memory is not None,
        )


def _check(setup: Setup) -> None:
    here = arithmetic()
    for name, expected in setup.arithmetic.items():
        if here[name] != expected:
            raise ConfigError(
                f"--ray: worker on {platform.node()}: {name}: expected {expected}, as where the compile was started, "
                f"got {here[name]}; all machines must be alike, for sums to be"
            )
    if setup.model_sha256 is not None and setup.source.sha256({}) != setup.model_sha256:
        raise ConfigError(
            f"--ray: worker on {platform.node()}: --model {setup.source.name}: other files lie there than where the "
            "compile was started; put the model on storage that all machines share"
        )


def send_tensors() -> None:
    """Have Ray send tensors of this process as arrays, which are mapped where they arrive; nobody writes to them."""
    import ray.util

    # Of the same: tasks leave their arguments as they are.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    ray.util.register_serializer(torch.Tensor, serializer=_array_of, deserializer=_tensor_of)


def _array_of(tensor: torch.Tensor) -> tuple[Any, str]:
    name = str(tensor.dtype).removeprefix("torch.")
    own = tensor.detach().cpu().contiguous()
    # numpy has no bfloat16.
    return (own.view(torch.int16) if tensor.dtype == torch.bfloat16 else own).numpy(), name


def _tensor_of(sent: tuple[Any, str]) -> torch.Tensor:
    array, name = sent
    return torch.from_numpy(array).view(getattr(torch, name))
