"""What the stages of a compile compute and move, from shapes, tokens, clusters and streams: one function each.

A product of (m, k) and (k, n) is 2 m k n operations. Products of the model's own layers, in its dtype, are counted
apart from those in float32, by which neurons are removed and repaired.
"""

from dataclasses import dataclass, fields, replace

from coreinfer.compiler.samples import (
    MOMENT_TOKENS,
    PACKED_ROWS,
    PROFILE_TOKENS,
    SHARE_COST_TOKENS,
    VALIDATION_TOKENS,
    batch_tokens,
    curve_tokens,
    fisher_tokens,
    num_candidates,
    share_tokens,
)

from .shapes import Shapes

__all__ = [
    "NUM_RIDGES",
    "Case",
    "Work",
    "corpus_work",
    "curves_work",
    "distil_work",
    "embed_work",
    "evaluate_work",
    "load_work",
    "moment_values",
    "moments_work",
    "num_kept_sums",
    "pack_work",
    "packs_work",
    "profile_work",
    "reconstruct_work",
    "reference_work",
    "removal_work",
    "repair_flop",
    "repair_work",
    "sampled",
    "sensitivity_work",
    "share_scores_work",
    "shares_work",
    "sums_work",
    "write_work",
]

_GRAM_SHARE = 1 / 2
"""Of a square matrix, what is multiplied of a symmetric one."""
NUM_RIDGES = 3
_REMOVAL_STEP, _CURVE_STEP = 16, 32
_FLOAT_BYTES = 4
_ENCODER_BYTES_A_WEIGHT = 0.08
_ROUNDING_OPERATIONS = 100
"""For each weight: some ranges and a refit."""
_LOGIT_PASSES = 10
"""Over the logits of both models, in float32."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one stage.

    Attributes:
        model_flop: operations of products in the model's dtype.
        float_flop: operations of products in float32.
        moved_bytes: that are read and written by other steps, which memory bounds.
        num_calls: runs of one layer over some tokens, each of which takes its time however small it is.
    """

    model_flop: float = 0.0
    float_flop: float = 0.0
    moved_bytes: float = 0.0
    num_calls: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Both, one after the other."""
        return Work(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a compile's work depends on.

    Attributes:
        document_tokens: mean length of a document.
        num_prompts: of the builtin corpus, 0 without it.
        prompt_tokens, new_tokens: of the builtin corpus, all prompts and all that is written together.
        routing_tokens: of the texts that are embedded, as far as the encoder reads them.
        kept: mean number of neurons that a layer keeps.
        num_clusters: of the packs.
        num_assigned: of the packs and of the controls, each one's clusters.
        encoder_weights, encoder_vocabulary: of the sentence encoder's layers, and its tokens.
        num_sharing: experts that a layer's kept neurons are divided among; None for all that it has.
    """

    shapes: Shapes
    calibration_tokens: int
    validation_tokens: int
    held_out_tokens: int
    document_tokens: float
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    routing_tokens: int
    kept: int
    num_clusters: int
    num_assigned: tuple[int, ...]
    encoder_weights: int
    encoder_vocabulary: int
    num_sharing: int | None = None

    @property
    def num_kept_experts(self) -> int:
        """Experts that a layer of a pack has."""
        return self.num_sharing or self.shapes.num_experts

    @property
    def kept_width(self) -> int:
        """Neurons of each of them, where they are narrower."""
        return self.kept // self.num_kept_experts

    @property
    def token_flop(self) -> float:
        """Operations of all layers for a token: 2 w for w weights, 4 t a to look at t tokens with heads a wide."""
        shapes = self.shapes
        attention = 4 * self.document_tokens * shapes.num_heads * shapes.head_dim
        return 2 * shapes.token_weights + shapes.num_layers * attention

    @property
    def num_packs(self) -> int:
        """Of the clusters and of the controls."""
        return sum(self.num_assigned)

    @property
    def num_texts(self) -> float:
        """That are calibrated on or held out."""
        return self.num_documents(self.calibration_tokens + self.validation_tokens + self.held_out_tokens)

    def num_documents(self, tokens: float) -> float:
        """That hold some tokens."""
        return tokens / self.document_tokens


def sampled(num_tokens: int, wanted: int) -> int:
    """Tokens of every n-th document, where n is num_tokens // wanted: between `wanted` and twice as many."""
    return num_tokens // max(1, num_tokens // wanted)


def load_work(case: Case) -> Work:
    """Each weight is read, turned into float32 and into the model's dtype: 4 bytes of each."""
    return Work(moved_bytes=_FLOAT_BYTES * case.shapes.all_weights)


def corpus_work(case: Case) -> Work:
    """Round all weights; read the prompts, 2 w_body each token; write, 2 (w_body + w_head) each token."""
    if not case.num_prompts:
        return Work()
    shapes = case.shapes
    read = 2 * shapes.token_weights * case.prompt_tokens
    return Work(
        model_flop=read + 2 * (shapes.token_weights + shapes.head_weights) * case.new_tokens,
        moved_bytes=_FLOAT_BYTES * shapes.vocab_size * case.new_tokens,
    )


def moments_work(case: Case) -> Work:
    """Run about 4,096 tokens through the model, one document at a time."""
    tokens = min(case.calibration_tokens, MOMENT_TOKENS)
    calls = case.num_documents(tokens) * case.shapes.num_layers
    return Work(model_flop=case.token_flop * tokens, num_calls=calls)


def pack_work(case: Case, *, rounds: bool) -> Work:
    """Round all weights and write them: 100 operations and 8 bytes each."""
    weights = case.shapes.all_weights
    return Work(float_flop=_ROUNDING_OPERATIONS * weights * rounds, moved_bytes=2 * _FLOAT_BYTES * weights)


def packs_work(case: Case, *, rounds: bool) -> Work:
    """Cut the inner matrices of each pack, and round its down projections."""
    shapes, share = case.shapes, case.kept / case.shapes.ffn_dim
    down = case.num_packs * shapes.num_layers * shapes.down_weights * share
    inner = case.num_packs * shapes.num_layers * shapes.inner_weights * share
    moved = 2 * _FLOAT_BYTES * down + inner
    return Work(float_flop=_ROUNDING_OPERATIONS * down * rounds, moved_bytes=moved)


def embed_work(case: Case) -> Work:
    """Run the texts through the encoder's layers, in the model's dtype: 2 w each token, and all that is no product.

    Attention, norms and sums move about 0.8 MB a token in the default encoder; taken to grow with its weights.
    """
    passed = case.encoder_weights * case.routing_tokens
    return Work(model_flop=2 * passed, moved_bytes=_ENCODER_BYTES_A_WEIGHT * passed)


def distil_work(case: Case) -> Work:
    """Run every token of the encoder's vocabulary through it, alone between its first and last token: 3 x 2 w."""
    return Work(model_flop=3 * 2 * case.encoder_weights * case.encoder_vocabulary)


def profile_work(case: Case, *, samples: bool) -> Work:
    """Run the calibration text, 16,384 tokens of it at most where it is sampled; read all activations four times."""
    tokens = sampled(case.calibration_tokens, PROFILE_TOKENS) if samples else case.calibration_tokens
    shapes = case.shapes
    return Work(
        model_flop=case.token_flop * tokens,
        moved_bytes=4 * _FLOAT_BYTES * shapes.num_layers * tokens * shapes.ffn_dim,
        num_calls=case.num_documents(tokens) * shapes.num_layers,
    )


def sensitivity_work(case: Case) -> Work:
    """Run 4,096 to 8,192 tokens forward twice and back once, with the head forward and back; g g^T in each layer."""
    shapes, tokens = case.shapes, min(case.calibration_tokens, fisher_tokens(case.shapes.hidden_size))
    return Work(
        model_flop=tokens * (3 * case.token_flop + 2 * 2 * shapes.head_weights),
        float_flop=tokens * shapes.num_layers * 2 * shapes.hidden_size**2,
        moved_bytes=_LOGIT_PASSES * _FLOAT_BYTES * tokens * shapes.vocab_size,
    )


def curves_work(case: Case) -> Work:
    """Run 8,192 to 16,384 tokens; in each layer their Gram matrix, and the removal of all neurons."""
    shapes, tokens = case.shapes, min(case.calibration_tokens, curve_tokens(case.shapes.ffn_dim))
    grams = 2 * _GRAM_SHARE * tokens * shapes.ffn_dim**2
    removal = removal_work(shapes, 0, _CURVE_STEP)
    return Work(
        model_flop=case.token_flop * tokens + shapes.num_layers * grams,
        float_flop=shapes.num_layers * removal.float_flop,
        moved_bytes=shapes.num_layers * removal.moved_bytes,
    )


def removal_work(shapes: Shapes, kept: int, step: int = _REMOVAL_STEP) -> Work:
    """Invert f x f, multiply by f x h, and update both for each lot removed: n^3 + 2 n^2 h, then sums of 2 s m (m + h).

    The updates of s rows and columns, until k of f are left, are 2/3 (f^3 - k^3) + (f^2 - k^2) h; each reads and
    writes what is left, 8 m^2 bytes.
    """
    f, h, k = shapes.ffn_dim, shapes.hidden_size, kept
    updates = 2 / 3 * (f**3 - k**3) + (f**2 - k**2) * h
    return Work(
        float_flop=f**3 + 2 * f**2 * h + updates,
        moved_bytes=2 * _FLOAT_BYTES * (f**3 - k**3) / (3 * step),
    )


def sums_work(case: Case) -> Work:
    """What narrowing each layer for itself adds to the profile.

    Validation text, and moments in the model's dtype, which are written.
    """
    shapes = case.shapes
    kept = shapes.num_layers * num_kept_sums(case) * moment_values(shapes)
    return Work(
        model_flop=case.token_flop * case.validation_tokens
        + shapes.num_layers * len(case.num_assigned) * _sums_flop(case),
        moved_bytes=3 * _FLOAT_BYTES * kept,
    )


def num_kept_sums(case: Case) -> int:
    """Sums of a layer: of each cluster, and of all text where an assignment has more than one."""
    return case.num_packs + sum(num_clusters > 1 for num_clusters in case.num_assigned)


def moment_values(shapes: Shapes) -> int:
    """Values of one cluster's moments in one layer, as they are kept and sent: see `pack_upper`."""
    return shapes.ffn_dim * ((shapes.ffn_dim + PACKED_ROWS) // 2 + shapes.hidden_size)


def _sums_flop(case: Case) -> float:
    """Moments h h^T and h y^T of the calibration text in one layer, for one assignment."""
    shapes = case.shapes
    return 2 * case.calibration_tokens * shapes.ffn_dim * (_GRAM_SHARE * shapes.ffn_dim + shapes.hidden_size)


def repair_work(case: Case) -> Work:
    """Solve for one ridge by sums that are known, and compare it on the validation text with no repair."""
    shapes = case.shapes
    checked = 2 * 2 * case.validation_tokens / 2 * case.kept * shapes.hidden_size * len(case.num_assigned)
    return Work(
        float_flop=shapes.num_layers * (case.num_packs * repair_flop(case, 1) + checked),
        moved_bytes=shapes.num_layers * case.num_packs * _mixture_bytes(shapes),
    )


def reconstruct_work(case: Case, *, carries: bool, removes: bool, picks: bool) -> Work:
    """Run the text through the dense layers, and again for the clusters and each control as far as it is narrow.

    A narrow run is attention, the inner matrices and the narrow down projection for half of the tokens. Each one also
    sums moments h h^T and h y^T of the calibration text, in the model's dtype; for each of its clusters neurons are
    removed and three repairs solved, of controls one.

    Args:
        picks: whether this is done for candidates alone, by `num_candidates`; layers are taken to keep as many each.
    """
    token_flop, ffn_dim = case.token_flop, case.shapes.ffn_dim
    candidates = num_candidates(case.kept, ffn_dim) if picks else ffn_dim
    case = replace(case, shapes=replace(case.shapes, ffn_dim=candidates))
    shapes, tokens = case.shapes, case.calibration_tokens + sampled(case.validation_tokens, VALIDATION_TOKENS)
    # Of half of the tokens.
    narrow = tokens * (shapes.attention_weights + shapes.inner_weights + case.kept * shapes.hidden_size)
    removal = removal_work(shapes, case.kept) if removes else Work()
    flop, moved = 0.0, 0.0
    for number, num_clusters in enumerate(case.num_assigned):
        repair = repair_flop(case, NUM_RIDGES if number == 0 else 1)
        flop += num_clusters * (removal.float_flop + repair)
        moved += num_clusters * (removal.moved_bytes + _mixture_bytes(shapes))
    per_layer = len(case.num_assigned) * (_sums_flop(case) + narrow * carries)
    model_flop = token_flop * tokens + shapes.num_layers * per_layer
    return Work(
        model_flop=model_flop,
        float_flop=shapes.num_layers * flop,
        moved_bytes=shapes.num_layers * moved,
    )


def repair_flop(case: Case, num_ridges: int) -> float:
    """Cholesky of k x k and two triangular solves of k x h for each ridge: k^3 / 3 + 2 k^2 h."""
    return num_ridges * (case.kept**3 / 3 + 2 * case.kept**2 * case.shapes.hidden_size)


def _mixture_bytes(shapes: Shapes) -> float:
    """Moments of a cluster are zeroed, packed, mixed and unpacked: about six passes over f (f + h) values."""
    return 6 * _FLOAT_BYTES * shapes.ffn_dim * (shapes.ffn_dim + shapes.hidden_size)


def reference_work(case: Case) -> Work:
    """Run the held-out text twice whole, and the head for its second halves; unpack all weights, and compare once."""
    shapes, tokens = case.shapes, case.held_out_tokens
    return Work(
        model_flop=2 * tokens * (case.token_flop + shapes.head_weights),
        moved_bytes=_FLOAT_BYTES * (2 * shapes.all_weights + _LOGIT_PASSES * tokens / 2 * shapes.vocab_size),
        num_calls=2 * tokens / batch_tokens(shapes.vocab_size) * shapes.num_layers,
    )


def evaluate_work(case: Case) -> Work:
    """Run the second halves of the held-out text for the clusters and each control, and compare logits in float32.

    Stored weights are unpacked once: the base, and the packs.
    """
    shapes, tokens = case.shapes, case.held_out_tokens
    num_models = len(case.num_assigned)
    unpacked = shapes.all_weights + case.num_packs * shapes.num_layers * shapes.ffn_weights * case.kept / shapes.ffn_dim
    compared = num_models * tokens / 2 * shapes.vocab_size
    return Work(
        model_flop=(case.token_flop + 2 * shapes.head_weights) * tokens * num_models / 2,
        moved_bytes=_FLOAT_BYTES * (unpacked * 2 + _LOGIT_PASSES * compared),
        num_calls=tokens / 2 / batch_tokens(shapes.vocab_size) * num_models * shapes.num_layers,
    )


def shares_work(case: Case, *, thin: bool = False, halves: bool = False) -> Work:
    """Read text for the dense FFN and for each pack, then other text, its second half forward and back.

    Args:
        thin: whether clusters decode with the dense FFN, which is unpacked once.
        halves: whether inputs are read in half; then the low bits of all layers are summed up.
    """
    shapes, num_clusters = case.shapes, case.num_clusters
    tokens = share_tokens(num_clusters) * (num_clusters + 1)
    begun = scored = min(case.calibration_tokens, SHARE_COST_TOKENS) / 2
    num_packs = 0 if thin else num_clusters
    unpacked = shapes.all_weights + num_packs * shapes.num_layers * shapes.ffn_weights * case.kept / shapes.ffn_dim
    return Work(
        model_flop=case.token_flop * (tokens + begun + 2 * scored) + scored * 2 * 2 * shapes.head_weights,
        moved_bytes=_FLOAT_BYTES
        * (2 * unpacked + _LOGIT_PASSES * scored * shapes.vocab_size + 2 * halves * shapes.body_weights),
    )


def share_scores_work(case: Case, *, num_passes: int, thin: bool, halves: bool) -> Work:
    """Run the second halves of the held-out text several times, with the dense FFN or with the packs.

    Args:
        halves: whether inputs are read in half, of which there is a second product, with what low bits add.
    """
    found = evaluate_work(replace(case, num_assigned=(1 if thin else case.num_clusters,)))
    if halves:
        found = replace(
            found,
            model_flop=found.model_flop + case.token_flop * case.held_out_tokens / 2,
            moved_bytes=found.moved_bytes + _FLOAT_BYTES * 2 * case.shapes.body_weights,
        )
    return Work(**{item.name: num_passes * getattr(found, item.name) for item in fields(found)})


def write_work(bundle_bytes: int) -> Work:
    """Write the bundle, read it to hash it, and write its report."""
    return Work(moved_bytes=2 * bundle_bytes)
