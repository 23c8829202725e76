"""What the options of a compile mean for a mixture of experts, whose packs have some experts, or narrower ones."""

from collections.abc import Iterator
from dataclasses import replace

from coreinfer.bundles.errors import ConfigError, join_problems

from .config import CompileConfig

__all__ = ["check_expert_options", "check_no_expert_options", "with_expert_options"]


def check_expert_options(config: CompileConfig, name: str) -> None:
    """Refuse options that do not apply to a mixture of experts.

    Args:
        name: of the model in an error.
    Raises:
        ConfigError: some were given; all are named.
    """
    if wrong := [*_not_applying(config)]:
        raise ConfigError(
            f"--model {name} is a mixture of experts, for which some options do not apply: {join_problems(wrong)}; "
            "leave these out"
        )


def check_no_expert_options(config: CompileConfig, name: str) -> None:
    """Refuse options that are for mixtures of experts alone.

    Args:
        name: of a model that is none, in an error.
    Raises:
        ConfigError: they were given.
    """
    if config.experts != "whole":
        raise ConfigError(
            f"--experts {config.experts}: expected a mixture of experts, and --model {name} is none; leave it out, its "
            "FFN is narrowed as it is"
        )


def _not_applying(config: CompileConfig) -> Iterator[str]:
    if config.packs == "auto":
        yield "--packs auto: a token reads as many whole experts with a pack as without; give own or thin"
        return
    if config.experts == "whole":
        yield from _not_of_whole_experts(config)
    if config.max_memory is not None:
        yield "--max-memory: transformers puts a layer's experts together in memory"
    if config.selection != "output-aware":
        yield f"--selection {config.selection}: experts are kept by what they put out"
    if config.experts == "both" and config.budgets == "energy":
        yield "--budgets energy: layers share by what they lose; expected sensitivity or uniform"
    elif config.experts != "both" and config.budgets == "sensitivity":
        yield "--budgets sensitivity: expected energy or uniform"
    if config.packs == "thin":
        # Whatever says how packs are made is refused with it anyway.
        return
    given = {
        "--carry: experts are repaired on what the dense model sees": bool(config.carry),
        "--repair-rounding: experts are repaired on what the dense model sees": config.repair_rounding,
        "--heal-steps: experts are not healed": bool(config.heal_steps),
        "--heal-cluster-steps: experts are not healed": bool(config.heal_cluster_steps),
    }
    yield from (problem for problem, is_given in given.items() if is_given)


def _not_of_whole_experts(config: CompileConfig) -> Iterator[str]:
    if not config.dense:
        yield "--no-dense: packs name experts of the dense FFN, unless --experts narrow or both is given"
    if config.budget_mb is not None:
        yield "--budget-mb: a token reads as many experts whatever is kept"
    if config.packs == "thin":
        return
    given = {
        "--removal second-order": config.removal == "second-order",
        "--ridge": config.ridge is not None,
        "--cluster-weight auto": config.cluster_weight == "auto",
    }
    yield from (f"{option}: whole experts are not repaired" for option, is_given in given.items() if is_given)


def with_expert_options(config: CompileConfig, num_chosen: int, num_experts: int, name: str) -> CompileConfig:
    """Fill in the options of a compile of a mixture: by scores, without healing; of narrow experts with a repair.

    Args:
        num_chosen, num_experts: of a layer's experts those that a token uses, and all.
        name: of the model in an error.
    Raises:
        ConfigError: options were given that do not apply.
    """
    check_expert_options(config, name)
    if config.packs == "thin":
        return config
    # No layer can do with fewer whole ones.
    least = num_chosen / num_experts if config.experts == "whole" else 0.0
    return replace(
        config,
        budgets=config.budgets or ("sensitivity" if config.experts == "both" else "energy"),
        min_layer_keep=max(config.min_layer_keep, least),
        removal="top-k" if config.experts == "whole" else config.effective_removal,
        reconstruct=config.reconstruct and config.experts != "whole",
        carry=False,
        heal_steps=0,
    )
