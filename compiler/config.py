"""The options of a compile."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from coreinfer.bundles.shared.checks import not_empty, number, raise_problems, share, whole_number
from coreinfer.bundles.shared.option_fields import field_problems, option
from coreinfer.bundles.statistics import Selection

__all__ = ["BUILTIN", "GROUPS", "MACHINE", "Budgets", "CompileConfig", "DType", "Format", "HealOptimizer", "Removal"]

Budgets = Literal["uniform", "energy", "sensitivity"]
Removal = Literal["second-order", "top-k"]
HealOptimizer = Literal["adamw", "muon"]
DType = Literal["auto", "float32", "bfloat16"]
Format = Literal["int4", "int8", "bf16"]
BUILTIN = "builtin"
MAIN, TEXT, SIZE = "Most used", "Model and text", "Size and quality"
METHOD, HEALING, MACHINE = "Method", "Healing", "Machine"
GROUPS = (MAIN, TEXT, SIZE, METHOD, HEALING, MACHINE)
"""Headings of the command's help; the first has the ten options that most compiles need."""
# FAISS takes seed + 1 as a C int.
_MAX_SEED = 2**31 - 2


_MOMENT_BYTES = 4 << 30
MOMENT_SHARE = 1 / 8
"""Share of `max_memory` for the moments of all clusters."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Options of one compile, as the user gives them. `quality.sizes` and `quality.search` derive the rest.

    Each option is stated only here: `coreinfer-compile` and docs/cli.md are made from these fields. Their order is
    that of the options in the manifest.
    """

    model: str = field(
        metadata=option(
            "Model: Hub id, local folder, .gguf file, or package:NAME/PATH for a file of a Python package.",
            group=MAIN,
            check=not_empty(str, "a model"),
        )
    )
    output: Path = field(metadata=option("Folder to write the bundle to.", group=MAIN, switches=("-o", "--output")))
    clusters: int | Literal["auto"] = field(
        default=32,
        metadata=option(
            "Number of clusters; auto: the fewest whose KL on held-out text is within 2% of the best tried.",
            group=MAIN,
            check=whole_number(1),
        ),
    )
    keep: float = field(
        default=0.7, metadata=option("Kept neurons / all neurons, in (0, 1].", group=MAIN, check=share())
    )
    budget_mb: float | None = field(
        default=None,
        metadata=option(
            "Instead of --keep: maximum megabytes of weights that one decoded token reads, head included.",
            group=MAIN,
            check=number(above=0),
            unset="none",
            metavar="MB",
        ),
    )
    max_kl: float | None = field(
        default=None,
        metadata=option(
            "Instead of --keep: maximum KL per cluster on held-out text, in nats per token, of packs as "
            "stored, before healing; each cluster gets the lowest keep ratio that meets it.",
            group=MAIN,
            check=number(above=0),
            unset="none",
        ),
    )
    min_top1: float | None = field(
        default=None,
        metadata=option(
            "Instead of --keep: minimum top-1 agreement per cluster on held-out text, as a share of its tokens.",
            group=SIZE,
            check=share(),
            unset="none",
        ),
    )
    encoder: str | None = field(
        default=None,
        metadata=option(
            "Sentence encoder used for clustering, in the forms of --model.",
            group=TEXT,
            check=not_empty(str, "an encoder"),
            unset="all-MiniLM-L6-v2",
        ),
    )
    calibration: tuple[str, ...] = field(
        default=(BUILTIN,),
        metadata=option(
            "Text to calibrate on: builtin, a .jsonl, .parquet or text file, a folder of them, or "
            "hf:NAME[:split[:field]]; repeatable.",
            group=MAIN,
            check=not_empty(tuple, "at least one source"),
        ),
    )
    text_field: str = field(
        default="text", metadata=option("Field that holds the text in JSON Lines and Parquet.", group=TEXT)
    )
    calibration_tokens: int = field(
        default=100_000,
        metadata=option("Maximum number of tokens to calibrate on.", group=TEXT, check=whole_number(1)),
    )
    document_tokens: int = field(
        default=256,
        metadata=option("Cut longer texts into pieces of this many tokens.", group=TEXT, check=whole_number(16)),
    )
    selection: Selection = field(default="output-aware", metadata=option("How neurons are scored.", group=METHOD))
    alpha: float = field(
        default=0.4,
        metadata=option(
            "With --selection coreinfer: share of a token's positive activations that are core.",
            group=METHOD,
            check=share(),
        ),
    )
    beta: float = field(
        default=0.4,
        metadata=option(
            "With --selection coreinfer: share of neurons that are core for a sentence.", group=METHOD, check=share()
        ),
    )
    cluster_weight: float | Literal["auto"] | None = field(
        default=None,
        metadata=option(
            "Weight of a cluster's own moments, from 0 to 1; the rest is that of all text. auto chooses the weight for "
            "the repair in each layer on validation text, and keeps the default for the scores.",
            group=METHOD,
            check=share(zero=True),
            unset="0.3 for output-aware, else 1",
        ),
    )
    budgets: Budgets = field(
        default="sensitivity",
        metadata=option(
            "How layers share the neurons: one keep ratio for all (uniform), more for layers whose FFN contributes "
            "more (energy), or more for layers where errors cost more KL (sensitivity).",
            group=METHOD,
        ),
    )
    min_layer_keep: float = field(
        default=0.15,
        metadata=option(
            "Minimum keep ratio of a layer, unless --budgets is uniform.", group=METHOD, check=share(zero=True)
        ),
    )
    removal: Removal | None = field(
        default=None,
        metadata=option(
            "Which neurons are removed: those with the lowest scores (top-k), or those that cost least once the "
            "others are repaired (second-order).",
            group=METHOD,
            unset="second-order for output-aware with a repair, else top-k",
        ),
    )
    reconstruct: bool = field(
        default=True, metadata=option("Repair the down projections by ridge least squares.", group=METHOD)
    )
    carry: bool = field(
        default=True,
        metadata=option("Repair each layer on the output of the narrowed layers before it.", group=METHOD),
    )
    repair_rounding: bool = field(
        default=False,
        metadata=option(
            "With --carry: repair each layer on the output of rounded weights, so that later layers compensate "
            "rounding.",
            group=METHOD,
        ),
    )
    ridge: float | Literal["auto"] = field(
        default="auto",
        metadata=option(
            "Ridge of the repair, relative to the mean diagonal of the Gram matrix; auto chooses it for each layer on "
            "validation text.",
            group=METHOD,
            check=number(above=0),
        ),
    )
    heal_steps: int = field(
        default=0,
        metadata=option(
            "Number of steps, of 2,048 tokens each, that distil the dense model into what all packs share; on text "
            "beyond the calibration tokens, if there is any.",
            group=HEALING,
            check=whole_number(0),
        ),
    )
    heal_cluster_steps: int = field(
        default=0,
        metadata=option(
            "Number of further steps for each cluster's own weights.", group=HEALING, check=whole_number(0)
        ),
    )
    heal_rate: float = field(
        default=2e-3,
        metadata=option(
            "Maximum learning rate of these steps, relative to each matrix's root mean square.",
            group=HEALING,
            check=number(above=0),
        ),
    )
    heal_optimizer: HealOptimizer = field(
        default="adamw",
        metadata=option(
            "Optimizer of these steps; muon computes in bfloat16, which is slow on some CPUs.", group=HEALING
        ),
    )
    quantize: Format = field(default="int4", metadata=option("Format of the FFN and attention weights.", group=MAIN))
    head_quantize: Format | None = field(
        default=None,
        metadata=option(
            "Format of the token embedding and the head.", group=SIZE, unset="int8, bf16 with --quantize bf16"
        ),
    )
    dense: bool = field(default=True, metadata=option("Put the dense FFN into the bundle.", group=SIZE))
    evaluate: bool = field(default=True, metadata=option("Measure quality on held-out text.", group=SIZE))
    controls: bool = field(
        default=True,
        metadata=option(
            "Also compile and measure two controls of the same bytes, one static mask and random clusters; they are "
            "not put into the bundle, and double the time.",
            group=SIZE,
        ),
    )
    report_sentences: int | None = field(
        default=None,
        metadata=option(
            "Number of calibration sentences that report.html shows on its map, with their text.",
            group=SIZE,
            check=whole_number(0),
            unset="400, with text only from builtin",
        ),
    )
    seed: int = field(
        default=0,
        metadata=option("Seed of sampling, splitting and clustering.", group=METHOD, check=whole_number(0, _MAX_SEED)),
    )
    threads: int | None = field(
        default=None,
        metadata=option("Number of CPU threads.", group=MAIN, check=whole_number(1), unset="all cores"),
    )
    device: str = field(default="cpu", metadata=option("torch device that runs the model.", group=MACHINE))
    dtype: DType = field(
        default="auto",
        metadata=option(
            "Arithmetic of the forward passes; auto is bfloat16 where the device computes it fast.", group=MACHINE
        ),
    )
    force: bool = field(
        default=False,
        metadata=option("Replace an existing bundle, once the new one is complete.", group=MAIN, switches=("--force",)),
    )
    max_memory: float | None = field(
        default=None,
        compare=False,
        metadata=option(
            "Maximum gigabytes of memory, mapped files not counted: weights stay in their file, which must be "
            "safetensors, and are read one layer at a time.",
            group=MACHINE,
            check=number(above=0),
            unset="the model is loaded",
            metavar="GB",
        ),
    )
    cache_dir: Path | None = field(
        default=None,
        compare=False,
        metadata=option(
            "Folder of stage results, from which an interrupted compile continues, and of bundles, which the same "
            "compile copies.",
            group=MACHINE,
            unset="COREINFER_CACHE, else coreinfer in the cache folder",
            switches=("--cache",),
        ),
    )

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ConfigError: naming all options that are wrong.
        """
        raise_problems([*field_problems(self)])
        raise_problems(_conflicts(self))

    @property
    def effective_cluster_weight(self) -> float:
        """The cluster weight of the scores, with its default filled in."""
        if self.cluster_weight is not None and self.cluster_weight != "auto":
            return self.cluster_weight
        return 0.3 if self.selection == "output-aware" else 1.0

    @property
    def effective_removal(self) -> Removal:
        """The removal with its default filled in: other selections remove neurons as their papers do."""
        if self.removal is not None:
            return self.removal
        return "second-order" if self.selection == "output-aware" and self.reconstruct else "top-k"

    @property
    def moment_bytes(self) -> int:
        """Maximum bytes of moments of all clusters in memory; larger moments are summed in two passes."""
        return (
            _MOMENT_BYTES if self.max_memory is None else min(_MOMENT_BYTES, int(self.max_memory * 1e9 * MOMENT_SHARE))
        )

    @property
    def repairs_rounding(self) -> bool:
        """Whether the repair also compensates rounding."""
        return self.repair_rounding and self.reconstruct and self.carry and self.quantize != "bf16"

    @property
    def heals(self) -> bool:
        """Whether packs are healed."""
        return bool(self.heal_steps or self.heal_cluster_steps)

    @property
    def effective_head_quantize(self) -> Format:
        """The head's format with its default filled in: its errors change the logits directly, so int8 or bf16."""
        return self.head_quantize or ("bf16" if self.quantize == "bf16" else "int8")


def _conflicts(config: CompileConfig) -> Iterator[str]:
    """Options that are right one by one, and do not go together."""
    has_quality = config.max_kl is not None or config.min_top1 is not None
    if config.budget_mb is not None and has_quality:
        yield "--budget-mb and --max-kl or --min-top1: expected bytes or a quality to aim at, got both"
    if config.budget_mb is None and config.budgets != "uniform" and config.min_layer_keep > config.keep:
        yield f"--min-layer-keep {config.min_layer_keep:g}: expected at most --keep {config.keep:g}; lower one of them"
    if config.keep == 1 and has_quality:
        yield "--max-kl, --min-top1: expected a keep ratio below 1 to begin with, got 1"
    if config.cluster_weight == "auto" and not config.reconstruct:
        yield "--cluster-weight auto: expected --reconstruct, whose weight it chooses, got --no-reconstruct"
    if config.removal == "second-order" and not config.reconstruct:
        yield "--removal second-order: expected --reconstruct, which it counts on, got --no-reconstruct"
    if config.max_memory is not None and config.heals:
        yield "--max-memory: healing trains all layers at once; leave out --heal-steps and --heal-cluster-steps"
    elif config.max_memory is not None and config.device != "cpu":
        yield f"--max-memory: expected --device cpu, where weights can stay in their file, got {config.device}"
