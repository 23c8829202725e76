"""What the native engine's arithmetic costs, and what rounding the weights does.

    python benchmarks/kl.py --bundle DIR [--bundle DIR ...] [--model M] --texts FOLDER [--num-texts 200]

For each bundle, on the second halves of texts: KL of the native engine to transformers running the *dequantized*
weights in float32 (the cost of int8 activations and the fp16 cache), and with --model also KL to the original model.
The first half is read in one block, the second half token by token, as it is decoded. A table, then one JSON line.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles import open_bundle
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.shared.beginnings import text_ids
from coreinfer.compiler.models.load import load_model, read_config
from coreinfer.compiler.models.sources import find_source
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, Decoder
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from tokenizers import Tokenizer
from tqdm import tqdm

Logits = npt.NDArray[np.float32]
_LEAST_TOKENS = 32


@click.command()
@click.option("--bundle", "bundles", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--model", default=None, help="The original model, in the forms of coreinfer-compile.")
@click.option("--texts", type=click.Path(path_type=Path), required=True, help="Folder of JSON Lines files.")
@click.option("--num-texts", type=int, default=200)
@click.option("--max-tokens", type=int, default=256, help="Read at most so many tokens of a text.")
@click.option("--prefill", is_flag=True, help="Read the second half in one block too.")
def main(
    bundles: tuple[Path, ...], model: str | None, texts: Path, num_texts: int, max_tokens: int, *, prefill: bool
) -> None:
    """Compare logits over texts."""
    token_ids = read_texts(bundles[0], texts, num_texts, max_tokens)
    original = None if model is None else original_logits(model, token_ids)
    rows = [measure(bundle, token_ids, original, prefill=prefill) for bundle in bundles]
    click.echo(f"{'bundle':20s} {'to dequantized':>15s} {'to original':>12s} {'MB a token':>11s}  formats")
    for row in rows:
        far = "" if row["kl_original"] is None else f"{row['kl_original']:.5f}"
        size = row["bytes_per_token"] / 1e6
        click.echo(f"{row['bundle']:20s} {row['kl_dequantized']:15.6f} {far:>12s} {size:11.1f}  {row['formats']}")
    click.echo(json.dumps({"num_texts": len(token_ids), "bundles": rows}))


def read_texts(bundle_dir: Path, folder: Path, num_texts: int, max_tokens: int) -> list[list[int]]:
    """Take texts from all files in turn and tokenize them with the bundle's tokenizer."""
    tokenizer = Tokenizer.from_str((bundle_dir / LAYOUT.tokenizer).read_text(encoding="utf-8"))
    sources = [path.read_text(encoding="utf-8").splitlines() for path in sorted(folder.glob("*.jsonl"))]
    picked = []
    for row in range(max(len(lines) for lines in sources)):
        for lines in sources:
            if row < len(lines):
                ids = text_ids(tokenizer, " ".join(_strings(json.loads(lines[row]))))[:max_tokens]
                if len(ids) >= _LEAST_TOKENS:
                    picked.append(ids)
            if len(picked) == num_texts:
                return picked
    return picked


def _strings(value: Any) -> Iterator[str]:
    """All texts of a record, whatever its schema."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def original_logits(model: str, token_ids: Sequence[list[int]]) -> list[Logits]:
    """Second-half logits of the model as it came, in float32."""
    source = find_source(model)
    family, config = read_config(source)
    loaded = load_model(source, family, config, device="cpu", dtype="float32")
    with torch.inference_mode():
        return [
            loaded.model(torch.tensor([ids])).logits[0, len(ids) // 2 :].half().numpy()
            for ids in tqdm(token_ids, desc="original")
        ]


def measure(
    bundle_dir: Path, token_ids: Sequence[list[int]], original: Sequence[Logits] | None, *, prefill: bool
) -> dict[str, Any]:
    """Decode all texts with a bundle's dense FFN, natively and dequantized."""
    bundle = open_bundle(bundle_dir)
    native = NativeDecoder(bundle)
    reference = TorchDecoder(bundle, device="cpu", dtype="float32")
    totals = {"dequantized": 0.0, "original": 0.0}
    num_tokens = 0
    for number, ids in enumerate(tqdm(token_ids, desc=bundle_dir.name)):
        got = native_logits(native, ids, prefill=prefill)
        reference.use(DENSE)
        reference.truncate(0)
        expected = reference.forward(ids, all_logits=True)[len(ids) // 2 :]
        totals["dequantized"] += divergence(expected, got)
        totals["original"] += 0.0 if original is None else divergence(original[number], got)
        num_tokens += len(got)
    formats = {group: record.format for group, record in bundle.manifest.quantization.items()}
    return {
        "bundle": bundle_dir.name,
        "formats": f"{formats['ffn']}, head {formats['head']}",
        "bytes_per_token": native.bytes_per_token(0),
        "kl_dequantized": totals["dequantized"] / num_tokens,
        "kl_original": None if original is None else totals["original"] / num_tokens,
        "num_tokens": num_tokens,
    }


def native_logits(decoder: Decoder, ids: list[int], *, prefill: bool) -> Logits:
    """Read the first half, decode the second: (tokens of the second half, vocabulary)."""
    middle = len(ids) // 2
    decoder.use(DENSE)
    decoder.truncate(0)
    decoder.forward(ids[:middle])
    if prefill:
        return decoder.forward(ids[middle:], all_logits=True)
    return np.concatenate([decoder.forward([token_id]) for token_id in ids[middle:]])


def divergence(expected: Logits, got: Logits) -> float:
    """Sum over tokens of KL(expected || got), in nats."""
    log_p = torch.from_numpy(np.asarray(expected, dtype=np.float32)).log_softmax(dim=-1)
    log_q = torch.from_numpy(np.asarray(got, dtype=np.float32)).log_softmax(dim=-1)
    return float((log_p.exp() * (log_p - log_q)).double().sum())


if __name__ == "__main__":
    main()
