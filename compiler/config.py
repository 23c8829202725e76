"""What a compile is asked to do."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from coreinfer.bundles.errors import ConfigError, join_problems
from coreinfer.bundles.statistics import SELECTIONS, Selection

__all__ = ["BUILTIN", "Budgets", "CompileConfig", "DType", "Format", "HealOptimizer", "Removal"]

Budgets = Literal["uniform", "energy", "sensitivity"]
Removal = Literal["second-order", "top-k"]
HealOptimizer = Literal["adamw", "muon"]
DType = Literal["auto", "float32", "bfloat16"]
Format = Literal["int4", "int8", "bf16"]
BUILTIN = "builtin"
# FAISS takes seed + 1 as a C int.
_MAX_SEED = 2**31 - 2


_MOMENT_BYTES = 4 << 30
MOMENT_SHARE = 1 / 8
"""Of `max_memory`, for the moments of all clusters."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Options of one compile; the command has an option of the same name for each.

    Attributes:
        model: Hub id, local folder, path of a `.gguf` file, or `package:NAME/PATH`.
        output: folder to write the bundle to.
        clusters: how many clusters, or "auto" for the fewest whose held-out KL is within 2% of the best tried.
        keep: kept neurons / all neurons, in (0, 1].
        budget_mb: megabytes of weights that one decoded token may read, head included; takes the place of `keep`.
        max_kl: greatest KL, in nats a token on held-out text, of packs as they are stored, before healing; each
            cluster's lowest keep ratio that holds it takes the place of `keep`.
        min_top1: least share of held-out tokens on which packs and dense model agree; like `max_kl`.
        encoder: sentence encoder that clusters, in the forms of `model`; None for all-MiniLM-L6-v2.
        calibration: "builtin", paths of JSON Lines, text or Parquet files, or `hf:NAME[:split[:field]]`.
        text_field: field that holds the text in JSON Lines and Parquet.
        calibration_tokens: how many tokens of calibration text to use at most.
        document_tokens: longer texts are cut into documents of so many tokens.
        selection: how neurons are scored.
        alpha, beta: shares of the paper's statistic; only for selection "coreinfer".
        cluster_weight: weight of the cluster's moments against all text's; None for 0.3 with "output-aware" and 1,
            the papers' own, otherwise. "auto" chooses the repair's for each layer on text that is not calibrated on,
            and leaves the scores theirs.
        budgets: one keep ratio for all layers, or more for layers whose FFN contributes more ("energy"), or for
            layers where errors cost more KL ("sensitivity").
        min_layer_keep: least keep ratio of a layer with budgets other than "uniform".
        removal: keep the highest scores ("top-k"), or take out what costs least after the repair ("second-order");
            None for the latter with "output-aware" scores and a repair, else the former.
        reconstruct: repair the down projection by ridge least squares.
        carry: repair each layer on what the narrowed layers before it hand on.
        repair_rounding: with `carry`, hand on what rounded weights compute, so that the layers behind make up for it.
        ridge: relative to the mean diagonal of the Gram matrix; "auto" chooses it for each layer on text that is
            not calibrated on.
        heal_steps: steps of distilling the dense model into what all narrow ones share, of 2,048 tokens each.
        heal_cluster_steps: steps of each cluster's own after that.
        heal_rate: greatest learning rate of these steps, relative to each matrix's root mean square.
        heal_optimizer: that takes them; "muon" computes in bfloat16, which not every CPU does fast.
        quantize: format of FFN and attention weights.
        head_quantize: format of token embedding and head; None for int8 where `quantize` is an integer format.
        dense: put the dense FFN into the bundle.
        evaluate: measure quality on held-out text.
        controls: compile and measure one static mask and random clusters beside it, at the same bytes; they take most
            of the time that a compile takes, and are not shipped.
        report_sentences: calibration sentences on the map of report.html, with their text; None for 400, with the text
            of builtin ones only.
        seed: of sampling, splitting and clustering.
        threads: of torch and FAISS; None for all cores.
        device: torch device.
        dtype: of the compiler's own forward passes; "auto" is bfloat16 where the device computes it fast.
        force: replace an existing bundle.
        max_memory: gigabytes of memory to get by with, mapped files left out: weights stay in their file, which must be
            safetensors, and are read a layer at a time; None to load the model.
        cache_dir: where results of finished stages are kept; None keeps none.
    """

    model: str
    output: Path
    clusters: int | Literal["auto"] = 32
    keep: float = 0.7
    budget_mb: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    encoder: str | None = None
    calibration: tuple[str, ...] = (BUILTIN,)
    text_field: str = "text"
    calibration_tokens: int = 100_000
    document_tokens: int = 256
    selection: Selection = "output-aware"
    alpha: float = 0.4
    beta: float = 0.4
    cluster_weight: float | Literal["auto"] | None = None
    budgets: Budgets = "sensitivity"
    min_layer_keep: float = 0.15
    removal: Removal | None = None
    reconstruct: bool = True
    carry: bool = True
    repair_rounding: bool = False
    ridge: float | Literal["auto"] = "auto"
    heal_steps: int = 0
    heal_cluster_steps: int = 0
    heal_rate: float = 2e-3
    heal_optimizer: HealOptimizer = "adamw"
    quantize: Format = "int4"
    head_quantize: Format | None = None
    dense: bool = True
    evaluate: bool = True
    controls: bool = True
    report_sentences: int | None = None
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    dtype: DType = "auto"
    force: bool = False
    max_memory: float | None = field(default=None, compare=False)
    cache_dir: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ConfigError: naming all options that are wrong.
        """
        if problems := [problem for problem in _problems(self) if problem]:
            raise ConfigError(join_problems(problems))

    @property
    def effective_cluster_weight(self) -> float:
        """The cluster weight of the scores, with its default filled in."""
        if self.cluster_weight is not None and self.cluster_weight != "auto":
            return self.cluster_weight
        return 0.3 if self.selection == "output-aware" else 1.0

    @property
    def effective_removal(self) -> Removal:
        """The removal with its default filled in: other statistics are kept as their papers have them."""
        if self.removal is not None:
            return self.removal
        return "second-order" if self.selection == "output-aware" and self.reconstruct else "top-k"

    @property
    def moment_bytes(self) -> int:
        """Moments of all clusters are held in memory up to this size, and summed twice beyond it."""
        return (
            _MOMENT_BYTES if self.max_memory is None else min(_MOMENT_BYTES, int(self.max_memory * 1e9 * MOMENT_SHARE))
        )

    @property
    def repairs_rounding(self) -> bool:
        """Whether there is rounding to make up for, and a way."""
        return self.repair_rounding and self.reconstruct and self.carry and self.quantize != "bf16"

    @property
    def heals(self) -> bool:
        """Whether packs are healed at all."""
        return bool(self.heal_steps or self.heal_cluster_steps)

    @property
    def effective_head_quantize(self) -> Format:
        """The head's format with its default filled in: each of its errors goes straight into the logits."""
        return self.head_quantize or ("bf16" if self.quantize == "bf16" else "int8")


def _problems(config: CompileConfig) -> list[str | None]:
    return [
        None if config.model else "--model: expected a model, got nothing",
        None if config.calibration else "--calibration: expected at least one source, got none",
        _clusters(config.clusters),
        _share("--keep", config.keep, zero=False),
        None if config.budget_mb is None else _positive("--budget-mb", config.budget_mb),
        None if config.max_kl is None else _positive("--max-kl", config.max_kl),
        None if config.min_top1 is None else _share("--min-top1", config.min_top1, zero=False),
        _one_aim(config),
        _share("--alpha", config.alpha, zero=False),
        _share("--beta", config.beta, zero=False),
        _cluster_weight(config),
        _share("--min-layer-keep", config.min_layer_keep, zero=True),
        _one_of("--selection", config.selection, SELECTIONS),
        _one_of("--budgets", config.budgets, get_args(Budgets)),
        _one_of("--removal", config.effective_removal, get_args(Removal)),
        _removal(config),
        _one_of("--quantize", config.quantize, get_args(Format)),
        _one_of("--head-quantize", config.effective_head_quantize, get_args(Format)),
        _one_of("--dtype", config.dtype, get_args(DType)),
        _ridge(config.ridge),
        _at_least("--heal-steps", config.heal_steps, 0),
        _at_least("--heal-cluster-steps", config.heal_cluster_steps, 0),
        _positive("--heal-rate", config.heal_rate),
        _one_of("--heal-optimizer", config.heal_optimizer, get_args(HealOptimizer)),
        _at_least("--calibration-tokens", config.calibration_tokens, 1),
        _at_least("--document-tokens", config.document_tokens, 16),
        None if config.report_sentences is None else _at_least("--report-sentences", config.report_sentences, 0),
        None if 0 <= config.seed <= _MAX_SEED else f"--seed: expected 0 to {_MAX_SEED}, got {config.seed!r}",
        None if config.max_memory is None else _positive("--max-memory", config.max_memory),
        _mapped(config),
        None if config.threads is None else _at_least("--threads", config.threads, 1),
    ]


def _mapped(config: CompileConfig) -> str | None:
    if config.max_memory is None:
        return None
    if config.heals:
        return "--max-memory: healing trains all layers at once; leave out --heal-steps and --heal-cluster-steps"
    if config.device != "cpu":
        return f"--max-memory: expected --device cpu, where weights can stay in their file, got {config.device}"
    return None


def _clusters(value: object) -> str | None:
    if value == "auto" or (isinstance(value, int) and value >= 1):
        return None
    return f"--clusters: expected a whole number of at least 1 or auto, got {value!r}"


def _share(name: str, value: float, *, zero: bool) -> str | None:
    if math.isfinite(value) and (0 < value <= 1 or (zero and value == 0)):
        return None
    return f"{name}: expected a number in {'[' if zero else '('}0, 1], got {value!r}"


def _cluster_weight(config: CompileConfig) -> str | None:
    if config.cluster_weight == "auto" and not config.reconstruct:
        return "--cluster-weight auto: expected --reconstruct, whose weight it chooses, got --no-reconstruct"
    weight = config.effective_cluster_weight
    if isinstance(weight, (int, float)) and 0 <= weight <= 1:
        return None
    return f"--cluster-weight: expected auto or a number in [0, 1], got {weight!r}"


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str | None:
    return None if value in allowed else f"{name}: expected {', '.join(allowed)}, got {value!r}"


def _removal(config: CompileConfig) -> str | None:
    if config.removal == "second-order" and not config.reconstruct:
        return "--removal second-order: expected --reconstruct, which it counts on, got --no-reconstruct"
    return None


def _one_aim(config: CompileConfig) -> str | None:
    if config.budget_mb is not None and (config.max_kl is not None or config.min_top1 is not None):
        return "--budget-mb and --max-kl or --min-top1: expected bytes or a quality to aim at, got both"
    if config.keep == 1 and (config.max_kl is not None or config.min_top1 is not None):
        return "--max-kl, --min-top1: expected a keep ratio below 1 to begin with, got 1"
    return None


def _ridge(value: float | str) -> str | None:
    if value == "auto" or (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        return None
    return f"--ridge: expected auto or a number above 0, got {value!r}"


def _positive(name: str, value: float) -> str | None:
    return None if math.isfinite(value) and value > 0 else f"{name}: expected a number above 0, got {value!r}"


def _at_least(name: str, value: int, least: int) -> str | None:
    return None if value >= least else f"{name}: expected at least {least}, got {value!r}"
