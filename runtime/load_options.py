"""The options of loading a bundle."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from coreinfer.bundles.shared.checks import number, raise_problems
from coreinfer.bundles.shared.option_fields import field_problems, name_of, option

from .generation import Mode

__all__ = [
    "Arithmetic",
    "CudaGraphs",
    "EngineName",
    "InputSkipping",
    "LoadKeywords",
    "LoadOptions",
    "Weights",
    "bytes_of",
    "memory_option",
]

EngineName = Literal["auto", "native", "torch"]
Arithmetic = Literal["auto", "bfloat16", "float32"]
CudaGraphs = Literal["auto", "on", "off"]
Weights = Literal["auto", "bfloat16", "packed"]
InputSkipping = Literal["auto", "on", "masked", "off"]


def _thread_problems(name: str, threads: object) -> Iterator[str]:
    if not isinstance(threads, int) or isinstance(threads, bool):
        yield f"{name}: expected a whole number, got {threads!r}"
    elif threads < 1:
        yield f"{name}: expected at least 1, got {threads}"


# Of programs that have some of the options as well.
_MEMORY_MB = option(
    "Maximum megabytes of each bundle's weights in memory, KV cache included; the rest is read from disk when needed.",
    check=number(above=0),
    unset="all weights stay mapped",
)


def memory_option() -> float | None:
    """The field `memory_mb` of a dataclass of options."""
    found: float | None = field(default=None, metadata=_MEMORY_MB)
    return found


def bytes_of(megabytes: float | None) -> int | None:
    """Megabytes, of 10^6 bytes, in bytes; None stays None."""
    return None if megabytes is None else round(megabytes * 1e6)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a bundle is loaded; `load` takes the same as keywords.

    Each option is stated here and nowhere else: those of `coreinfer-run` and `coreinfer-serve`, docs/cli.md and the
    checks are made from these fields.
    """

    mode: Mode = field(default="auto", metadata=option("How FFN weights are chosen."))
    """When `generate` is not told."""
    engine: EngineName = field(
        default="auto",
        metadata=option(
            "native: C++ on the CPU; torch: any device; auto: torch with a GPU, --device or --dtype, else native."
        ),
    )
    isa: str = field(
        default="auto",
        metadata=option("Kernels of the native engine, such as avx2; auto for the best that the CPU supports."),
    )
    """The environment variable COREINFER_ISA has precedence over the CPU's best."""
    device: str = field(default="auto", metadata=option("Device of the torch engine; auto for a GPU, if there is one."))
    dtype: Arithmetic = field(default="auto", metadata=option("Arithmetic of the torch engine."))
    """auto is bfloat16 where the device computes it natively."""
    threads: int | None = field(
        default=None,
        metadata=option(
            "Number of CPU threads for each bundle.", problems=_thread_problems, unset="one per physical core"
        ),
    )
    kv_cache_mb: float | None = field(
        default=None,
        metadata=option(
            "Maximum megabytes of each bundle's KV cache, for all generations together.",
            check=number(above=0),
            unset="half of the free memory, at most 64 whole contexts",
        ),
    )
    """In megabytes, of 10^6 bytes. Memory is taken as it is used."""
    memory_mb: float | None = memory_option()
    """In megabytes, for the native engine (docs/memory.md). What the process itself takes is not part of it."""
    input_skipping: InputSkipping = field(
        default="auto",
        metadata=option(
            "What token shares leave out. auto: as on, if this machine then decodes faster, else nothing (torch: as "
            "masked); on: what a token does not want is not read; masked: it counts as 0, but all is read."
        ),
    )
    """on keeps a second layout of the weights in memory (docs/token_shares.md), which the torch engine needs a GPU and
    Triton for; masked is for measuring quality."""
    gpu_memory_mb: float | None = field(
        default=None,
        metadata=option(
            "Maximum megabytes of each bundle's weights and KV cache on the GPU.",
            check=number(above=0),
            unset="what is free",
        ),
    )
    """In megabytes. Where the dense FFN does not fit, its layers are streamed while a prompt is read (docs/gpu.md)."""
    cuda_graphs: CudaGraphs = field(
        default="auto",
        metadata=option("Decode with captured CUDA graphs of fixed shapes; auto: on a GPU."),
    )
    """auto records none where a recorded step differs from the step itself."""
    weights: Weights = field(
        default="auto",
        metadata=option(
            "On the GPU, multiply by int4 weights as they are (packed) or unpack them (bfloat16); auto: packed if "
            "possible."
        ),
    )
    """auto is packed for int4 on a GPU whose product comes out right."""

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ConfigError: naming all options that are wrong.
        """
        raise_problems(field_problems(self, name_of))
        raise_problems(_conflicts(self))

    @property
    def asks_for_torch(self) -> bool:
        """Whether an option is given that only the torch engine has, whatever the device."""
        only_torch = (self.dtype, self.cuda_graphs, self.weights)
        return self.gpu_memory_mb is not None or any(value != "auto" for value in only_torch)

    @property
    def kv_cache_bytes(self) -> int | None:
        """The bound of keys and values; None for none."""
        return bytes_of(self.kv_cache_mb)

    @property
    def memory_bytes(self) -> int | None:
        """The bound of weights, reads and KV cache; None for none."""
        return bytes_of(self.memory_mb)


def _conflicts(options: LoadOptions) -> Iterator[str]:
    """Options that are right one by one, and do not go together."""
    if options.engine == "native" and (options.device not in ("auto", "cpu") or options.asks_for_torch):
        yield (
            f"engine native: it runs on the CPU with the bundle's own formats; got device {options.device!r}, dtype "
            f"{options.dtype!r}, gpu_memory_mb {options.gpu_memory_mb}, cuda_graphs {options.cuda_graphs!r} and "
            f"weights {options.weights!r}: leave them out, or use engine torch"
        )
    if options.engine == "torch" and options.memory_mb is not None:
        yield f"memory_mb: expected none with the torch engine, got {options.memory_mb}"
    if options.memory_mb is not None and options.mode in ("stability", "fused"):
        yield f"mode {options.mode!r}: with memory_mb the dense FFN that neurons are gathered from is not in memory"
    if options.memory_mb is not None and options.input_skipping in ("on", "masked"):
        yield f"input_skipping {options.input_skipping!r}: with memory_mb all that a token reads is read from files"
    if options.engine == "torch" and options.isa != "auto":
        yield f"isa: expected auto with the torch engine, got {options.isa!r}"


class LoadKeywords(TypedDict, total=False):
    """The same as keywords, for type checkers."""

    mode: Mode
    engine: EngineName
    isa: str
    device: str
    dtype: Arithmetic
    threads: int | None
    kv_cache_mb: float | None
    memory_mb: float | None
    input_skipping: InputSkipping
    gpu_memory_mb: float | None
    cuda_graphs: CudaGraphs
    weights: Weights
