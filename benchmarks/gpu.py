"""CoreInfer on a GPU beside transformers: decode, prefill, device memory and the device's plain read bandwidth.

    python benchmarks/gpu.py BUNDLE --transformers FOLDER [--device cuda] [--rounds 5]

FOLDER holds the model that the bundle was compiled from. Contenders take turns: in each round each is loaded, warmed
up, timed and dropped, so that all have the device for themselves; medians over the rounds. A table goes to stdout, then
one JSON line. --seconds ends it early, between two contenders. With --device cpu the same code runs without a GPU, to
be tested; its figures tell nothing of one.
"""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click
import torch
from coreinfer.bundles import Bundle, ConfigError, open_bundle
from coreinfer.bundles.shared.beginnings import text_ids
from coreinfer.bundles.shared.command import command_errors
from coreinfer.bundles.token_shares import least_share
from coreinfer.runtime import Engine
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.engines.torch.column_choice import columns_problem
from coreinfer.runtime.engines.torch.decoder import TorchDecoder, device_needs
from coreinfer.runtime.engines.torch.packed_linear import PackedLinear

SHARES = {f"share-{share}": FfnChoice(token_share=share) for share in (0.64, 0.5)}
CONTENDERS = ("transformers", "dense", "pack", "lossless", "bounded", *SHARES)
_TEXT = "The ferry leaves the harbour at noon and returns before the lamps are lit. "
_WARM_UP_TOKENS = 4
_READ_REPEATS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed, and where."""

    device: str
    dtype: str
    weights: str
    cuda_graphs: str
    gpu_memory_mb: float | None
    tokens: int
    rounds: int
    read_bytes: int
    prompt_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One contender in one round.

    Attributes:
        bytes_per_token: weights that a decoded token reads, None where it cannot be said.
        peak_mb: most device memory that torch held, None without a GPU.
    """

    decode_tok_s: float
    prefill_tok_s: float
    bytes_per_token: int | None
    peak_mb: float | None


class Contender(Protocol):
    """What is timed."""

    def prefill(self) -> float:
        """Forget everything and read the prompt; gives seconds."""

    def decode(self, num_tokens: int) -> float:
        """Decode greedily behind the prompt; gives tokens a second."""

    def bytes_per_token(self) -> int | None:
        """Weights that a token reads."""


class Transformers:
    """transformers in bfloat16, `generate` as it comes, nothing compiled."""

    def __init__(self, folder: Path, options: Options) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model: Any = model.to(options.device).eval()
        self.ids = torch.tensor([options.prompt_ids], device=options.device)

    def prefill(self) -> float:
        """See `Contender`."""
        return _seconds(self.ids.device, lambda: self.model(self.ids, use_cache=True, logits_to_keep=1))

    def decode(self, num_tokens: int) -> float:
        """See `Contender`. The prompt's share is taken off by a run of one token."""
        one = _seconds(self.ids.device, partial(self._generate, 1))
        every = _seconds(self.ids.device, partial(self._generate, num_tokens + 1))
        return num_tokens / max(every - one, 1e-9)

    def _generate(self, num_tokens: int) -> None:
        self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    def bytes_per_token(self) -> int:
        """See `Contender`."""
        return _weight_bytes(self.model)


class CoreInfer:
    """The torch engine; the prompt is read dense, as the runtime does, and decoded with `choice`."""

    def __init__(self, bundle: Bundle, choice: FfnChoice, options: Options, *, limit_mb: float | None = None) -> None:
        self.decoder = TorchDecoder(
            bundle,
            device=options.device,
            dtype=options.dtype,
            gpu_memory_mb=limit_mb,
            cuda_graphs=options.cuda_graphs,
            weights=options.weights,
            input_skipping="on" if choice.token_share < 1 and options.device != "cpu" else "masked",
        )
        self.choice = choice
        self.reading = DENSE if bundle.dense is not None else choice
        self.prompt_ids = options.prompt_ids
        self.device = torch.device(options.device)

    def prefill(self) -> float:
        """See `Contender`. The pack comes meanwhile, as in the runtime."""
        self.decoder.truncate(0)
        self.decoder.use(self.reading)

        def read() -> None:
            self.decoder.prepare(self.choice)
            self.decoder.forward(self.prompt_ids)
            self.decoder.use(self.choice)

        return _seconds(self.device, read)

    def decode(self, num_tokens: int) -> float:
        """See `Contender`."""
        self.prefill()

        def run() -> None:
            token_id = self.prompt_ids[0]
            for _ in range(num_tokens):
                token_id = int(self.decoder.forward([token_id], greedy=True)[-1].argmax())

        return num_tokens / _seconds(self.device, run)

    def bytes_per_token(self) -> int | None:
        """See `Contender`. What a token share leaves is not counted."""
        return None if self.choice.token_share < 1 else _weight_bytes(self.decoder._model)


class Lossless:
    """The whole engine in mode lossless."""

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self.engine = Engine(bundle, CoreInfer(bundle, DENSE, options).decoder)
        prompt = self.engine.tokenizer.decode(options.prompt_ids)
        self.generate = partial(self.engine.generate, prompt, mode="lossless", raw=True)

    def prefill(self) -> float:
        """See `Contender`."""
        return float(self.generate(max_new_tokens=1).prefill_seconds)

    def decode(self, num_tokens: int) -> float:
        """See `Contender`. It may end early, where the model ends the text."""
        return float(self.generate(max_new_tokens=num_tokens).decode_tokens_per_second)

    def bytes_per_token(self) -> None:
        """See `Contender`. Several tokens share a pass."""


def _weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights but an embedding that is only looked up in."""
    weights: Any = {id(parameter): parameter for parameter in model.parameters()}
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for module in packed:
        weights |= {id(part): part for part in (module.weight, module.grid) if part is not None}
    embedding: Any = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    head: Any = model.get_submodule("lm_head")
    lookup = 0 if head.weight is embedding.weight else embedding.weight.nbytes
    return int(sum(weight.nbytes for weight in weights.values()) - lookup)


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    _synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode():
        run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_gbps(options: Options) -> float:
    """Measure how fast the device reads memory: sums of an array larger than its caches."""
    array = torch.ones(options.read_bytes // 4, dtype=torch.float32, device=options.device)
    array.sum()
    best = min(_seconds(array.device, array.sum) for _ in range(_READ_REPEATS))
    return array.nbytes / best / 1e9


def contenders(
    names: tuple[str, ...], bundle: Bundle, folder: Path | None, options: Options
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Name what can run here and how it is loaded; what cannot is said."""
    choices = {"dense": DENSE, "pack": FfnChoice(cluster=0), **SHARES}
    for name in names:
        if (lacking := _lacking(name, bundle, folder, options)) is not None:
            click.echo(f"{name}: left out, {lacking}", err=True)
        elif name == "transformers" and folder is not None:
            yield name, partial(Transformers, folder, options)
        elif name in choices:
            yield name, partial(CoreInfer, bundle, choices[name], options)
        elif name == "lossless":
            yield name, partial(Lossless, bundle, options)
        else:
            limit_mb = options.gpu_memory_mb or least_mb(bundle, options)
            click.echo(f"bounded: {limit_mb:.1f} MB for weights and KV cache", err=True)
            yield name, partial(CoreInfer, bundle, choices["pack"], options, limit_mb=limit_mb)


def _lacking(name: str, bundle: Bundle, folder: Path | None, options: Options) -> str | None:
    """Say why a contender cannot run here; None where it can."""
    if name == "transformers" and folder is None:
        return "--transformers names no folder"
    if name in ("dense", "lossless", *SHARES) and bundle.dense is None:
        return "the bundle has no dense FFN"
    if least_share(bundle) > SHARES.get(name, DENSE).token_share:
        return "the bundle has no such token share; compile it with --token-share"
    # The CPU masks, to be tested.
    return columns_problem(torch.device(options.device)) if name in SHARES and options.device != "cpu" else None


def least_mb(bundle: Bundle, options: Options) -> float:
    """Find the smallest bound under which the benchmark runs: two layer buffers, and a KV cache for its tokens."""
    needs = device_needs(bundle, device=options.device, dtype=options.dtype, weights=options.weights)
    return (needs.least + needs.kv_per_token * (len(options.prompt_ids) + options.tokens + 1)) / 1e6


def try_sample(name: str, load: Callable[[], Contender], options: Options) -> Sample | None:
    """Take a sample; None where the contender does not fit on the device."""
    try:
        return sample(load, options)
    except torch.OutOfMemoryError:
        click.echo(f"{name}: does not fit on {options.device}", err=True)
        return None


def sample(load: Callable[[], Contender], options: Options) -> Sample:
    """Load a contender, warm it up, time it and drop it."""
    device = torch.device(options.device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    contender = load()
    contender.prefill()
    contender.decode(_WARM_UP_TOKENS)
    return Sample(
        prefill_tok_s=len(options.prompt_ids) / contender.prefill(),
        decode_tok_s=contender.decode(options.tokens),
        bytes_per_token=contender.bytes_per_token(),
        peak_mb=torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None,
    )


def summarize(name: str, samples: list[Sample], gbps: float) -> dict[str, Any]:
    """Take medians over the rounds."""
    speed = statistics.median(one.decode_tok_s for one in samples)
    num_bytes = samples[0].bytes_per_token
    reached = None if num_bytes is None else num_bytes * speed / 1e9
    return {
        "name": name,
        "decode_tok_s": speed,
        "prefill_tok_s": statistics.median(one.prefill_tok_s for one in samples),
        "bytes_per_token": num_bytes,
        "gbps": reached,
        "share_of_read": None if reached is None else reached / gbps,
        "peak_mb": None if samples[0].peak_mb is None else max(one.peak_mb or 0.0 for one in samples),
    }


def table(runs: list[dict[str, Any]], device: str, gbps: float) -> Iterator[str]:
    """Lines for people, with ratios to transformers."""
    reference = next((run["decode_tok_s"] for run in runs if run["name"] == "transformers"), None)
    yield f"{device}, plain read {gbps:.1f} GB/s"
    yield (
        f"{'contender':14s} {'tok/s':>9s} {'x transformers':>15s} {'MB/token':>10s} {'GB/s':>8s} {'of read':>8s} "
        f"{'prefill tok/s':>14s} {'peak MB':>9s}"
    )
    for run in runs:
        ratio = None if reference is None else run["decode_tok_s"] / reference
        mb = None if run["bytes_per_token"] is None else run["bytes_per_token"] / 1e6
        cells = [(ratio, 15, 2), (mb, 10, 1), (run["gbps"], 8, 1), (run["share_of_read"], 8, 2)]
        cells += [(run["prefill_tok_s"], 14, 0), (run["peak_mb"], 9, 0)]
        yield f"{run['name']:14s} {run['decode_tok_s']:9.1f} " + " ".join(_cell(*cell) for cell in cells)


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.{digits}f}"


@click.command(context_settings={"show_default": True})
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--transformers", "folder", type=click.Path(path_type=Path), default=None, help="The bundle's own model.")
@click.option("--contenders", "names", multiple=True, type=click.Choice(CONTENDERS), help="Default: all.")
@click.option("--device", default="cuda")
@click.option("--dtype", default="bfloat16")
@click.option("--weights", default="auto")
@click.option("--cuda-graphs", default="auto")
@click.option("--gpu-memory-mb", type=float, default=None, help="Of `bounded`; by default as little as will do.")
@click.option("--prompt-tokens", type=int, default=512)
@click.option("--tokens", type=int, default=128)
@click.option("--rounds", type=int, default=5)
@click.option("--read-bytes", type=int, default=1 << 30, help="Size of the plain read.")
@click.option("--seconds", type=float, default=None, help="No contender begins after this time; none: no limit.")
@command_errors
def main(
    bundle_dir: Path,
    folder: Path | None,
    names: tuple[str, ...],
    prompt_tokens: int,
    rounds: int,
    seconds: float | None,
    **settings: Any,
) -> None:
    """Time all contenders on a device."""
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    bundle = open_bundle(bundle_dir, lazy_packs=True)
    if settings["device"].startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; --device cpu runs the same code, to test it")
    options = Options(rounds=rounds, prompt_ids=_prompt(bundle, prompt_tokens), **settings)
    loaders = list(contenders(names or CONTENDERS, bundle, folder, options))
    reads: list[float] = []
    samples, cut = time_all(loaders, options, deadline, reads)
    gbps = statistics.median(reads)
    runs = [summarize(name, taken, gbps) for name, taken in samples.items() if taken]
    device = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    click.echo("\n".join(table(runs, device, gbps)))
    described = {key: value for key, value in asdict(options).items() if key != "prompt_ids"}
    click.echo(json.dumps({"device_name": device, "read_gbps": gbps, **described, "cut": cut, "runs": runs}))


def time_all(
    loaders: list[tuple[str, Callable[[], Contender]]], options: Options, deadline: float, reads: list[float]
) -> tuple[dict[str, list[Sample]], str | None]:
    """Let contenders take turns until all rounds are done or no time is left.

    Args:
        deadline: by `time.monotonic`.
        reads: the plain read of each round is added.
    Returns:
        Samples by contender, and where they were cut off, None where they were not.
    """
    samples: dict[str, list[Sample]] = {name: [] for name, _ in loaders}
    for number in range(1, options.rounds + 1):
        click.echo(f"round {number} of {options.rounds}", err=True)
        reads.append(read_gbps(options))
        for name, load in loaders:
            if time.monotonic() > deadline:
                cut = f"no time was left for {name} of round {number} of {options.rounds}"
                click.echo(cut, err=True)
                return samples, cut
            if taken := try_sample(name, load, options):
                # Whoever ends the program has what it knew.
                click.echo(f"  {name}: {taken.decode_tok_s:.1f} tok/s", err=True)
                samples[name].append(taken)
    return samples, None


def _prompt(bundle: Bundle, num_tokens: int) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer" / "tokenizer.json"))
    ids = text_ids(tokenizer, _TEXT * (1 + num_tokens // 4))[:num_tokens]
    if len(ids) < num_tokens or num_tokens < 1:
        raise ConfigError(f"--prompt-tokens: expected 1 to {len(ids)}, got {num_tokens}")
    return ids


if __name__ == "__main__":
    main()
