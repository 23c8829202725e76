"""The stages of a compile in their order, and the work of each."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.efforts import Effort, shares_profile, weighs_errors
from coreinfer.compiler.quality.search import searches

from . import work
from .expert_work import expert_repair_work, split_work
from .sizes import bundle_bytes, names_experts, reads_halves
from .work import Case, Work

__all__ = ["samples_tokens", "stage_works"]

_TRIES: Mapping[Effort, int] = {"quick": 3, "normal": 4, "best": 5}
"""Of a search for a quality."""
_SHARE_TRIES = 5
"""Of a search for token shares."""
_KEEP_TRIES = 3
"""Of `--packs auto`, keep ratios that are narrowed until bytes rise or the quality is lost."""


def samples_tokens(config: CompileConfig) -> bool:
    """Whether the profile reads a sample of the tokens."""
    # Of experts neurons go by their scores too, where few tokens chose one.
    return config.effective_removal == "second-order" and config.experts == "whole"


def stage_works(config: CompileConfig, case: Case, file_bytes: int | None) -> Iterator[tuple[str, str, Work]]:
    """Stages that run, in their order: name, what there is to do, and its work.

    Args:
        file_bytes: of model and encoder, which are hashed; None for a model on the Hub.
    """
    rounds, narrows = config.quantize != "bf16", case.kept < case.shapes.ffn_dim
    yield from _loading(case, file_bytes)
    yield "corpus", _corpus_detail(case), work.corpus_work(case)
    if rounds:
        yield "moments", "", work.moments_work(case)
    yield "pack", "base and dense FFN", work.pack_work(case, rounds=rounds)
    if config.evaluate or searches(config) or config.searches_share:
        yield "reference", f"{case.held_out_tokens:,} tokens", work.reference_work(case)
    yield "embed", f"{case.num_texts:,.0f} texts", work.embed_work(case)
    yield "distil", f"{case.encoder_vocabulary:,} tokens", work.distil_work(case)
    if config.packs == "own":
        yield from _packing(config, case, narrows=narrows)
    if config.packs == "auto":
        yield from _choosing(config, case, narrows=narrows)
    elif config.token_share is not None:
        yield from _sharing(config, case)
    yield "write", "", work.write_work(bundle_bytes(config, case))


def _packing(config: CompileConfig, case: Case, *, narrows: bool) -> Iterator[tuple[str, str, Work]]:
    """Profile the clusters' text, and narrow, store and score their packs."""
    yield from _profiling(config, case, narrows=narrows)
    alone = replace(case, num_assigned=case.num_assigned[:1])
    for _ in range(_num_tries(config)):
        yield from _narrowing(config, alone, narrows=narrows)
    if not _num_tries(config) or case.num_assigned != alone.num_assigned:
        yield from _narrowing(config, case, narrows=narrows)
    elif config.evaluate:
        # The packs are those of the last try.
        yield "evaluate", f"{case.held_out_tokens:,} tokens", work.evaluate_work(case)


def _choosing(config: CompileConfig, case: Case, *, narrows: bool) -> Iterator[tuple[str, str, Work]]:
    """Find the shares of thin clusters, and of packs at some keep ratios; make those that are chosen once more."""
    halves, text = reads_halves(config, case.shapes), f"{case.held_out_tokens:,} tokens"
    yield from _profiling(config, case, narrows=narrows)
    yield "shares", "thin clusters", work.shares_work(case, thin=True, halves=halves)
    scores = work.share_scores_work(case, num_passes=2 * _SHARE_TRIES, thin=True, halves=halves)
    yield "evaluate", f"{text}, {2 * _SHARE_TRIES} times, for shares", scores
    for _ in range(_KEEP_TRIES + 1):
        yield from (found for found in _narrowing(config, case, narrows=narrows) if found[0] != "evaluate")
        yield "shares", f"{case.num_clusters} packs", work.shares_work(case, halves=halves)
        scores = work.share_scores_work(case, num_passes=_SHARE_TRIES + 1, thin=False, halves=halves)
        yield "evaluate", f"{text}, {_SHARE_TRIES + 1} times, for shares", scores
    if config.evaluate:
        yield "evaluate", f"{text}, 4 times", work.share_scores_work(case, num_passes=4, thin=False, halves=halves)


def _profiling(config: CompileConfig, case: Case, *, narrows: bool) -> Iterator[tuple[str, str, Work]]:
    """Measure on the clusters' text what narrowing needs."""
    profile = work.profile_work(case, samples=samples_tokens(config))
    if narrows and shares_profile(config):
        profile += work.sums_work(case)
    yield "profile", f"{case.num_clusters} clusters", profile
    if narrows and weighs_errors(config):
        yield "sensitivity", "", work.sensitivity_work(case)
    if config.experts == "both":
        detail = f"{case.shapes.num_experts} experts in {case.shapes.num_layers} layers"
        yield "split", detail, split_work(config, case)
    elif narrows and config.effective_budgets == "sensitivity":
        yield "curves", "", work.curves_work(case)


def _loading(case: Case, file_bytes: int | None) -> Iterator[tuple[str, str, Work]]:
    if file_bytes is not None:
        yield "hash", "model and encoder", Work(moved_bytes=file_bytes)
    yield "load", f"{case.shapes.all_weights / 1e6:,.0f} M weights", work.load_work(case)


def _sharing(config: CompileConfig, case: Case) -> Iterator[tuple[str, str, Work]]:
    """Set token shares, and score them."""
    halves = reads_halves(config, case.shapes)
    shares = work.shares_work(case, thin=config.packs == "thin", halves=halves)
    yield "shares", f"4 groups in {case.shapes.num_layers} layers", shares
    is_thin = config.packs == "thin"
    if config.searches_share:
        # Each try reads the text by clusters and by the dense FFN; of packs, once more with all weights.
        num_passes = 2 * (_SHARE_TRIES + (0 if is_thin else 1))
        detail = f"{case.held_out_tokens:,} tokens, {num_passes} times, for shares"
        yield "evaluate", detail, work.share_scores_work(case, num_passes=num_passes, thin=is_thin, halves=halves)
    if config.evaluate:
        # Of thin clusters there are two controls more.
        num_passes = 6 if is_thin else 4
        detail = f"{case.held_out_tokens:,} tokens, {num_passes} times"
        yield "evaluate", detail, work.share_scores_work(case, num_passes=num_passes, thin=is_thin, halves=halves)


def _narrowing(config: CompileConfig, case: Case, *, narrows: bool) -> Iterator[tuple[str, str, Work]]:
    """Narrow, store and score packs."""
    if config.reconstruct:
        removes = narrows and config.effective_removal == "second-order"
        if case.shapes.num_experts > 1:
            found = expert_repair_work(config, case)
        elif shares_profile(config):
            found = work.repair_work(case)
        else:
            carries = config.effective_carry
            picks = carries and removes and config.effective_budgets == "sensitivity"
            found = work.reconstruct_work(case, carries=carries, removes=removes, picks=picks)
        yield "reconstruct", f"{case.num_packs} packs, {len(case.num_assigned) - 1} controls", found
    named = names_experts(config, case.shapes)
    packs = Work() if named else work.packs_work(case, rounds=config.quantize != "bf16")
    yield "pack", f"{case.num_packs} packs", packs
    if config.evaluate or _num_tries(config):
        yield "evaluate", f"{case.held_out_tokens:,} tokens", work.evaluate_work(case)


def _num_tries(config: CompileConfig) -> int:
    """Narrowings that a search for a quality usually takes before the last one."""
    return _TRIES[config.effort] if searches(config) else 0


def _corpus_detail(case: Case) -> str:
    return f"{case.new_tokens:,} tokens written" if case.num_prompts else "read"
