"""`coreinfer-bench`: how fast the native engine decodes a bundle, compared with the machine's memory bandwidth."""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import click
import numpy as np
from coreinfer.bundles import Bundle, ConfigError, open_bundle
from coreinfer.bundles.shared.checks import raise_problems, whole_number
from coreinfer.bundles.shared.command import command_errors, start_logging
from coreinfer.bundles.shared.command_options import field_options
from coreinfer.bundles.shared.option_fields import field_problems, option
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.load_options import bytes_of, memory_option

from .starts import measure_starts

__all__ = ["BenchOptions", "BenchResult", "BenchRun", "bench", "main"]

_START_TOKENS = 16
# Larger than any cache, small enough to be read in every round.
_READ_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure; the options of `coreinfer-bench` are made from these fields."""

    isa: str = field(default="auto", metadata=option("Kernels, such as avx2; all measures all that the CPU has."))
    threads: int | None = field(default=None, metadata=option("CPU threads.", unset="one a physical core"))
    memory_mb: float | None = memory_option()
    num_tokens: int = field(
        default=128,
        metadata=option("Tokens to decode in a round.", check=whole_number(1), switches=("--tokens",)),
    )
    """After a prompt of 16."""
    num_prompt_tokens: int = field(
        default=512,
        metadata=option(
            "Tokens of the prompt whose prefill is timed.", check=whole_number(1), switches=("--prompt-tokens",)
        ),
    )
    num_rounds: int = field(
        default=5, metadata=option("Rounds; medians are shown.", check=whole_number(1), switches=("--rounds",))
    )
    num_starts: int = field(
        default=3,
        metadata=option(
            "Starts of coreinfer-run to time; 0 leaves them out.", check=whole_number(0), switches=("--starts",)
        ),
    )

    def __post_init__(self) -> None:
        """Check every option; how many threads there can be only the engine knows.

        Raises:
            ConfigError: naming all options that are wrong.
        """
        raise_problems(field_problems(self))

    @property
    def isas(self) -> tuple[str, ...]:
        """Kernels to measure, names or "auto"."""
        return tuple(_native.available_isas()) if self.isa == "all" else (self.isa,)


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """Medians over the rounds of one kernel with one FFN, "dense" or "pack".

    Attributes:
        bytes_per_token: weights, keys and values that a token reads in the middle of decoding.
        gbps: bytes a token x tokens a second.
        share_of_read: of the plain read bandwidth.
        own_read_gbps: of as many bytes as a token reads, again and again: more where a cache holds them.
        ttft_s: seconds from the start of coreinfer-run to its first token, with a warm page cache.
        peak_rss_mb: most resident memory of that process, in units of 2^20 bytes.
    """

    isa: str
    ffn: str
    decode_tok_s: float
    bytes_per_token: int
    gbps: float
    share_of_read: float
    own_read_gbps: float
    prefill_tok_s: float
    ttft_s: float | None = None
    peak_rss_mb: float | None = None


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What `bench` measured."""

    bundle: str
    threads: int
    read_gbps: float
    runs: tuple[BenchRun, ...]


class _Subject:
    """A decoder with one FFN, and what was measured of it."""

    def __init__(self, decoder: NativeDecoder, ffn: str, options: BenchOptions, bundle: Bundle) -> None:
        manifest = bundle.manifest
        first_pack = next((number for number, own in enumerate(manifest.clusters) if own.file is not None), None)
        self.decoder, self.ffn = decoder, ffn
        self._choice = DENSE if ffn == "dense" else FfnChoice(cluster=first_pack)
        self._options = options
        self._prompt = (
            np.random.default_rng(0).integers(0, manifest.model.vocab_size, options.num_prompt_tokens).tolist()
        )
        self.decoder.use(self._choice)
        middle = _START_TOKENS + options.num_tokens // 2
        self._bytes_per_token = decoder.bytes_per_token(middle, greedy=True)
        self._decode: list[float] = []
        self._prefill: list[float] = []
        self._reads: list[float] = []

    def measure(self) -> None:
        """Time one plain read, one prefill and one decoding."""
        self._reads.append(_native.read_bandwidth(self.decoder.num_threads, self._bytes_per_token))
        self._prefill.append(self._options.num_prompt_tokens / self._prefill_seconds(self._prompt))
        self._prefill_seconds(self._prompt[:_START_TOKENS])
        start = time.perf_counter()
        token_id = self._prompt[0]
        for _ in range(self._options.num_tokens):
            token_id = int(self.decoder.forward([token_id], greedy=True)[0].argmax())
        self._decode.append(self._options.num_tokens / (time.perf_counter() - start))

    def forget(self) -> None:
        """Drop what was measured."""
        self._decode.clear()
        self._prefill.clear()
        self._reads.clear()

    def _prefill_seconds(self, prompt: Sequence[int]) -> float:
        self.decoder.truncate(0)
        self.decoder.use(self._choice)
        start = time.perf_counter()
        self.decoder.forward(prompt)
        return time.perf_counter() - start

    def run(self, read_gbps: float) -> BenchRun:
        """Sum up."""
        decode = statistics.median(self._decode)
        gbps = self._bytes_per_token * decode / 1e9
        return BenchRun(
            isa=self.decoder.isa,
            ffn=self.ffn,
            decode_tok_s=decode,
            bytes_per_token=self._bytes_per_token,
            gbps=gbps,
            share_of_read=gbps / read_gbps,
            own_read_gbps=statistics.median(self._reads),
            prefill_tok_s=statistics.median(self._prefill),
        )


def bench(bundle_dir: Path, options: BenchOptions) -> BenchResult:
    """Measure decode and prefill in interleaved rounds, the read bandwidth in each of them.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        ConfigError: an option is wrong, or the prompts do not fit the model.
        UnsupportedModelError: the native engine does not compute this model.
    """
    bundle = open_bundle(bundle_dir, spare_memory=options.memory_mb is not None)
    _check_fit(options, bundle)
    decoders = [
        NativeDecoder(bundle, threads=options.threads, isa=isa, memory_bytes=bytes_of(options.memory_mb))
        for isa in options.isas
    ]
    ffns = tuple(ffn for ffn, has in (("dense", bundle.dense), ("pack", bundle.packs)) if has)
    subjects = [_Subject(decoder, ffn, options, bundle) for decoder in decoders for ffn in ffns]
    for subject in subjects:
        # The first pass reads from the disk and starts threads.
        subject.measure()
        subject.forget()
    reads = []
    for _ in range(options.num_rounds):
        reads.append(_native.read_bandwidth(decoders[0].num_threads, _READ_BYTES))
        for subject in subjects:
            subject.measure()
    read_gbps = statistics.median(reads)
    return BenchResult(
        bundle=bundle.path.name,
        threads=decoders[0].num_threads,
        read_gbps=read_gbps,
        runs=tuple(_with_starts(subject.run(read_gbps), bundle, options) for subject in subjects),
    )


def _with_starts(run: BenchRun, bundle: Bundle, options: BenchOptions) -> BenchRun:
    if not options.num_starts:
        return run
    mode = "dense" if run.ffn == "dense" else "similarity"
    arguments = [str(bundle.path), "--engine", "native", "--isa", run.isa, "--mode", mode]
    for switch, value in (("--threads", options.threads), ("--memory-mb", options.memory_mb)):
        arguments += [] if value is None else [switch, str(value)]
    starts = measure_starts(arguments, options.num_starts)
    peak = None if starts.peak_rss_bytes is None else starts.peak_rss_bytes / 2**20
    return replace(run, ttft_s=starts.first_token_seconds, peak_rss_mb=peak)


def _check_fit(options: BenchOptions, bundle: Bundle) -> None:
    limit = bundle.manifest.model.max_positions
    if options.num_prompt_tokens > limit or _START_TOKENS + options.num_tokens > limit:
        raise ConfigError(
            f"--prompt-tokens and --tokens: {bundle.manifest.model.name} has {limit} positions; expected at most "
            f"{limit} and {limit - _START_TOKENS}, got {options.num_prompt_tokens} and {options.num_tokens}"
        )


@click.command(context_settings={"show_default": True})
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@command_errors
@field_options(BenchOptions, "options")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line after the table.")
@click.version_option(package_name="coreinfer")
def main(bundle_dir: Path, options: BenchOptions, as_json: bool) -> None:
    """Measure how fast the native engine decodes the bundle in DIR, with its dense FFN and with its first pack.

    A bundle of thin clusters alone has no packs; all weights are read.
    """
    start_logging(verbose=False)
    result = bench(bundle_dir, options)
    click.echo("\n".join(_table(result, options)))
    if as_json:
        click.echo(json.dumps(asdict(result)))


def _table(result: BenchResult, options: BenchOptions) -> Iterator[str]:
    yield f"{result.bundle}, {result.threads} threads, plain read {result.read_gbps:.1f} GB/s"
    prefill = f"prefill {options.num_prompt_tokens}"
    yield (
        f"{'kernels':12s} {'FFN':6s} {'tok/s':>8s} {'MB/token':>9s} {'GB/s':>6s} {'of read':>8s} {'own read':>9s} "
        f"{prefill:>13s} tok/s" + (f" {'first s':>8s} {'RSS MB':>7s}" if options.num_starts else "")
    )
    for run in result.runs:
        yield (
            f"{run.isa:12s} {run.ffn:6s} {run.decode_tok_s:8.1f} {run.bytes_per_token / 1e6:9.1f} {run.gbps:6.1f} "
            f"{run.share_of_read:8.1%} {run.own_read_gbps:9.1f} {run.prefill_tok_s:13.0f}      " + _starts_cells(run)
        )


def _starts_cells(run: BenchRun) -> str:
    if run.ttft_s is None:
        return ""
    return f" {run.ttft_s:8.2f} " + ("      -" if run.peak_rss_mb is None else f"{run.peak_rss_mb:7.0f}")
