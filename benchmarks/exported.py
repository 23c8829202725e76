"""How near an export is to the bundle that it was made from.

    python benchmarks/exported.py --bundle DIR (--cluster N | --dense) --texts FOLDER [--num-texts 50] [--dequantized]

Exports the model to GGUF and for transformers, and compares the logits of llama.cpp (where one of its packages is
installed) and of transformers in float32 with those of the native engine, on every token of each text; with
--dequantized also with those of the bundle's weights in float32. A line for each, then one JSON line.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from contenders.llama_logits import LlamaModel, find_llama_cpp
from coreinfer.bundles import open_bundle
from coreinfer.bundles.shared.machine import usable_cores
from coreinfer.compiler.export.exporting import export_model
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice
from coreinfer.runtime.engines.torch.decoder import TorchDecoder
from kl import divergence, read_texts
from tqdm import tqdm
from transformers import AutoModelForCausalLM

Logits = npt.NDArray[np.float32]


@click.command()
@click.option("--bundle", "bundle_dir", required=True, type=click.Path(path_type=Path))
@click.option("--cluster", type=int, default=None)
@click.option("--dense", is_flag=True)
@click.option("--texts", required=True, type=click.Path(path_type=Path), help="Folder of JSON Lines files.")
@click.option("--num-texts", type=int, default=50)
@click.option("--max-tokens", type=int, default=128, help="Read at most so many tokens of a text.")
@click.option("--forms", default="gguf,hf", help="What to export.")
@click.option("--dequantized", is_flag=True, help="Compare with the weights in float32, too.")
@click.option("--dtype", default="bfloat16", help="Of the weights for transformers.")
def main(
    bundle_dir: Path,
    cluster: int | None,
    dense: bool,
    texts: Path,
    num_texts: int,
    max_tokens: int,
    forms: str,
    dequantized: bool,
    dtype: str,
) -> None:
    """Compare exports with their bundle."""
    token_ids = read_texts(bundle_dir, texts, num_texts, max_tokens)
    choice = DENSE if cluster is None else FfnChoice(cluster=cluster)
    bundle = open_bundle(bundle_dir)
    references = {"native": list(engine_logits(NativeDecoder(bundle), choice, token_ids))}
    if dequantized:
        decoder = TorchDecoder(bundle, device="cpu", dtype="float32")
        references["dequantized"] = list(engine_logits(decoder, choice, token_ids))
    found = {"native": references["native"]}
    sizes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in forms.split(","):
            output = Path(folder) / form
            done = export_model(bundle_dir, output, form=form, cluster=cluster, dense=dense, dtype=dtype)
            sizes[form] = {"num_bytes": done.num_bytes, "padding_bytes": done.padding_bytes, **done.facts}
        if "gguf" in sizes and find_llama_cpp():
            found["llama.cpp"] = list(llama_logits(Path(folder) / "gguf/model.gguf", token_ids))
        if "hf" in sizes:
            found["transformers"] = list(transformers_logits(Path(folder) / "hf", token_ids))
    num_tokens = sum(map(len, token_ids))
    rows = {
        name: {
            against: sum(map(divergence, reference, logits)) / num_tokens for against, reference in references.items()
        }
        for name, logits in found.items()
    }
    for name, row in rows.items():
        click.echo(f"{name:14s} " + ", ".join(f"KL {kl:.6f} from {against}" for against, kl in row.items()))
    click.echo(json.dumps({"num_texts": len(token_ids), "num_tokens": num_tokens, "kl": rows, "sizes": sizes}))


def engine_logits(decoder: Decoder, choice: FfnChoice, token_ids: Sequence[list[int]]) -> Iterator[Logits]:
    """Logits of every token, each text read in one block; in float16, which holds them."""
    for ids in tqdm(token_ids, desc=type(decoder).__name__):
        decoder.use(choice)
        decoder.truncate(0)
        yield np.asarray(decoder.forward(ids, all_logits=True)).astype(np.float16)


def llama_logits(path: Path, token_ids: Sequence[list[int]]) -> Iterator[Logits]:
    """The same of llama.cpp."""
    model = LlamaModel(path, num_positions=max(map(len, token_ids)), threads=usable_cores())
    for ids in tqdm(token_ids, desc="llama.cpp"):
        yield model.logits(ids).astype(np.float16)


def transformers_logits(folder: Path, token_ids: Sequence[list[int]]) -> Iterator[Logits]:
    """The same of transformers, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ids in tqdm(token_ids, desc="transformers"):
        with torch.inference_mode():
            yield model(torch.tensor([ids])).logits[0].half().numpy()


if __name__ == "__main__":
    main()
