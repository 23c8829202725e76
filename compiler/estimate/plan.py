"""The plan of a compile: seconds and memory of each stage, disk, and the speed of what comes out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.machine import bf16_products_are_faster
from coreinfer.compiler.checks import Inputs
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.expert_options import with_expert_options
from coreinfer.compiler.samples import PROFILE_TOKENS, curve_tokens

from . import work
from .encoder import encoder_size
from .machine import Machine
from .shapes import Shapes, stated_shapes
from .sizes import (
    base_token_bytes,
    bundle_bytes,
    ffn_token_bytes,
    kept_ends,
    scratch_bytes,
    stage_needs,
)
from .speeds import IMPORT_SECONDS, stage_seconds
from .stage_works import samples_tokens, stage_works
from .text import size_text
from .work import Case

__all__ = ["Plan", "StagePlan", "make_plan", "memory_needs", "unplanned"]

_PART_SHARE = 0.1
"""Of the text, for validation, and as much to hold out."""
_FOUND_SHARE = 0.64
"""What a search for KL 0.1 usually ends with (docs/token_shares.md)."""
_DECODE_SHARE = 0.92
"""Of a plain read that decoding reaches, the median of docs/benchmarks.md."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage, in the order in which they run; a stage that runs twice is listed twice.

    Attributes:
        name: that `Progress.stage` is given.
        detail: what there is to do.
        peak_bytes: most resident memory until the stage's end, of one worker where there are several.
    """

    name: str
    detail: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class FewestExperts:
    """The other end of what a compile may take where it finds out how many experts stay: that as few as can be do.

    Attributes:
        num_foreseen: experts of a layer of a pack in the plan's own figures, as many as can stay.
        num_experts: as few as can be, which these figures are of.
        seconds, peak_bytes, bundle_bytes, scratch_bytes, token_bytes_pack, tok_s_pack: as a plan has them.
    """

    num_foreseen: int
    num_experts: int
    seconds: float
    peak_bytes: int
    bundle_bytes: int
    scratch_bytes: int
    token_bytes_pack: int
    tok_s_pack: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a compile will take, if nothing of it is in the cache.

    Attributes:
        machine: what each worker has of it.
        start_seconds: of importing what a compile needs.
        bundle_bytes: of the bundle on disk.
        scratch_bytes: on the disk besides, until the end or in the cache.
        token_bytes_pack, token_bytes_dense: weights that a decoded token reads.
        tok_s_pack, tok_s_dense: to expect on this machine of one generation.
        keep: kept neurons / all neurons.
        token_share: of the layers' weights, that a token reads where the engine gains by it; tok_s count all. Where it
            is to be found, what KL 0.1 usually takes; None where all is read.
        is_thin: whether clusters have no packs, but decode with the dense FFN.
        fewest: where fewer experts may stay than in these figures, what it takes if as few do as can.
    """

    machine: Machine
    num_workers: int
    model_dtype: str
    num_tokens: int
    num_packs: int
    keep: float
    start_seconds: float
    stages: tuple[StagePlan, ...]
    bundle_bytes: int
    scratch_bytes: int
    token_bytes_pack: int
    token_bytes_dense: int
    tok_s_pack: float
    tok_s_dense: float
    token_share: float | None = None
    is_thin: bool = False
    fewest: FewestExperts | None = None

    @property
    def seconds(self) -> float:
        """From the command's start to its end."""
        return self.start_seconds + sum(stage.seconds for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Most resident memory."""
        return max(stage.peak_bytes for stage in self.stages)


def unplanned(config: CompileConfig) -> Iterator[str]:
    """Options whose compile cannot be planned: how long it takes is known only by trying, or was never measured."""
    if config.clusters == "auto":
        yield "--clusters auto"
    if config.heals:
        yield "--heal-steps or --heal-cluster-steps"
    if config.device != "cpu":
        yield f"--device {config.device}"
    if config.max_memory is not None:
        yield "--max-memory"


def make_plan(config: CompileConfig, inputs: Inputs, measure: Callable[[], Machine]) -> Plan:
    """Plan a compile, from shapes, text and this machine's speeds.

    Args:
        measure: measures the machine, once nothing is left to refuse.

    Raises:
        ConfigError: options cannot be planned, or sizes are not stated.
        CoreInferError: the model or the text cannot be read.
    """
    shapes = stated_shapes(inputs.model)
    if shapes.num_experts > 1:
        config = with_expert_options(config, shapes.num_chosen, shapes.num_experts, inputs.model.name)
    if wrong := [*unplanned(config)]:
        raise ConfigError(
            f"--dry-run: what {', '.join(wrong)} takes is not known beforehand; plan without, such as with --keep and "
            "--clusters N"
        )
    cases = cases_of(config, inputs, shapes)
    machine = measure()
    file_bytes = None if inputs.model.path is None else _file_bytes(inputs)
    plan, *others = (_plan_of(config, case, machine, file_bytes) for case in cases)
    return replace(plan, fewest=_fewest(cases, others[0])) if others else plan


def _plan_of(config: CompileConfig, case: Case, machine: Machine, file_bytes: int | None) -> Plan:
    """Plan one case of a compile."""
    model_dtype = _model_dtype(config)
    item_bytes = 2 if model_dtype == "bfloat16" else 4
    needs = memory_needs(config, _one_worker(case, config.num_places), item_bytes)
    works = [*stage_works(config, case, file_bytes)]
    peaks = accumulate((needs.get(name, 0) for name, _, _ in works), max)
    stages = tuple(
        StagePlan(
            name=name,
            detail=detail,
            seconds=stage_seconds(name, found, machine, model_dtype=model_dtype, num_workers=config.num_places),
            peak_bytes=peak,
        )
        for (name, detail, found), peak in zip(works, peaks, strict=True)
    )
    base = base_token_bytes(config, case.shapes)
    num_sharing = None if config.experts == "whole" else case.num_kept_experts
    pack = base + ffn_token_bytes(case.shapes, config.quantize, case.kept, num_sharing)
    dense = base + ffn_token_bytes(case.shapes, config.quantize, case.shapes.ffn_dim)
    return Plan(
        machine=machine,
        num_workers=config.num_places,
        model_dtype=model_dtype,
        num_tokens=case.calibration_tokens + case.validation_tokens + case.held_out_tokens,
        num_packs=case.num_packs,
        keep=case.kept / case.shapes.ffn_dim,
        # Workers import it too, after the main process has.
        start_seconds=IMPORT_SECONDS * (1 if config.ray is None else 2),
        stages=stages,
        bundle_bytes=bundle_bytes(config, case),
        scratch_bytes=scratch_bytes(config, case, item_bytes=item_bytes),
        token_bytes_pack=pack,
        token_bytes_dense=dense,
        tok_s_pack=machine.read_gbps * 1e9 * _DECODE_SHARE / pack,
        tok_s_dense=machine.read_gbps * 1e9 * _DECODE_SHARE / dense,
        token_share=_FOUND_SHARE if config.token_share == "auto" else config.token_share,
        is_thin=config.packs == "thin",
    )


def _fewest(cases: Sequence[Case], plan: Plan) -> FewestExperts:
    """Take what differs of the last case's plan."""
    return FewestExperts(
        num_foreseen=cases[0].num_kept_experts,
        num_experts=cases[-1].num_kept_experts,
        seconds=plan.seconds,
        peak_bytes=plan.peak_bytes,
        bundle_bytes=plan.bundle_bytes,
        scratch_bytes=plan.scratch_bytes,
        token_bytes_pack=plan.token_bytes_pack,
        tok_s_pack=plan.tok_s_pack,
    )


def _one_worker(case: Case, num_workers: int) -> Case:
    """What one of several workers has of the text."""
    return replace(
        case,
        calibration_tokens=-(-case.calibration_tokens // num_workers),
        validation_tokens=-(-case.validation_tokens // num_workers),
        held_out_tokens=-(-case.held_out_tokens // num_workers),
    )


def _model_dtype(config: CompileConfig) -> str:
    """What `pick_dtype` takes on a CPU."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if bf16_products_are_faster() else "float32"


def cases_of(config: CompileConfig, inputs: Inputs, shapes: Shapes) -> list[Case]:
    """Size up a compile: the case that is foreseen, and where it is known later how many experts stay the other end."""
    text = size_text(config, inputs.texts)
    encoder = encoder_size(inputs.encoder)
    part = round(text.num_tokens * _PART_SHARE)
    assert isinstance(config.clusters, int)
    return [
        Case(
            shapes=shapes,
            calibration_tokens=text.num_tokens - 2 * part,
            validation_tokens=part,
            held_out_tokens=part,
            document_tokens=text.num_tokens / text.num_documents,
            num_prompts=text.num_prompts,
            prompt_tokens=text.prompt_tokens,
            new_tokens=text.new_tokens,
            routing_tokens=text.routing_tokens,
            kept=kept,
            num_clusters=config.clusters,
            num_assigned=_assigned(config, config.clusters),
            encoder_weights=encoder.num_weights,
            encoder_vocabulary=encoder.vocab_size,
            num_sharing=num_sharing,
        )
        for kept, num_sharing in kept_ends(config, shapes)
    ]


def _assigned(config: CompileConfig, num_clusters: int) -> tuple[int, ...]:
    """Clusters of the packs, of the one static mask and of the random control."""
    if config.packs != "own" or not (config.evaluate and config.effective_controls):
        return (num_clusters,)
    return (num_clusters, 1) if num_clusters == 1 else (num_clusters, 1, num_clusters)


def memory_needs(config: CompileConfig, case: Case, item_bytes: int) -> Mapping[str, int]:
    """Most bytes of memory that each stage needs; `item_bytes` of a weight and an activation."""
    tokens = case.calibration_tokens
    samples = {
        "profile": work.sampled(tokens, PROFILE_TOKENS) if samples_tokens(config) else tokens,
        "curves": work.sampled(tokens, curve_tokens(case.shapes.ffn_dim)),
        "split": tokens,
        "reconstruct": tokens + case.validation_tokens,
    }
    # Of the clusters' packs a worker reads its share, and one that it shares with a neighbour; of the controls' all.
    first, *controls = case.num_assigned
    num_read = min(first, -(-first // config.num_places) + 1) + sum(controls)
    return stage_needs(config, case, samples, item_bytes=item_bytes, num_read=num_read)


def _file_bytes(inputs: Inputs) -> int:
    """Of model and encoder, which are hashed."""
    paths = [source.path for source in (inputs.model, inputs.encoder) if source.path is not None]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())
