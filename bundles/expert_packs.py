"""Packs of a mixture that have some experts, each narrower: what a bundle must say of them, and which they list."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from .versions import needed_version

if TYPE_CHECKING:
    from .manifest import ClusterRecord, ExpertsRecord, Manifest, Plan

__all__ = ["ExpertPacks", "expert_pack_problems", "units_of"]

ExpertPacks = Literal["whole", "narrow", "both"]
"""What the packs of a mixture have: some of its experts, all of them with fewer neurons each, or some with fewer."""


def units_of(manifest: "Manifest", kept: "Plan | ClusterRecord") -> list[str]:
    """Say what each layer keeps: neurons, experts, neurons of each expert, or how many experts of how many neurons."""
    if kept.layer_experts is not None:
        parts = zip(kept.layer_experts, kept.layer_budgets, strict=True)
        return [f"{count}x{budget // count}" for count, budget in parts]
    return [str(budget // manifest.unit_neurons) for budget in kept.layer_budgets]


def expert_pack_problems(manifest: "Manifest") -> list[str]:
    """List what is wrong with the numbers of experts that a manifest's packs have, one line each."""
    parts: dict[str, Plan | ClusterRecord] = {"manifest.plan": manifest.plan}
    parts |= {f"manifest.clusters[{number}]": cluster for number, cluster in enumerate(manifest.clusters)}
    experts = manifest.model.experts
    if experts is None or not manifest.lists_experts:
        return [f"{where}.layer_experts: unknown" for where, part in parts.items() if part.layer_experts is not None]
    version = needed_version(
        is_mixture=True, has_token_shares=False, is_thin=False, has_halves=False, lists_experts=True
    )
    problems = []
    if manifest.schema_version < version:
        # Readers of a lower version would take them for something else.
        problems.append(f"manifest.plan.experts: both needs schema_version {version}")
    if manifest.has_thin:
        problems.append("manifest.plan.experts: both does not go with thin clusters")
    for where, part in parts.items():
        problems += _problems_of(f"{where}.layer_experts", part.layer_experts, part.layer_budgets, manifest, experts)
    return problems


def _problems_of(
    where: str,
    layer_experts: Sequence[int] | None,
    layer_budgets: Sequence[int],
    manifest: "Manifest",
    experts: "ExpertsRecord",
) -> Iterator[str]:
    if layer_experts is None or len(layer_experts) != len(layer_budgets):
        got = "none" if layer_experts is None else str(len(layer_experts))
        yield f"{where}: expected {len(layer_budgets)} layers, got {got}"
        return
    for layer, (count, budget) in enumerate(zip(layer_experts, layer_budgets, strict=True)):
        if not experts.num_chosen <= count <= experts.num_experts:
            yield f"{where}[{layer}]: expected {experts.num_chosen} to {experts.num_experts}, got {count}"
        elif budget % count or not 1 <= budget // count <= manifest.model.expert_neurons:
            yield (
                f"{where}[{layer}]: expected {budget} neurons in {count} equal parts of 1 to "
                f"{manifest.model.expert_neurons}"
            )
