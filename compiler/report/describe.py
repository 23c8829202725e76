"""The description of a bundle: from what was compiled to the manifest."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coreinfer.bundles.formats import GROUP_SIZE
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import (
    GROUPS,
    ClusterRecord,
    Manifest,
    Plan,
    Provenance,
    Quality,
    QuantizationRecord,
    RouterRecord,
    TokenSharesRecord,
    ffn_bytes,
)
from coreinfer.bundles.versions import needed_version
from coreinfer.compiler.clusters.cluster import label_clusters, map_positions, typical_texts
from coreinfer.compiler.clusters.route import Routing
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.prune.narrow import NarrowModel
from coreinfer.compiler.quality.sizes import Sizes
from coreinfer.compiler.quantize.quantize import QuantizeOptions
from coreinfer.compiler.text.corpus import Corpus

__all__ = ["PACKAGES", "Compiled", "formats_of", "manifest_of", "quantization_records"]

PACKAGES = ("torch", "transformers", "numpy", "faiss-cpu", "model2vec")
"""Packages whose versions shape what is compiled."""
_STABILITY_MIN_TOKENS = 200
_FUSED_HALF_TOKENS = 100


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """All that a bundle is written from.

    Attributes:
        narrow: None where all clusters are thin.
        thin: clusters that are thin where others have packs.
    """

    config: CompileConfig
    sizes: Sizes
    loaded: LoadedModel
    corpus: Corpus
    routing: Routing
    narrow: NarrowModel | None
    quality: Quality | None
    model_sha256: str
    token_shares: TokenSharesRecord | None = None
    thin: frozenset[int] = frozenset()

    def has_pack(self, cluster: int) -> bool:
        """Whether a cluster has weights of its own."""
        return self.narrow is not None and cluster not in self.thin


def manifest_of(compiled: Compiled, base_tensors: dict[str, Any]) -> Manifest:
    """Describe a bundle whose files are written but for the manifest."""
    config, routing, record = compiled.config, compiled.routing, compiled.loaded.record
    return Manifest(
        model=record,
        quantization=quantization_records(formats_of(config)),
        clusters=_cluster_records(compiled),
        router=RouterRecord(
            encoder="static",
            dimension=routing.centroids.shape[1],
            distance_p99=routing.distance_p99,
            agreement=routing.agreement,
            num_agreement_sentences=len(compiled.corpus.held_out),
        ),
        plan=Plan(
            selection=config.selection,
            keep=compiled.sizes.keep,
            alpha=config.alpha,
            beta=config.beta,
            cluster_weight=config.effective_cluster_weight,
            budgets="uniform" if compiled.narrow is None else config.effective_budgets,
            layer_budgets=_in_neurons(compiled, compiled.sizes.layer_budgets),
            reconstruct=config.reconstruct and compiled.narrow is not None,
            ridges=(None,) * record.num_layers if compiled.narrow is None else compiled.narrow.ridges,
            dense=config.dense,
            stability_min_tokens=_STABILITY_MIN_TOKENS,
            fused_half_tokens=_FUSED_HALF_TOKENS,
            experts=config.experts,
            layer_experts=compiled.sizes.layer_experts,
        ),
        quality=compiled.quality,
        provenance=_provenance(compiled),
        base_tensors=base_tensors,
        token_shares=compiled.token_shares,
        schema_version=needed_version(
            is_mixture=record.experts is not None,
            has_token_shares=compiled.token_shares is not None,
            is_thin=compiled.narrow is None or bool(compiled.thin),
            has_halves=compiled.token_shares is not None and compiled.token_shares.halves,
            lists_experts=compiled.sizes.layer_experts is not None,
        ),
    )


def formats_of(config: CompileConfig) -> QuantizeOptions:
    """Formats as they are stored: an int8 head can be screened."""
    head: str = config.effective_head_quantize
    head = "int8-planes" if head == "int8" else head
    return QuantizeOptions(body=config.quantize, head=head, by_neuron=config.by_neuron)


def quantization_records(formats: QuantizeOptions) -> dict[str, QuantizationRecord]:
    """Say of each group of tensors how it is stored."""
    return {group: _quantization(formats, group) for group in GROUPS}


def _quantization(formats: QuantizeOptions, group: str) -> QuantizationRecord:
    if group == "norm":
        return QuantizationRecord(format="f32")
    kind = {"embedding": formats.head, "head": formats.head, "ffn": formats.ffn}.get(group, formats.body)
    return QuantizationRecord(format=kind, group_size=None if kind == "bf16" else GROUP_SIZE)


def _cluster_records(compiled: Compiled) -> tuple[ClusterRecord, ...]:
    clustering, documents = compiled.routing.clustering, compiled.corpus.calibration
    texts = [document.routing_text for document in documents]
    labels = label_clusters(texts, clustering.labels)
    examples = typical_texts(texts, compiled.routing.embeddings, clustering)
    positions = map_positions(clustering.centroids)
    record, kind = compiled.loaded.record, formats_of(compiled.config).ffn
    budgets = [_cluster_budgets(compiled, cluster) for cluster in range(clustering.num_clusters)]
    return tuple(
        ClusterRecord(
            file=LAYOUT.cluster(cluster) if compiled.has_pack(cluster) else None,
            label=labels[cluster],
            num_sentences=int((clustering.labels == cluster).sum()),
            num_tokens=sum(
                len(d.token_ids) for d, label in zip(documents, clustering.labels, strict=True) if label == cluster
            ),
            examples=examples[cluster],
            layer_budgets=budgets[cluster],
            keep_ratio=round(sum(budgets[cluster]) / (record.num_layers * record.ffn_dim), 5),
            ffn_bytes=ffn_bytes(
                record, kind, budgets[cluster], compiled.config.experts, _layer_experts(compiled, cluster)
            ),
            map_x=float(positions[cluster][0]),
            map_y=float(positions[cluster][1]),
            layer_experts=_layer_experts(compiled, cluster),
        )
        for cluster in range(clustering.num_clusters)
    )


def _cluster_budgets(compiled: Compiled, cluster: int) -> tuple[int, ...]:
    """Neurons that each layer of a cluster has, all of them where it is thin."""
    if compiled.narrow is None or not compiled.has_pack(cluster):
        record = compiled.loaded.record
        return (record.ffn_dim,) * record.num_layers
    return _in_neurons(compiled, map(len, compiled.narrow.choice.neuron_ids[cluster]))


def _layer_experts(compiled: Compiled, cluster: int) -> tuple[int, ...] | None:
    """How many experts each layer of a cluster has, where it lists narrower ones."""
    if compiled.narrow is None or not compiled.narrow.choice.lists_experts:
        return None
    record, choice = compiled.loaded.record, compiled.narrow.choice
    return tuple(len(choice.experts_of(record, cluster, layer)) for layer in range(record.num_layers))


def _in_neurons(compiled: Compiled, budgets: Iterable[int]) -> tuple[int, ...]:
    """Turn what layers keep, neurons or whole experts, into neurons."""
    # Of thin clusters it is neurons already, all of them.
    whole = compiled.config.experts == "whole" and compiled.narrow is not None
    return tuple(budget * (compiled.loaded.record.expert_neurons if whole else 1) for budget in budgets)


def _provenance(compiled: Compiled) -> Provenance:
    decided = {
        "clusters": compiled.sizes.clusters,
        "keep": compiled.sizes.keep,
        "max_kl": compiled.config.effective_max_kl,
    }
    options = {
        name: _plain(value)
        for name, value in {**asdict(compiled.config), **decided}.items()
        if name not in _UNRECORDED_OPTIONS
        and (name, value) not in _UNRECORDED_VALUES
        # One worker compiles what a process alone does.
        and (name != "workers" or compiled.config.num_places > 1)
    }
    return Provenance(
        coreinfer=version("coreinfer"),
        packages={name: version(name) for name in PACKAGES},
        model_sha256=compiled.model_sha256,
        corpus_sha256=compiled.corpus.sha256,
        encoder=compiled.routing.encoder_name,
        config=options,
    )


# Where a bundle was written and cached says nothing of what it is, and would make equal bundles differ.
_UNRECORDED_OPTIONS = frozenset({"output", "force", "cache_dir", "model", "encoder", "ray"})


# Bundles without are as they were before there were the options.
_UNRECORDED_VALUES = (("token_share", None), ("half_inputs", None), ("experts", "whole"), ("packs", "own"))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    # Calibration files are recorded by name, not by this machine's paths.
    return Path(value).name if isinstance(value, str) and "/" in value else value
