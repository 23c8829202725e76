"""How fast a mixture of experts decodes, beside one FFN of the experts that a token uses; weights are random.

    python benchmarks/experts.py --experts 64 --chosen 8 --expert-dim 1024

The default shape is that of OLMoE-1B-7B: 1.3 billion weights a token. Both models have the same layers but for their
FFN, and are decoded in turns. Prints a Markdown table: bytes that a token reads, tokens a second, and the share of
what a plain read of as many bytes reaches in the same seconds. Then one line of JSON. With --narrow a pack whose
experts have fewer neurons is decoded too.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from coreinfer.bundles import Bundle
from coreinfer.bundles.contract import cluster_tensors, dense_tensors
from coreinfer.bundles.formats import GROUP_SIZE, stored_shapes
from coreinfer.bundles.manifest import (
    GROUPS,
    ClusterRecord,
    ExpertPacks,
    ExpertsRecord,
    Manifest,
    ModelRecord,
    Plan,
    Provenance,
    QuantizationRecord,
    RouterRecord,
    TensorRecord,
)
from coreinfer.bundles.tensors import StoredTensor, TensorFile, stream_tensors
from coreinfer.runtime.engines.native import _native
from coreinfer.runtime.engines.native.decoder import NativeDecoder
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice

_NUM_HEADS, _VOCAB = 16, 32_000
_KIND = "int4"


@click.command(context_settings={"show_default": True})
@click.option("--experts", "num_experts", default=64)
@click.option("--chosen", "num_chosen", default=8)
@click.option("--expert-dim", default=1024)
@click.option("--hidden-size", default=2048)
@click.option("--layers", "num_layers", default=16)
@click.option("--kept", default=40, help="Experts of each layer that the pack has.")
@click.option("--narrow", default=0, help="Neurons of each expert in a pack of narrow ones; 0 for no such pack.")
@click.option("--tokens", "num_tokens", default=24, help="Decoded in a round.")
@click.option("--rounds", default=5)
@click.option("--threads", default=2)
def main(
    num_experts: int,
    num_chosen: int,
    expert_dim: int,
    hidden_size: int,
    num_layers: int,
    kept: int,
    narrow: int,
    num_tokens: int,
    rounds: int,
    threads: int,
) -> None:
    """Print the table of the module's docstring."""
    experts = ExpertsRecord(num_experts=num_experts, num_chosen=num_chosen, normalizes=True)
    mixed = _record(num_layers, hidden_size, num_experts * expert_dim, experts)
    plain = _record(num_layers, hidden_size, num_chosen * expert_dim, None)
    contenders = {
        "experts": _manifest(mixed, kept * expert_dim),
        "one FFN": _manifest(plain, 32),
        **({"narrow experts": _manifest(mixed, num_experts * narrow, "narrow")} if narrow else {}),
    }
    folder = Path(tempfile.mkdtemp(prefix="coreinfer-experts-"))
    try:
        decoders = {
            name: NativeDecoder(_write(folder / name, manifest), threads=threads)
            for name, manifest in contenders.items()
        }
        rows = _measure(decoders, num_tokens, rounds)
    finally:
        shutil.rmtree(folder)
    print("| FFN | MB a token | tok/s | of a plain read | prompt tok/s |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['megabytes']:.1f} | {row['tok_s']:.1f} | {row['read_share']:.2f} | "
            f"{row['prompt_tok_s']:.0f} |"
        )
    print(json.dumps(rows))


def _record(num_layers: int, hidden: int, ffn_dim: int, experts: ExpertsRecord | None) -> ModelRecord:
    return ModelRecord(
        name="random",
        family="llama" if experts is None else "mixtral",
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_dim=ffn_dim,
        vocab_size=_VOCAB,
        num_heads=_NUM_HEADS,
        num_kv_heads=_NUM_HEADS,
        head_dim=hidden // _NUM_HEADS,
        max_positions=512,
        activation="silu",
        gated=True,
        ffn_bias=False,
        tied_head=True,
        config={"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        experts=experts,
    )


def _manifest(record: ModelRecord, budget: int, experts: ExpertPacks = "whole") -> Manifest:
    budgets, packed = (budget,) * record.num_layers, QuantizationRecord(format=_KIND, group_size=GROUP_SIZE)
    cluster = ClusterRecord(
        file="pack.safetensors",
        label="",
        num_sentences=1,
        num_tokens=1,
        examples=(),
        layer_budgets=budgets,
        keep_ratio=budget / record.ffn_dim,
        ffn_bytes=0,
        map_x=0.0,
        map_y=0.0,
    )
    plan = Plan(
        selection="output-aware",
        keep=1.0,
        alpha=1.0,
        beta=1.0,
        cluster_weight=1.0,
        budgets="uniform",
        layer_budgets=budgets,
        reconstruct=False,
        ridges=(None,) * record.num_layers,
        # Whole experts are those of the dense FFN.
        dense=experts == "whole",
        stability_min_tokens=0,
        fused_half_tokens=0,
        experts=experts,
    )
    return Manifest(
        model=record,
        quantization=dict.fromkeys(GROUPS, packed),
        clusters=(cluster,),
        router=RouterRecord(encoder="static", dimension=1, distance_p99=0.0, agreement=None, num_agreement_sentences=0),
        plan=plan,
        quality=None,
        provenance=Provenance(coreinfer="", packages={}, model_sha256="", corpus_sha256="", encoder="", config={}),
        base_tensors=_base_tensors(record),
    )


def _base_tensors(record: ModelRecord) -> dict[str, TensorRecord]:
    size = record.hidden_size
    shapes = stored_shapes("model.embed_tokens.weight", "int8-planes", (record.vocab_size, size))
    vectors = ["model.norm.weight"]
    for layer in range(record.num_layers):
        root = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= stored_shapes(f"{root}self_attn.{name}.weight", _KIND, (size, size))
        vectors += [f"{root}input_layernorm.weight", f"{root}post_attention_layernorm.weight"]
        if record.experts is not None:
            shapes |= stored_shapes(f"{root}mlp.router.weight", "bf16", (record.experts.num_experts, size))
    records = {name: TensorRecord(dtype=dtype, shape=shape) for name, (dtype, shape) in shapes.items()}
    return records | {name: TensorRecord(dtype="F32", shape=(size,)) for name in vectors}


def _write(folder: Path, manifest: Manifest) -> Bundle:
    """Write the files that a decoder reads, and open them without the checks of a whole bundle."""
    folder.mkdir()
    random = np.random.default_rng(0)
    files = {"base.safetensors": manifest.base_tensors, "pack.safetensors": cluster_tensors(manifest, 0)}
    if manifest.plan.dense:
        files["dense.safetensors"] = dense_tensors(manifest)
    for name, tensors in files.items():
        stream_tensors(folder / name, _tensors(tensors, random))
    base, pack, *dense = (TensorFile(folder / name) for name in files)
    return Bundle(path=folder, manifest=manifest, base=base, dense=dense[0] if dense else None, mapped={0: pack})


def _tensors(records: Mapping[str, TensorRecord], random: np.random.Generator) -> Iterator[tuple[str, StoredTensor]]:
    for name, record in records.items():
        yield name, _tensor(name, record, random)


def _tensor(name: str, record: TensorRecord, random: np.random.Generator) -> StoredTensor:
    shape = record.shape
    if record.dtype == "I32":
        return StoredTensor("I32", np.arange(shape[0], dtype=np.int32))
    if record.dtype == "F32":
        return StoredTensor("F32", np.ones(shape, dtype=np.float32))
    if record.dtype == "F16":
        return StoredTensor("F16", np.full(shape, 0.002, dtype=np.float16))
    if record.dtype == "BF16":
        bits = (random.standard_normal(shape, dtype=np.float32) * 0.05).view(np.uint32) >> 16
        return StoredTensor("BF16", bits.astype(np.uint16))
    if name.endswith(".zero"):
        return StoredTensor("U8", np.full(shape, 120, dtype=np.uint8))
    return StoredTensor("U8", np.frombuffer(random.bytes(int(np.prod(shape))), dtype=np.uint8).reshape(shape))


def _measure(decoders: Mapping[str, NativeDecoder], num_tokens: int, rounds: int) -> list[dict[str, Any]]:
    ids = np.random.default_rng(1).integers(0, _VOCAB, 128 + num_tokens).tolist()
    cases = [
        (f"{name}, {what}", decoder, choice)
        for name, decoder in decoders.items()
        for what, choice in (("dense", DENSE), ("pack", FfnChoice(cluster=0)))
        if what in {"experts": ("dense", "pack"), "narrow experts": ("pack",)}.get(name, ("dense",))
    ]
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name, _, _ in cases}
    sizes = {}
    for _ in range(rounds + 1):
        for name, decoder, choice in cases:
            decoder.use(choice)
            decoder.truncate(0)
            sizes[name] = decoder.bytes_per_token(128 + num_tokens // 2, greedy=True)
            prompt = _seconds(decoder, [ids[:128]])
            decode = _seconds(decoder, [[token_id] for token_id in ids[128:]])
            read = _native.read_bandwidth(decoder.num_threads, min(sizes[name], 500_000_000))
            found[name].append((num_tokens / decode, sizes[name] * num_tokens / decode / 1e9 / read, 128 / prompt))
    rows = []
    for name, runs in found.items():
        # The first round brings the files in.
        tok_s, share, prompt_tok_s = (statistics.median(values) for values in zip(*runs[1:], strict=True))
        rows.append(
            {
                "name": name,
                "megabytes": sizes[name] / 1e6,
                "tok_s": tok_s,
                "read_share": share,
                "prompt_tok_s": prompt_tok_s,
            }
        )
    return rows


def _seconds(decoder: NativeDecoder, calls: list[list[int]]) -> float:
    start = time.perf_counter()
    for token_ids in calls:
        decoder.forward(token_ids, greedy=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
