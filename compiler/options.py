"""The options of a compile, as they are given."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from coreinfer.bundles.manifest import ExpertPacks
from coreinfer.bundles.shared.checks import between, not_empty, number, share, whole_number
from coreinfer.bundles.shared.option_fields import option
from coreinfer.bundles.statistics import Selection

from .efforts import Budgets, Effort, Removal, Ridge

__all__ = [
    "BUILTIN",
    "DEFAULT_MAX_KL",
    "GROUPS",
    "MACHINE",
    "TRIED_KEEPS",
    "Budgets",
    "CompileOptions",
    "DType",
    "Format",
    "HealOptimizer",
    "Packs",
    "Removal",
]

Packs = Literal["own", "thin", "auto"]
HealOptimizer = Literal["adamw", "muon"]
DType = Literal["auto", "float32", "bfloat16"]
Format = Literal["int4", "int8", "bf16"]
BUILTIN = "builtin"
MAIN, TEXT, SIZE = "Most used", "Model and text", "Size and quality"
METHOD, HEALING, MACHINE = "Method", "Healing", "Machine"
GROUPS = (MAIN, TEXT, SIZE, METHOD, HEALING, MACHINE)
"""Headings of the command's help; the first has the ten options that most compiles need."""
DEFAULT_MAX_KL = 0.1
"""What packs may lose, in nats per token, where nothing is said of their size or quality."""
TRIED_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Keep ratios that `--packs auto` tries of each cluster, until its bytes rise or its quality is lost."""
# FAISS takes seed + 1 as a C int.
_MAX_SEED = 2**31 - 2
_BY_EFFORT = "by --effort"


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Options of one compile, as the user gives them. `quality.sizes` and `quality.search` derive the rest.

    Each option is stated only here: `coreinfer-compile` and docs/cli.md are made from these fields. Their order is
    that of the options in the manifest. Where the default is None, `effective_...` of `CompileConfig` says what it
    stands for.
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
    keep: float | None = field(
        default=None,
        metadata=option(
            "Kept neurons / all neurons, in (0, 1].", group=MAIN, check=share(), unset="what --max-kl 0.1 needs"
        ),
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
    experts: ExpertPacks = field(
        default="whole",
        metadata=option(
            "What a mixture of experts keeps: whole: some experts, which saves memory; narrow: all, with fewer neurons "
            "each, so that a token reads less; both: some, with fewer neurons each, as many as lose least.",
            group=SIZE,
        ),
    )
    max_kl: float | None = field(
        default=None,
        metadata=option(
            "Instead of --keep: maximum KL per cluster on held-out text, in nats per token, of packs as "
            "stored, before healing; each cluster gets the lowest keep ratio that meets it, or with --token-share auto "
            "the smallest share.",
            group=MAIN,
            check=number(above=0),
            unset="0.1, unless --keep, --budget-mb or --min-top1 is given",
        ),
    )
    effort: Effort = field(
        default="normal",
        metadata=option(
            "quick: scores, one ridge, no controls, a fraction of the time; normal: neurons go by what the others can "
            "make up for, layer after layer, and two controls are measured; best: wider searches, and healing. Costs "
            "and gains are in docs/method.md.",
            group=MAIN,
        ),
    )
    min_top1: float | None = field(
        default=None,
        metadata=option(
            "Instead of --keep, or for --token-share auto: minimum top-1 agreement per cluster on held-out text, as a "
            "share of its tokens.",
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
            "Text to calibrate on: builtin, a .jsonl, .parquet or text file, a folder or pattern of them, also at an "
            "address such as s3://BUCKET/FOLDER, or hf:NAME[:split[:field]]; repeatable.",
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
            unset="0.3 for output-aware (auto with --effort best), else 1",
        ),
    )
    budgets: Budgets | None = field(
        default=None,
        metadata=option(
            "How layers share the neurons: one keep ratio for all (uniform), more for layers whose FFN contributes "
            "more (energy), or more for layers where errors cost more KL (sensitivity).",
            group=METHOD,
            unset=_BY_EFFORT,
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
            unset="second-order for output-aware with a repair, unless --effort is quick; else top-k",
        ),
    )
    reconstruct: bool = field(
        default=True, metadata=option("Repair the down projections by ridge least squares.", group=METHOD)
    )
    carry: bool | None = field(
        default=None,
        metadata=option(
            "Repair each layer on the output of the narrowed layers before it.", group=METHOD, unset=_BY_EFFORT
        ),
    )
    repair_rounding: bool = field(
        default=False,
        metadata=option(
            "With --carry: repair each layer on the output of rounded weights, so that later layers compensate "
            "rounding.",
            group=METHOD,
        ),
    )
    ridge: Ridge | None = field(
        default=None,
        metadata=option(
            "Ridge of the repair, relative to the mean diagonal of the Gram matrix; auto chooses it for each layer on "
            "validation text.",
            group=METHOD,
            check=number(above=0),
            unset=_BY_EFFORT,
        ),
    )
    heal_steps: int | None = field(
        default=None,
        metadata=option(
            "Number of steps, of 2,048 tokens each, that distil the dense model into what all packs share, with "
            "--token-share as tokens read it at their share; on text beyond the calibration tokens, if there is any.",
            group=HEALING,
            check=whole_number(0),
            unset="60 with --effort best, else none",
        ),
    )
    heal_cluster_steps: int = field(
        default=0,
        metadata=option("Further steps for each cluster's own weights.", group=HEALING, check=whole_number(0)),
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
        metadata=option("Format of embedding and head.", group=SIZE, unset="int8, bf16 with --quantize bf16"),
    )
    by_neuron: bool = field(
        default=False,
        metadata=option(
            "Store the FFN of a relu model, and layers of one that cuts gates off (Gemma 3n), neuron by neuron, in "
            "int4: what is zero is not read.",
            group=SIZE,
        ),
    )
    packs: Packs = field(
        default="own",
        metadata=option(
            "What a cluster has: own FFN weights, narrowed for it, or with --token-share nothing but its share and "
            "thresholds (thin): it decodes with the dense FFN, and any number of clusters takes next to no space; "
            "or of each cluster what reads the fewest bytes a token at --max-kl and --min-top1, at its share (auto).",
            group=SIZE,
        ),
    )
    token_share: float | Literal["auto"] | None = field(
        default=None,
        metadata=option(
            "Let each decoded token leave out the inputs that matter least to it: mean share of the layers' weights "
            "that it reads, where a generation does not say (docs/token_shares.md); auto: for each cluster the "
            "smallest with which --max-kl and --min-top1 hold.",
            group=SIZE,
            check=between(0.3, 1),
            unset="a token reads all",
        ),
    )
    half_inputs: bool | None = field(
        default=None,
        metadata=option(
            "With --token-share: of inputs that matter more than those that are left out, and still little, read the "
            "two high bits of each weight alone. Only int4 weights have halves, and none of experts.",
            group=SIZE,
            unset="on",
        ),
    )
    dense: bool = field(default=True, metadata=option("Put the dense FFN into the bundle.", group=SIZE))
    evaluate: bool = field(default=True, metadata=option("Measure quality on held-out text.", group=SIZE))
    controls: bool | None = field(
        default=None,
        metadata=option(
            "Also compile and measure two controls of the same bytes, one static mask and random clusters; they are "
            "not put into the bundle, and double the time.",
            group=SIZE,
            unset=_BY_EFFORT,
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
        metadata=option("Number of CPU threads.", group=MACHINE, check=whole_number(1), unset="all cores"),
    )
    ray: str | None = field(
        default=None,
        compare=False,
        metadata=option(
            "Address of a Ray cluster whose workers compile together, or local to start Ray on this machine; see "
            "docs/ray.md.",
            group=MACHINE,
            check=not_empty(str, "an address, or local"),
            unset="this process compiles alone",
            metavar="ADDRESS",
        ),
    )
    workers: int | None = field(
        default=None,
        metadata=option(
            "With --ray: number of workers among which text and clusters are divided, of --threads CPU threads each.",
            group=MACHINE,
            check=whole_number(1),
            unset="none",
        ),
    )
    device: str = field(default="cpu", metadata=option("torch device that runs the model.", group=MACHINE))
    dtype: DType = field(
        default="auto",
        metadata=option(
            "Arithmetic of the forward passes; auto is bfloat16 where the device multiplies it faster.", group=MACHINE
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
            "compile copies; or an address such as s3://BUCKET/FOLDER, which shares stage results with other machines.",
            group=MACHINE,
            unset="COREINFER_CACHE, else coreinfer in the cache folder",
            switches=("--cache",),
        ),
    )
