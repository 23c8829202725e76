"""What tokens gain that leave inputs out, and what it costs: token shares beside the dense int4 kernels.

    python benchmarks/token_share.py --models smollm2-135m [--shares 1,0.75,0.6,0.5,0.4] [--no-half-inputs] [--rounds 5]

All shares of a model take turns in one process, in rounds that also measure the plain read bandwidth; medians. The
row "dense" is the engine as it is without token shares: all weights, read by rows. Each token is a text's own (random
ids where weights are random), so that inputs are those of text. With --texts, a folder of JSON Lines, KL to the dense
row on the second halves of texts, all decoded. A table, then one JSON line.
"""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from contenders.models import LARGE_MODELS, MODELS, BenchModel, link_qwen, share_bundle_of
from coreinfer.bundles import open_bundle
from coreinfer.bundles.shared.beginnings import text_ids
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from kl import divergence, read_texts
from tokenizers import Tokenizer

_MODELS = (*MODELS, *LARGE_MODELS)
_READ_BYTES = 1 << 29
_PROMPT_TOKENS = 32
_TEXT = """The harbour lies at the end of a long valley, and the road to it follows the river. In spring the water is
high, and the ferry cannot cross before noon. People wait on the quay with their bags and talk about the weather, the
price of bread and the new bridge that will be built, they say, within three years. A bridge would shorten the way to
the town by an hour; but the ferryman, whose father and grandfather carried passengers over the same water, has his
doubts."""


@dataclass(kw_only=True)
class Row:
    """A share of the inputs, and what was measured with it."""

    name: str
    decoder: NativeDecoder
    share: float
    tok_s: list[float] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    divergence: float = 0.0

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Read a prompt with all weights, then have the row's share in use."""
        self.decoder.use(DENSE)
        self.decoder.truncate(0)
        self.decoder.forward(prompt_ids)
        self.decoder.use(FfnChoice(token_share=self.share))


@click.command(context_settings={"show_default": True})
@click.option("--models", multiple=True, type=click.Choice([model.name for model in _MODELS]), help="Default: all.")
@click.option("--shares", default="1,0.75,0.6,0.5,0.4", help="Of the bytes of the layers' weights.")
@click.option("--rounds", default=5)
@click.option("--tokens", default=32)
@click.option("--threads", default=2)
@click.option("--isa", default="auto")
@click.option("--half-inputs/--no-half-inputs", default=True, help="Whether some inputs are read in half.")
@click.option("--texts", type=click.Path(path_type=Path), default=None, help="Folder of JSON Lines files, for KL.")
@click.option("--num-texts", default=36)
@click.option("--calibration", type=click.Path(path_type=Path), default=None, help="Folder of texts for thresholds.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench"), help="Folder of models.")
@click.option("--qwen-gguf", type=click.Path(path_type=Path), default=None, help="Instead of joining six packages.")
def main(
    models: tuple[str, ...],
    shares: str,
    rounds: int,
    tokens: int,
    threads: int,
    isa: str,
    half_inputs: bool,
    texts: Path | None,
    num_texts: int,
    calibration: Path | None,
    work: Path,
    qwen_gguf: Path | None,
) -> None:
    """Print the table of the module's docstring."""
    work.mkdir(parents=True, exist_ok=True)
    if qwen_gguf is not None:
        link_qwen(qwen_gguf, work)
    results = []
    for model in _MODELS:
        if models and model.name not in models:
            continue
        is_random = "random" in model.name
        texts_to_set_by = None if is_random else calibration
        bundle_dir = share_bundle_of(model, work, calibration=texts_to_set_by, half_inputs=half_inputs)
        rows = load_rows(bundle_dir, [float(share) for share in shares.split(",")], threads, isa)
        reads = time_rows(rows, decoded_ids(bundle_dir, tokens, is_random=is_random), rounds)
        has_kl = texts is not None and not is_random
        if texts is not None and has_kl:
            measure_divergence(rows, read_texts(bundle_dir, texts, num_texts, 256))
        results.append(summarize(model, rows, reads, has_kl=has_kl))
        click.echo("\n".join(table(results[-1])))
    click.echo(json.dumps({"models": results}))


def load_rows(bundle_dir: Path, shares: Sequence[float], threads: int, isa: str) -> list[Row]:
    """A row for the engine as it is, and one for each share."""
    bundle = open_bundle(bundle_dir)
    plain = NativeDecoder(bundle, threads=threads, isa=isa, input_skipping="off")
    sharing = NativeDecoder(bundle, threads=threads, isa=isa, input_skipping="on")
    rows = [Row(name="dense", decoder=plain, share=1.0)]
    # Where all are wanted, the engine reads by rows: it is the same row again, which shows what differs by chance.
    return rows + [Row(name=f"share {share:g}", decoder=sharing, share=share) for share in shares]


def decoded_ids(bundle_dir: Path, num_tokens: int, *, is_random: bool) -> list[int]:
    """A prompt's ids and those that are decoded after it."""
    count = _PROMPT_TOKENS + num_tokens
    bundle = open_bundle(bundle_dir)
    if is_random:
        return list(map(int, np.random.default_rng(0).integers(0, bundle.manifest.model.vocab_size, count)))
    tokenizer = Tokenizer.from_file(str(bundle_dir / "tokenizer" / "tokenizer.json"))
    return (text_ids(tokenizer, _TEXT) * (1 + count // 64))[:count]


def time_rows(rows: Sequence[Row], token_ids: Sequence[int], rounds: int) -> list[float]:
    """Decode the same tokens with every row, round by round; returns the rounds' plain reads in GB/s."""
    reads = []
    for number in range(rounds + 1):
        reads.append(_native.read_bandwidth(rows[0].decoder.num_threads, _READ_BYTES))
        for row in rows:
            row.begin(token_ids[:_PROMPT_TOKENS])
            start, num_bytes = time.perf_counter(), 0
            for token_id in token_ids[_PROMPT_TOKENS:]:
                row.decoder.forward([token_id], greedy=True)
                num_bytes += row.decoder.bytes_per_token(0, greedy=True)
            seconds, count = time.perf_counter() - start, len(token_ids) - _PROMPT_TOKENS
            # The first round warms caches and clocks up.
            if number:
                row.tok_s.append(count / seconds)
                row.num_bytes.append(num_bytes // count)
    return reads[1:]


def measure_divergence(rows: Sequence[Row], texts: Sequence[list[int]]) -> None:
    """KL of each row to the first, the mean over the tokens of second halves."""
    num_tokens = 0
    for ids in texts:
        middle = len(ids) // 2
        logits = []
        for row in rows:
            row.begin(ids[:middle])
            logits.append(np.concatenate([row.decoder.forward([token_id]) for token_id in ids[middle:]]))
        for row, got in zip(rows, logits, strict=True):
            row.divergence += divergence(logits[0], got)
        num_tokens += len(ids) - middle
    for row in rows:
        row.divergence /= num_tokens


def summarize(model: BenchModel, rows: Sequence[Row], reads: Sequence[float], *, has_kl: bool) -> dict[str, Any]:
    """Medians over the rounds; speeds are against the dense row of the same round."""
    runs = []
    for row in rows:
        ratios = [own / dense for own, dense in zip(row.tok_s, rows[0].tok_s, strict=True)]
        tok_s, num_bytes = statistics.median(row.tok_s), statistics.median(row.num_bytes)
        runs.append(
            {
                "name": row.name,
                "share": row.share,
                "decode_tok_s": round(tok_s, 2),
                "mb_a_token": round(num_bytes / 1e6, 2),
                "speed": round(statistics.median(ratios), 3),
                "share_of_read": round(tok_s * num_bytes / 1e9 / statistics.median(reads), 3),
                "kl": round(row.divergence, 5) if has_kl else None,
            }
        )
    return {
        "name": model.name,
        "isa": rows[0].decoder.isa,
        "read_gbps": round(statistics.median(reads), 2),
        "runs": runs,
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    """Lines for people."""
    yield f"{result['name']}: {result['isa']}, plain read {result['read_gbps']:.1f} GB/s"
    yield f"  {'row':12s} {'tok/s':>8s} {'against dense':>14s} {'MB a token':>11s} {'of the read':>12s} {'KL':>8s}"
    for run in result["runs"]:
        kl = "" if run["kl"] is None else f"{run['kl']:.4f}"
        yield (
            f"  {run['name']:12s} {run['decode_tok_s']:8.1f} {run['speed']:14.2f} {run['mb_a_token']:11.1f} "
            f"{run['share_of_read']:12.2f} {kl:>8s}"
        )


if __name__ == "__main__":
    main()
