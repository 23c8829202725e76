"""The manifest: the description of a bundle."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import BundleCorrupt, BundleNotFound, BundleVersionError, join_problems
from .expert_packs import ExpertPacks, expert_pack_problems
from .ffn_sizes import ffn_bytes
from .formats import FORMATS, NEURON_FORMAT
from .layout import LAYOUT
from .quality_records import ClusterQuality, PackChoice, Quality, Score, ShareScore, TokenSharesRecord, TriedWeights
from .remote.places import is_address
from .schema import parse
from .statistics import Selection
from .thin_clusters import share_problems
from .versions import READ_VERSIONS, SCHEMA_VERSION
from .zero_neurons import has_zero_neurons

__all__ = [
    "GROUPS",
    "ClusterQuality",
    "ClusterRecord",
    "ExpertPacks",
    "ExpertsRecord",
    "FileRecord",
    "Manifest",
    "ModelRecord",
    "PackChoice",
    "Plan",
    "Provenance",
    "Quality",
    "QuantizationRecord",
    "RouterRecord",
    "Score",
    "ShareScore",
    "TensorRecord",
    "TokenSharesRecord",
    "TriedWeights",
    "content_sha256",
    "ffn_bytes",
    "read_manifest",
    "write_manifest",
]

_CHECKSUM = "sha256"
GROUPS = ("embedding", "attention", "norm", "head", "ffn")
"""Tensor groups that are quantized separately."""


@dataclass(frozen=True, kw_only=True)
class ExpertsRecord:
    """The experts of each layer, where the FFN is a mixture of them.

    Attributes:
        num_experts: of a layer, all of one width.
        num_chosen: that a token uses.
        normalizes: whether the weights of those that are chosen are divided by their sum.
    """

    num_experts: int
    num_chosen: int
    normalizes: bool


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The model that was compiled: its family, shapes and transformers config.

    Attributes:
        ffn_dim: neurons of a layer, of all its experts together where it has any.
        experts: None where the FFN is one.
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    ffn_dim: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    activation: str
    gated: bool
    ffn_bias: bool
    tied_head: bool
    config: dict[str, Any]
    experts: ExpertsRecord | None = None

    @property
    def expert_neurons(self) -> int:
        """Neurons of an expert; 1 where the FFN is one, of which each neuron is kept or left out by itself."""
        return 1 if self.experts is None else self.ffn_dim // self.experts.num_experts


@dataclass(frozen=True, kw_only=True)
class QuantizationRecord:
    """How the tensors of one group are stored.

    Attributes:
        format: one of `FORMATS` of formats.py; of the FFN also `NEURON_FORMAT`.
        group_size: inputs that share a scale, None where there are no scales.
    """

    format: str
    group_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class ClusterRecord:
    """One cluster: what it holds and what its pack costs.

    Attributes:
        file: the pack, relative to the bundle; None of a thin cluster, which has no weights of its own: it decodes with
            the dense FFN, at its own share and by its own thresholds.
        num_sentences, num_tokens: calibration text in the cluster.
        examples: its most typical sentences, shortened.
        layer_budgets: kept neurons of each layer; of a mixture of experts those of whole experts, or where experts are
            narrowed as many of each that is there.
        keep_ratio: kept neurons / all neurons over all layers.
        ffn_bytes: bytes of FFN weights read for one decoded token; of a mixture those of the experts that it uses.
        map_x, map_y: where the centroid lies on the two-dimensional map of the report.
        layer_experts: of a mixture whose packs have some experts, each narrower, how many each layer has; else None.
    """

    file: str | None
    label: str
    num_sentences: int
    num_tokens: int
    examples: tuple[str, ...]
    layer_budgets: tuple[int, ...]
    keep_ratio: float
    ffn_bytes: int
    map_x: float
    map_y: float
    layer_experts: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class RouterRecord:
    """How a prompt finds its cluster.

    Attributes:
        encoder: "static": the mean of the table's rows at the text's token ids, L2-normed.
        dimension: length of an embedding.
        distance_p99: 99th percentile of 1 - cosine between calibration sentences and their nearest centroid; the
            larger one of what the router was fitted to and of what it was not.
        agreement: share of held-out sentences that the static encoder and the sentence encoder route alike;
            None when there were none.
        num_agreement_sentences: how many sentences the agreement was measured on.
    """

    encoder: str
    dimension: int
    distance_p99: float
    agreement: float | None
    num_agreement_sentences: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How neurons were chosen and repaired.

    Attributes:
        selection: "output-aware", "coreinfer" or "griffin".
        keep: keep ratio of the clusters, or what theirs are on average over held-out text where each has its own.
        layer_budgets: neurons of each layer that make up `keep`: what clusters keep that have none of their own, and
            prompts that choose their own neurons.
        ridges: ridge of each layer, relative to the mean diagonal of its Gram matrix; None where the repair was
            rejected or not asked for.
        stability_min_tokens: prompts of at least this many tokens may choose their own neurons in mode "auto".
        fused_half_tokens: n0 of the fused mode: a prompt of n0 tokens counts as much as its cluster.
        experts: of a mixture, what packs have; "whole" of other models.
        layer_experts: as a cluster's, of what `layer_budgets` keep.
    """

    selection: Selection
    keep: float
    alpha: float
    beta: float
    cluster_weight: float
    budgets: str
    layer_budgets: tuple[int, ...]
    reconstruct: bool
    ridges: tuple[float | None, ...]
    dense: bool
    stability_min_tokens: int
    fused_half_tokens: int
    experts: ExpertPacks = "whole"
    layer_experts: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a bundle comes from."""

    coreinfer: str
    packages: dict[str, str]
    model_sha256: str
    corpus_sha256: str
    encoder: str
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Checksum and size of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """Type and shape of one tensor of the base, whose names differ from family to family."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a bundle; `files` lists every other file."""

    model: ModelRecord
    quantization: dict[str, QuantizationRecord]
    clusters: tuple[ClusterRecord, ...]
    router: RouterRecord
    plan: Plan
    quality: Quality | None
    provenance: Provenance
    base_tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    token_shares: TokenSharesRecord | None = None

    @property
    def has_dense(self) -> bool:
        """Whether the bundle holds the dense FFN."""
        return LAYOUT.dense in self.files

    @property
    def has_thin(self) -> bool:
        """Whether there are clusters without weights of their own."""
        return any(cluster.file is None for cluster in self.clusters)

    @property
    def has_halves(self) -> bool:
        """Whether decoded tokens read some inputs in half."""
        return self.token_shares is not None and self.token_shares.halves

    @property
    def pack_files(self) -> tuple[str, ...]:
        """The packs of all clusters that have one."""
        return tuple(cluster.file for cluster in self.clusters if cluster.file is not None)

    @property
    def narrows_experts(self) -> bool:
        """Whether packs of a mixture have weights of their own, of experts with fewer neurons each."""
        return self.model.experts is not None and self.plan.experts != "whole"

    @property
    def lists_experts(self) -> bool:
        """Whether packs with narrower experts have some of them alone, which they list."""
        return self.model.experts is not None and self.plan.experts == "both"

    @property
    def unit_neurons(self) -> int:
        """Neurons of a layer that are kept or left out together: one, those of an expert, or one of each expert.

        Where packs have some experts, each narrower, layers have unlike numbers of them, and neurons count one by one.
        """
        if self.lists_experts:
            return 1
        if self.model.experts is not None and self.narrows_experts:
            return self.model.experts.num_experts
        return self.model.expert_neurons

    @property
    def ffn_bytes(self) -> int:
        """Bytes of FFN weights that the dense model reads for one token, at the stored width."""
        kind = self.quantization["ffn"].format
        return ffn_bytes(self.model, kind, (self.model.ffn_dim,) * self.model.num_layers)

    @property
    def has_own_budgets(self) -> bool:
        """Whether clusters have layer budgets that differ from the plan's."""
        plan = (self.plan.layer_budgets, self.plan.layer_experts)
        return any((cluster.layer_budgets, cluster.layer_experts) != plan for cluster in self.clusters)

    @property
    def mean_pack_bytes(self) -> int:
        """Bytes of FFN weights that a token reads with a pack: the mean over the clusters' calibration tokens."""
        num_tokens = sum(cluster.num_tokens for cluster in self.clusters)
        total = sum(cluster.ffn_bytes * cluster.num_tokens for cluster in self.clusters)
        return round(total / num_tokens) if num_tokens else self.clusters[0].ffn_bytes


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest as indented JSON, keys in the order of the dataclasses, its own checksum last."""
    data = asdict(manifest)
    if manifest.token_shares is None:
        # Bundles without them are as they were before there were any.
        del data["token_shares"]
    else:
        has = {"halves": manifest.has_halves, "choices": bool(manifest.token_shares.choices)}
        data["token_shares"] = {name: value for name, value in data["token_shares"].items() if has.get(name, True)}
    if not manifest.narrows_experts:
        del data["plan"]["experts"]
    if not manifest.lists_experts:
        for part in (data["plan"], *data["clusters"]):
            del part["layer_experts"]
    text = json.dumps({**data, _CHECKSUM: content_sha256(data)}, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def content_sha256(data: Mapping[str, Any]) -> str:
    """Hash the values of a parsed manifest, its checksum left out; spacing and order of keys do not matter."""
    values = {name: value for name, value in data.items() if name != _CHECKSUM}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_manifest(bundle_dir: Path) -> Manifest:
    """Read and check a bundle's manifest.

    Raises:
        BundleNotFound: there is no folder or no manifest in it.
        BundleVersionError: neither this schema version nor the one before it.
        BundleCorrupt: not JSON, or fields are missing or of the wrong type; all of them are named.
    """
    path = bundle_dir / LAYOUT.manifest
    data = _read_json(bundle_dir, path)
    version = data.get("schema_version")
    if version not in READ_VERSIONS:
        newer = isinstance(version, int) and version > max(READ_VERSIONS)
        advice = "upgrade coreinfer" if newer else "compile the bundle again with this coreinfer"
        known = f"{', '.join(map(str, READ_VERSIONS[:-1]))} and {READ_VERSIONS[-1]}"
        raise BundleVersionError(f"{path}: schema version {version!r}, this coreinfer reads {known}; {advice}")
    problems: list[str] = []
    manifest = parse(Manifest, _upgraded(data) if version < SCHEMA_VERSION else data, "manifest", problems)
    if manifest is not None and data.get(_CHECKSUM) != content_sha256(data):
        problems.append("its values do not match its own checksum")
    if manifest is not None:
        problems += _unknown_formats(manifest.quantization, manifest.model)
        problems += share_problems(manifest)
        problems += expert_pack_problems(manifest)
    if manifest is None or problems:
        raise BundleCorrupt(f"{path}: {join_problems(problems)}; compile the bundle again")
    return manifest


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """Turn the values of version 2, in which all clusters have the plan's layer budgets, into those of this version."""
    plan, clusters = data.get("plan"), data.get("clusters")
    if isinstance(plan, dict) and isinstance(clusters, list):
        same = {"layer_budgets": plan.get("layer_budgets")}
        clusters = [{**cluster, **same} if isinstance(cluster, dict) else cluster for cluster in clusters]
    return {**data, "clusters": clusters, "schema_version": SCHEMA_VERSION}


def _read_json(bundle_dir: Path, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = _why_no_bundle(bundle_dir)
        raise BundleNotFound(f"{bundle_dir} {reason}; give a folder that coreinfer-compile wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleCorrupt(f"{path}: cannot be read as JSON ({error}); compile the bundle again") from error
    if not isinstance(data, dict):
        raise BundleCorrupt(f"{path}: expected a JSON object, got {type(data).__name__}; compile the bundle again")
    return data


def _why_no_bundle(bundle_dir: Path) -> str:
    if bundle_dir.is_dir():
        return f"is not a bundle (it has no {LAYOUT.manifest})"
    if is_address(bundle_dir):
        return "is an address, which only coreinfer-run, coreinfer-serve and runtime.load fetch bundles from"
    return "is a file, not a folder" if bundle_dir.exists() else "does not exist"


def _unknown_formats(quantization: Mapping[str, QuantizationRecord], model: ModelRecord) -> list[str]:
    missing = [f"manifest.quantization.{group}: missing" for group in GROUPS if group not in quantization]
    unknown = [
        f"manifest.quantization.{group}: format {record.format!r}, this coreinfer reads {', '.join(FORMATS)}"
        for group, record in quantization.items()
        if record.format not in FORMATS and (group, record.format) != ("ffn", NEURON_FORMAT)
    ]
    by_neuron = "ffn" in quantization and quantization["ffn"].format == NEURON_FORMAT
    if by_neuron and not has_zero_neurons(model):
        unknown.append(
            f"manifest.quantization.ffn: format {NEURON_FORMAT!r} is for activation 'relu' or gates that are cut off, "
            f"got {model.activation!r}"
        )
    return missing + unknown
