"""Tiny bundles for tests: whole on disk, random weights, placeholder bytes for the tokenizer and the router.

Needs numpy only. Test modules use it through the fixtures `bundle_dir` and `make_bundle`, or by
`from .bundle_factory import ...`.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from coreinfer.bundles.contract import cluster_tensors, dense_tensors
from coreinfer.bundles.formats import GROUP_SIZE, PACKED_FORMATS
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import (
    GROUPS,
    ClusterQuality,
    ClusterRecord,
    Manifest,
    ModelRecord,
    Plan,
    Provenance,
    Quality,
    QuantizationRecord,
    RouterRecord,
    Score,
    TensorRecord,
    content_sha256,
    read_manifest,
)
from coreinfer.bundles.tensors import StoredTensor, TensorFile, write_tensors
from coreinfer.bundles.writer import finish_manifest, stage_bundle

HIDDEN_SIZE = 64
FFN_DIM = 128
VOCAB_SIZE = 32
LAYER_BUDGETS = (96, 50)
SMALL_FILES = {
    LAYOUT.tokenizer: b'{"placeholder": "tokenizer"}',
    LAYOUT.chat_template: b"{{ messages[0]['content'] }}",
    LAYOUT.generation: b'{"eos_token_ids": [2]}',
    LAYOUT.router_index: b"placeholder for a FAISS index",
    LAYOUT.router_tokenizer: b'{"placeholder": "router tokenizer"}',
    LAYOUT.report: b"<!doctype html><title>report</title>",
}


def float32_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 bit patterns, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def make_manifest(
    *, gated: bool = True, ffn_bias: bool = False, dense: bool = True, ffn_format: str = "bf16", num_clusters: int = 2
) -> Manifest:
    """Describe a tiny model of 2 layers; llama-like when gated, OPT-like otherwise. `files` is left empty."""
    formats = dict.fromkeys(GROUPS, QuantizationRecord(format="bf16")) | {"norm": QuantizationRecord(format="f32")}
    return Manifest(
        model=_model(gated=gated, ffn_bias=ffn_bias),
        quantization=formats | {"ffn": _ffn_record(ffn_format)},
        clusters=tuple(_cluster(index) for index in range(num_clusters)),
        router=RouterRecord(
            encoder="static", dimension=16, distance_p99=0.625, agreement=0.9375, num_agreement_sentences=64
        ),
        plan=_plan(dense=dense),
        quality=_quality(num_clusters),
        provenance=Provenance(
            coreinfer="0.1.0",
            packages={"numpy": "2.0.0", "torch": "2.6.0"},
            model_sha256="ab" * 32,
            corpus_sha256="cd" * 32,
            encoder="tiny-sentence-encoder",
            config={"keep": 0.57, "clusters": num_clusters},
        ),
        base_tensors={
            "model.embed_tokens.weight": TensorRecord(dtype="BF16", shape=(VOCAB_SIZE, HIDDEN_SIZE)),
            "model.norm.weight": TensorRecord(dtype="F32", shape=(HIDDEN_SIZE,)),
        },
    )


def _ffn_record(ffn_format: str) -> QuantizationRecord:
    return QuantizationRecord(format=ffn_format, group_size=GROUP_SIZE if ffn_format in PACKED_FORMATS else None)


def _model(*, gated: bool, ffn_bias: bool) -> ModelRecord:
    return ModelRecord(
        name="tiny-llama" if gated else "tiny-opt",
        family="llama" if gated else "opt",
        num_layers=len(LAYER_BUDGETS),
        hidden_size=HIDDEN_SIZE,
        ffn_dim=FFN_DIM,
        vocab_size=VOCAB_SIZE,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_positions=256,
        activation="silu" if gated else "relu",
        gated=gated,
        ffn_bias=ffn_bias,
        tied_head=True,
        config={"model_type": "llama" if gated else "opt", "rope_theta": 10000.0},
    )


def _cluster(index: int) -> ClusterRecord:
    return ClusterRecord(
        file=LAYOUT.cluster(index),
        label=f"topic {index}",
        num_sentences=40 + index,
        num_tokens=900 + index,
        examples=(f"First example of topic {index}.", f"Ein zweites Beispiel für Thema {index}."),
        layer_budgets=LAYER_BUDGETS,
        keep_ratio=sum(LAYER_BUDGETS) / (FFN_DIM * len(LAYER_BUDGETS)),
        ffn_bytes=2 * 3 * HIDDEN_SIZE * sum(LAYER_BUDGETS),
        map_x=0.25 * index,
        map_y=-1.5,
    )


def _plan(*, dense: bool) -> Plan:
    return Plan(
        selection="output-aware",
        keep=0.57,
        alpha=0.4,
        beta=0.4,
        cluster_weight=0.3,
        budgets="sensitivity",
        layer_budgets=LAYER_BUDGETS,
        reconstruct=True,
        ridges=(0.01, None),
        dense=dense,
        stability_min_tokens=200,
        fused_half_tokens=100,
    )


def _quality(num_clusters: int) -> Quality:
    def score(name: str, kl: float) -> Score:
        return Score(name=name, perplexity=20.5 + kl, kl=kl, top1=1 - kl / 4, num_texts=12, num_tokens=480)

    return Quality(
        dense=score("dense", 0.0),
        clusters=score("clusters", 0.5),
        controls=(score("static mask", 0.75), score("random clusters", 0.875)),
        per_cluster=tuple(
            ClusterQuality(cluster=index, score=score(f"topic {index}", 0.25)) for index in range(num_clusters)
        ),
    )


def write_bundle(target: Path, *, seed: int = 0, force: bool = False, **options: Any) -> Path:
    """Write a whole bundle; `options` are those of `make_manifest`. Returns `target`."""
    manifest = make_manifest(**options)
    rng = np.random.default_rng(seed)
    with stage_bundle(target, force=force) as stage:
        for name, data in SMALL_FILES.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).write_bytes(data)
        for name, records in _tensor_records(manifest):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            write_tensors(stage / name, {key: _random_tensor(key, record, rng) for key, record in records.items()})
        finish_manifest(stage, manifest)
    return target


def _tensor_records(manifest: Manifest) -> Iterator[tuple[str, Mapping[str, TensorRecord]]]:
    yield LAYOUT.base, manifest.base_tensors
    yield LAYOUT.router_table, {"table": TensorRecord(dtype="F32", shape=(VOCAB_SIZE, manifest.router.dimension))}
    if manifest.plan.dense:
        yield LAYOUT.dense, dense_tensors(manifest)
    for number, name in enumerate(manifest.pack_files):
        yield name, cluster_tensors(manifest, number)


def _random_tensor(name: str, record: TensorRecord, rng: np.random.Generator) -> StoredTensor:
    if record.dtype == "I32":
        ids = rng.choice(FFN_DIM, size=record.shape[0], replace=False)
        return StoredTensor("I32", np.sort(ids).astype(np.int32))
    if record.dtype == "U8":
        return StoredTensor("U8", rng.integers(0, 256, record.shape, dtype=np.uint8))
    values = rng.standard_normal(record.shape, dtype=np.float32)
    if record.dtype == "F16":
        return StoredTensor("F16", np.abs(values * 0.01).astype(np.float16))
    if name.endswith(("scores", "norms")):
        values = np.abs(values)
    return StoredTensor(record.dtype, float32_to_bf16(values) if record.dtype == "BF16" else values)


def list_again(bundle_dir: Path) -> None:
    """Bring the manifest's checksums and sizes up to date with the files, as whoever forges a bundle would."""
    finish_manifest(bundle_dir, replace(read_manifest(bundle_dir), files={}))


@contextmanager
def edit_manifest(bundle_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the manifest as parsed JSON and write it back."""
    path = bundle_dir / LAYOUT.manifest
    data = json.loads(path.read_text(encoding="utf-8"))
    yield data
    data["sha256"] = content_sha256(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def change_tensors(
    bundle_dir: Path, name: str, change: Callable[[dict[str, StoredTensor]], object], *, listed: bool = True
) -> None:
    """Rewrite one tensor file of a bundle; `listed` puts its new checksum into the manifest."""
    file = TensorFile(bundle_dir / name)
    tensors = {key: StoredTensor(tensor.dtype, tensor.array.copy()) for key, tensor in file.items()}
    change(tensors)
    write_tensors(bundle_dir / name, tensors)
    if listed:
        list_again(bundle_dir)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Keep other processes of pytest-xdist out of what this one writes; `path` is a file for that alone."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def written_once(folder: Path, write: Callable[[str, Path, dict[str, Any]], object]) -> Callable[..., Path]:
    """A function (family, **options) that gives the bundle that `write` writes of them when first asked for."""

    def bundle(family: str, **options: Any) -> Path:
        key = repr((family, sorted(options.items())))
        target = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        with one_at_a_time(folder / f"{target.name}.lock"):
            if not target.exists():
                write(family, target, options)
        return target

    return bundle


def with_more_positions(bundle_dir: Path, max_positions: int) -> None:
    """Let a bundle with rotary positions read longer texts."""
    with edit_manifest(bundle_dir) as data:
        data["model"]["max_positions"] = data["model"]["config"]["max_position_embeddings"] = max_positions


def as_version_2(data: dict[str, Any]) -> None:
    """Make the values of a manifest those of the version before, in which clusters had no budgets of their own."""
    data["schema_version"] = 2
    for cluster in data["clusters"]:
        del cluster["layer_budgets"]


def flip_bit(path: Path, position: int | None = None) -> None:
    """Flip one bit of a file, in its middle unless told where."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)
