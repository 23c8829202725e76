"""What narrowing the experts of a mixture takes, from shapes, tokens and clusters; see `work`."""

from dataclasses import replace

from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.samples import NEURON_BLOCK, SPLIT_TOKENS, VALIDATION_TOKENS

from .shapes import Shapes
from .work import NUM_RIDGES, Case, Work, moment_values, removal_work, repair_flop, sampled

__all__ = ["expert_repair_bytes", "expert_repair_work", "split_work"]

_FLOAT_BYTES, _STORED_BYTES = 4, 2
_MOST_COUNTS = 16
"""Numbers of experts that are tried at most (`expert_splits`)."""


def _one_expert(shapes: Shapes) -> Shapes:
    """An expert as the one FFN of each layer."""
    return replace(shapes, ffn_dim=shapes.expert_dim, num_experts=1, num_chosen=1)


def expert_repair_work(config: CompileConfig, case: Case) -> Work:
    """Run the text through the dense layers, sum h h^T of each expert's tokens, and solve for each pack and expert.

    With f neurons of an expert of which k stay, and c experts a token: c t f^2 for each assignment; for each expert of
    a pack 2 f^2 h for what it should put out, and removal and repairs as of a FFN, by one ridge in controls; errors on
    the validation text by r ridges, no repair among them, 2 c t (f + r k) h.
    """
    shapes, alone = case.shapes, _one_of(case)
    f, k, h = alone.shapes.ffn_dim, alone.kept, shapes.hidden_size
    validated = sampled(case.validation_tokens, VALIDATION_TOKENS)
    grams = case.calibration_tokens * shapes.num_chosen * f**2 * len(case.num_assigned)
    removal = removal_work(alone.shapes, k) if config.effective_removal == "second-order" else Work()
    num_ridges, num_controls = _num_ridges(config), case.num_packs - case.num_assigned[0]
    repairs = repair_flop(alone, num_ridges * case.num_assigned[0] + num_controls)
    solved = case.num_packs * (removal.float_flop + 2 * f**2 * h) + repairs
    checked = 2 * validated / 2 * shapes.num_chosen * (f + (num_ridges + 1) * k) * h
    moved = case.num_packs * (removal.moved_bytes + 6 * _FLOAT_BYTES * f * (f + h))
    return Work(
        model_flop=case.token_flop * (case.calibration_tokens + validated) + shapes.num_layers * grams,
        float_flop=shapes.num_layers * (case.num_kept_experts * solved + checked),
        moved_bytes=shapes.num_layers * case.num_kept_experts * moved,
        num_calls=case.num_documents(case.calibration_tokens + validated) * shapes.num_layers,
    )


def _one_of(case: Case) -> Case:
    return replace(case, shapes=_one_expert(case.shapes), kept=case.kept_width, num_sharing=None)


def split_work(config: CompileConfig, case: Case) -> Work:
    """Run the text for what narrower experts lose, and a sample of it for what fewer do.

    With f neurons of an expert and c experts a token: c t f^2 / 2 for sums over second halves; of each expert f h^2 +
    f^2 h twice for its rows' costs, and where it is repaired all of its neurons removed. Then the mixture runs on the
    second halves of the sample, for each assignment by its numbers of experts, and 2 h^2 of each output are its cost.
    """
    shapes, alone = case.shapes, _one_expert(case.shapes)
    f, h = alone.ffn_dim, shapes.hidden_size
    tried = min(_MOST_COUNTS, shapes.num_experts - shapes.num_chosen + 1) * len(case.num_assigned)
    sampled_tokens = sampled(case.calibration_tokens, SPLIT_TOKENS)
    grams = case.calibration_tokens / 2 * shapes.num_chosen * f**2
    mixed = sampled_tokens / 2 * tried * 2 * (shapes.num_chosen * alone.ffn_weights + shapes.num_experts * h)
    removal = removal_work(alone, 0, NEURON_BLOCK) if config.reconstruct else Work()
    curves = 2 * (f * h**2 + f**2 * h) + removal.float_flop
    return Work(
        model_flop=case.token_flop * (case.calibration_tokens + sampled_tokens) + shapes.num_layers * (grams + mixed),
        float_flop=shapes.num_layers * (shapes.num_experts * curves + sampled_tokens / 2 * tried * 2 * h**2),
        moved_bytes=shapes.num_layers * shapes.num_experts * (removal.moved_bytes + 6 * _FLOAT_BYTES * f * (f + h)),
        num_calls=case.num_documents(case.calibration_tokens + sampled_tokens) * shapes.num_layers,
    )


def _num_ridges(config: CompileConfig) -> int:
    return NUM_RIDGES if config.effective_ridge == "auto" else 1


def expert_repair_bytes(config: CompileConfig, case: Case) -> int:
    """Most bytes of memory: one expert's sums of all clusters, twice, and a layer's solutions by all ridges."""
    alone = _one_of(case)
    sums = 2 * case.num_clusters * _FLOAT_BYTES * moment_values(alone.shapes)
    solutions = (_num_ridges(config) + 1) * case.num_clusters * case.kept * case.shapes.hidden_size
    return sums + _STORED_BYTES * solutions
