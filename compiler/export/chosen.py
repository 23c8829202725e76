"""Which of a bundle's models is exported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreinfer.bundles import Bundle, ConfigError, UnsupportedModelError, open_bundle
from coreinfer.bundles.families import Family, family_by_name
from coreinfer.bundles.tensors import TensorFile

__all__ = ["ChosenModel", "choose_model"]


@dataclass(frozen=True, kw_only=True)
class ChosenModel:
    """One of the models that a bundle holds.

    Attributes:
        ffn: the dense FFN or a cluster pack.
        widths: neurons of each layer.
        cluster: whose pack it is; None for the dense model.
    """

    bundle: Bundle
    ffn: TensorFile
    widths: tuple[int, ...]
    cluster: int | None

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
        UnsupportedModelError: its FFN is a mixture of experts.
    """
    if dense == (cluster is not None):
        raise ConfigError("expected --cluster N or --dense, got both or neither; coreinfer-inspect lists clusters")
    bundle = open_bundle(bundle_dir, lazy_packs=True)
    manifest = bundle.manifest
    if manifest.model.experts is not None:
        raise UnsupportedModelError(f"{bundle_dir}: models of family {manifest.model.family} are not exported yet")
    if cluster is None:
        if bundle.dense is None:
            raise ConfigError(f"--dense: {bundle_dir} lacks the dense FFN; compile it with --dense, or give --cluster")
        widths = (manifest.model.ffn_dim,) * manifest.model.num_layers
        return ChosenModel(bundle=bundle, ffn=bundle.dense, widths=widths, cluster=None)
    if not 0 <= cluster < len(manifest.clusters):
        raise ConfigError(f"--cluster: expected 0 to {len(manifest.clusters) - 1}, got {cluster}")
    if manifest.clusters[cluster].file is None:
        raise ConfigError(f"--cluster {cluster}: it is thin, and its weights are the dense FFN's; give --dense")
    widths = manifest.clusters[cluster].layer_budgets
    return ChosenModel(bundle=bundle, ffn=bundle.pack(cluster), widths=widths, cluster=cluster)
