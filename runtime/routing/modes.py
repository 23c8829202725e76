"""Which FFN weights a prompt is decoded with."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from coreinfer.bundles import Bundle, ConfigError, Manifest
from coreinfer.runtime.engines.protocol import DENSE, FfnChoice
from coreinfer.runtime.generation import Fallback, Mode, PromptFfn

from .own_neurons import choose_neurons, mixed_with_cluster, prompt_scores
from .router import Route

__all__ = [
    "ModePlan",
    "check_prompt_ffn",
    "decode_choice",
    "largest_cluster",
    "plan_mode",
    "prompt_choice",
    "serving_cluster",
]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ModePlan:
    """The mode that serves a prompt.

    Attributes:
        mode: never "auto".
        fallback: why mode auto did not use the nearest pack; None if it did.
        cluster: the pack that is used instead of the nearest one; None for the nearest.
    """

    mode: Mode
    fallback: Fallback | None = None
    cluster: int | None = None

    @property
    def uses_pack(self) -> bool:
        """Whether a cluster's pack decodes or drafts, so that another cluster's can take over where the text drifts."""
        return self.mode in ("similarity", "lossless")

    @property
    def needs_statistic(self) -> bool:
        """Whether the prompt's own activations choose neurons."""
        return self.mode in ("stability", "fused")


def plan_mode(
    mode: Mode, manifest: Manifest, route: Route, num_prompt_tokens: int, *, gathers: bool = True
) -> ModePlan:
    """Decide the mode of one prompt.

    "auto" decodes dense where the prompt is unlike the calibration text, or where the router is unsure of it;
    without a dense FFN it uses the largest pack. Otherwise it takes the nearest cluster's pack, except that a long
    prompt chooses its own neurons where packs are not repaired: a repaired pack is better than an unrepaired choice of
    any kind (docs/benchmarks/quality.md), an unrepaired one is not.

    Args:
        gathers: whether the engine can run with a prompt's own neurons.
    Raises:
        ConfigError: the mode needs the dense FFN, which the bundle lacks, or neurons that cannot be gathered.
    """
    if mode == "auto":
        return _automatic(manifest, route, num_prompt_tokens, gathers=gathers)
    if mode != "similarity" and not manifest.has_dense:
        raise ConfigError(f"mode {mode!r} needs the dense FFN, which this bundle lacks; compile it with --dense")
    plan = ModePlan(mode=mode)
    if plan.needs_statistic and manifest.has_thin:
        which = "some clusters" if manifest.pack_files else "the clusters"
        raise ConfigError(
            f"mode {mode!r} chooses as many neurons as packs have, and {which} of this bundle are thin; use mode "
            "similarity, dense, lossless or auto"
        )
    if plan.needs_statistic and not gathers:
        raise ConfigError(f"mode {mode!r} gathers from the whole dense FFN, which memory_mb keeps out of memory")
    return plan


def _automatic(manifest: Manifest, route: Route, num_prompt_tokens: int, *, gathers: bool) -> ModePlan:
    fallback: Fallback | None = "unfamiliar" if not route.familiar else None if route.sure else "unsure"
    if fallback and manifest.has_dense:
        return ModePlan(mode="dense", fallback=fallback)
    if fallback:
        return ModePlan(mode="similarity", fallback=fallback, cluster=largest_cluster(manifest))
    long = num_prompt_tokens >= manifest.plan.stability_min_tokens
    packs_unrepaired = not manifest.plan.reconstruct and not manifest.has_thin and manifest.model.experts is None
    if gathers and manifest.has_dense and packs_unrepaired and long:
        return ModePlan(mode="stability")
    return ModePlan(mode="similarity")


def check_prompt_ffn(mode: Mode, prompt_ffn: PromptFfn, manifest: Manifest) -> None:
    """Refuse to read prompts with a pack where a mode needs what the dense FFN makes of them, or there is no pack.

    Raises:
        ConfigError: it does.
    """
    if prompt_ffn == "pack" and mode not in ("auto", "similarity"):
        raise ConfigError(
            f"prompt_ffn: expected dense in mode {mode!r}, got 'pack'; use mode similarity or auto, or leave it out"
        )
    if prompt_ffn == "pack" and manifest.has_thin:
        whose = "of which some clusters" if manifest.pack_files else "whose clusters"
        raise ConfigError(
            f"prompt_ffn: expected dense with this bundle, {whose} are thin and have no packs, got 'pack'; leave it out"
        )


def prompt_choice(plan: ModePlan, cluster: int, prompt_ffn: PromptFfn, *, has_dense: bool) -> FfnChoice:
    """Choose the FFN weights that read a prompt.

    Args:
        cluster: whose pack decodes.
    """
    by_pack = not has_dense or (prompt_ffn == "pack" and plan.mode == "similarity")
    return FfnChoice(cluster=cluster) if by_pack else DENSE


def largest_cluster(manifest: Manifest) -> int:
    """Find the cluster for prompts that belong to none: the widest pack; of equals, the one with the most text."""

    def size(cluster: int) -> tuple[int, int]:
        record = manifest.clusters[cluster]
        return sum(record.layer_budgets), record.num_tokens

    return max(range(len(manifest.clusters)), key=size)


def serving_cluster(plan: ModePlan, route: Route) -> int:
    """Return the cluster whose pack a prompt uses."""
    return route.cluster if plan.cluster is None else plan.cluster


def decode_choice(
    plan: ModePlan, route: Route, bundle: Bundle, statistic: Floats | None, num_prompt_tokens: int
) -> FfnChoice:
    """Choose the FFN weights for decoding, in mode lossless those that draft.

    Args:
        statistic: (layers, ffn_dim) sums over the prompt, for the modes that need them.
    """
    if plan.mode == "dense":
        return DENSE
    if plan.uses_pack or statistic is None:
        return FfnChoice(cluster=serving_cluster(plan, route))
    manifest = bundle.manifest
    scores = prompt_scores(bundle, manifest.plan.selection, statistic, num_prompt_tokens)
    if plan.mode == "fused":
        scores = mixed_with_cluster(bundle, scores, route.cluster, num_prompt_tokens)
    return FfnChoice(neuron_ids=choose_neurons(manifest, scores, manifest.plan.layer_budgets))
