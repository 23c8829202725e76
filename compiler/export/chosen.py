"""Which of a bundle's models is exported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer.bundles import Bundle, ConfigError, UnsupportedModelError, open_bundle
from coreinfer.bundles.contract import kept_experts
from coreinfer.bundles.families import Family, family_by_name
from coreinfer.bundles.tensors import TensorFile

__all__ = ["ChosenModel", "choose_model"]


@dataclass(frozen=True, kw_only=True)
class ChosenModel:
    """One of the models that a bundle holds.

    Attributes:
        ffn: the dense FFN or a cluster pack; of a pack that names experts the dense FFN, in which they are.
        widths: neurons of each layer, of a mixture those of each of its experts.
        cluster: whose pack it is; None for the dense model.
        experts: of a mixture, the numbers of each layer's experts, as many in each layer; else None.
    """

    bundle: Bundle
    ffn: TensorFile
    widths: tuple[int, ...]
    cluster: int | None
    experts: tuple[tuple[int, ...], ...] | None = None

    @property
    def family(self) -> Family:
        """The row of the model's family."""
        return family_by_name(self.bundle.manifest.model.family)

    @property
    def config(self) -> dict[str, Any]:
        """The transformers config of the model before it was narrowed."""
        return self.bundle.manifest.model.config

    @property
    def title(self) -> str:
        """Name the model for people."""
        record = self.bundle.manifest.model
        if self.cluster is None:
            return f"{record.name}, dense"
        return f"{record.name}, cluster {self.cluster} ({self.bundle.manifest.clusters[self.cluster].label})"


def choose_model(bundle_dir: Path, *, cluster: int | None, dense: bool) -> ChosenModel:
    """Open a bundle and take one of its models.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        ConfigError: it is not said which model, or the bundle does not hold it.
        UnsupportedModelError: it is a mixture whose layers have unlike numbers of experts, or a pack of a family that
            is exported as a whole alone.
    """
    if dense == (cluster is not None):
        raise ConfigError("expected --cluster N or --dense, got both or neither; coreinfer-inspect lists clusters")
    bundle = open_bundle(bundle_dir, lazy_packs=True)
    manifest = bundle.manifest
    if cluster is not None and not 0 <= cluster < len(manifest.clusters):
        raise ConfigError(f"--cluster: expected 0 to {len(manifest.clusters) - 1}, got {cluster}")
    if cluster is not None and family_by_name(manifest.model.family).cutoff is not None:
        # Others take the mean and the deviation of the gates that a narrow FFN has: other neurons would be zero.
        raise UnsupportedModelError(
            f"{bundle_dir}: packs of the family {manifest.model.family} are not exported: how much is taken off the "
            "gates of a narrow FFN would be another number there; give --dense"
        )
    if manifest.model.experts is not None:
        return _choose_mixture(bundle, cluster)
    if cluster is None:
        widths = (manifest.model.ffn_dim,) * manifest.model.num_layers
        return ChosenModel(bundle=bundle, ffn=_dense_ffn(bundle), widths=widths, cluster=None)
    if manifest.clusters[cluster].file is None:
        raise ConfigError(f"--cluster {cluster}: it is thin, and its weights are the dense FFN's; give --dense")
    widths = manifest.clusters[cluster].layer_budgets
    return ChosenModel(bundle=bundle, ffn=bundle.pack(cluster), widths=widths, cluster=cluster)


def _dense_ffn(bundle: Bundle) -> TensorFile:
    if bundle.dense is None:
        raise ConfigError(f"--dense: {bundle.path} lacks the dense FFN; compile it with --dense, or give --cluster")
    return bundle.dense


def _choose_mixture(bundle: Bundle, cluster: int | None) -> ChosenModel:
    manifest = bundle.manifest
    experts = kept_experts(None if cluster is None else bundle.pack(cluster), manifest)
    if cluster is not None and manifest.narrows_experts:
        ffn, budgets = bundle.pack(cluster), manifest.clusters[cluster].layer_budgets
        widths = [budget // len(numbers) for budget, numbers in zip(budgets, experts, strict=True)]
    else:
        ffn, widths = _dense_ffn(bundle), [manifest.model.expert_neurons] * len(experts)
    counts = sorted({len(layer) for layer in experts})
    if len(counts) > 1:
        # No row of a router makes an expert that is never chosen, so that layers cannot be filled up.
        other = "--experts narrow" if manifest.lists_experts else "--budgets uniform"
        raise UnsupportedModelError(
            f"--cluster {cluster}: its layers have {counts[0]} to {counts[-1]} experts, and an exported model has as "
            f"many in each layer; compile with {other}, or give --dense"
        )
    numbers = tuple(map(tuple, experts))
    return ChosenModel(bundle=bundle, ffn=ffn, widths=tuple(widths), cluster=cluster, experts=numbers)
