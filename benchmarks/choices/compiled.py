"""The compiler's stages on texts of one's own: what the benchmarks of quality measure with.

Everything is measured as it is stored, which is what a device reads.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.manifest import Quality
from coreinfer.bundles.statistics import document_statistic, mix_scores, scores_from_statistic, select_neurons
from coreinfer.compiler.cache import Cache
from coreinfer.compiler.clusters.route import Routing, build_routing, control_assignments, nearest
from coreinfer.compiler.config import CompileConfig
from coreinfer.compiler.models.load import LoadedModel, load_model, read_config
from coreinfer.compiler.models.primitives import keep_few_primitives
from coreinfer.compiler.models.sources import find_source
from coreinfer.compiler.models.walking import walk_layers
from coreinfer.compiler.progress import Progress, TqdmProgress
from coreinfer.compiler.prune.narrow import Assignment, Cut, CutOf, NarrowModel
from coreinfer.compiler.prune.select import Choice
from coreinfer.compiler.quality.reference import read_reference
from coreinfer.compiler.quality.stored import StoredModel, dense_cut, stored_packs
from coreinfer.compiler.stages import Ground, Material, gather_material, narrow_packs, prepare, score_packs
from coreinfer.compiler.team.alone import Alone
from coreinfer.compiler.text.corpus import Document, split_into_documents, split_point

HALF_TOKENS = 100
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A loaded and stored model, a clustered corpus, and the texts to evaluate on.

    Attributes:
        assignments: the clusters and the controls, with the texts in place of the corpus's own held-out part.
    """

    config: CompileConfig
    material: Material
    routing: Routing
    documents: list[Document]
    assignments: list[Assignment]
    progress: Progress

    @property
    def loaded(self) -> LoadedModel:
        """The model."""
        return self.material.loaded

    @property
    def token_ids(self) -> list[tuple[int, ...]]:
        """Token ids of the texts to evaluate on."""
        return [document.token_ids for document in self.documents]

    def ground(self, config: CompileConfig) -> Ground:
        """Measure what narrowing with some options goes by."""
        return prepare(config, self.material, self.routing, self.assignments, config.effective_keep, self.progress)

    def narrow(
        self, config: CompileConfig, ground: Ground, budgets: Sequence[int]
    ) -> tuple[str, dict[str, NarrowModel]]:
        """Narrow for the clusters and the controls at the same layer budgets; see `narrow_packs`."""
        everywhere = {item.name: [budgets] * ground.profile.num_clusters(item.name) for item in self.assignments}
        return narrow_packs(config, ground, everywhere, self.assignments, self.progress)

    def score(self, narrow: Mapping[str, NarrowModel], chosen: Mapping[str, Choice] | None = None) -> Quality:
        """Score packs by the names of their assignments, and choices that have one cluster for each text."""
        held_out = {item.name: item.held_out for item in self.assignments}
        every_text = np.arange(len(self.documents))
        with (
            read_reference(self.material.team, self.token_ids, self.progress, self.material.stored) as reference,
            stored_packs(self.material.team, self.material.stored, narrow, self.progress) as packs,
        ):
            models = {name: (pack.cut, held_out[name]) for name, pack in packs.items()}
            own = {
                name: (chosen_cut(self.material.stored, choice), every_text) for name, choice in (chosen or {}).items()
            }
            return score_packs(self.material, reference, models | own, self.progress)

    def prompt_scores(self, config: CompileConfig) -> Floats:
        """Scores of each text's own first half: (texts, layers, ffn_dim)."""
        halves = [Document(text="", routing_text="", token_ids=ids[: split_point(len(ids))]) for ids in self.token_ids]
        shape = (len(halves), self.loaded.record.num_layers, self.loaded.record.ffn_dim)
        scores = np.zeros(shape, dtype=np.float32)
        with self.progress.stage("prompts", shape[1]) as advance:
            for layer in walk_layers(self.loaded, halves, advance):
                norms = self.loaded.column_norms[layer.layer]
                for text, half in enumerate(halves):
                    values = layer.document(text).float().numpy()
                    statistic = document_statistic(
                        config.selection, values, alpha=config.alpha, beta=config.beta, sentence=False
                    )
                    scores[text, layer.layer] = scores_from_statistic(
                        config.selection, statistic, len(half.token_ids), norms
                    )
        return scores

    def fused_scores(self, prompt: Floats, clusters: Floats) -> Floats:
        """Mix each text's own scores with its cluster's: (texts, layers, ffn_dim)."""
        routed = self.assignments[0].held_out
        mixed = [
            mix_scores(
                prompt[text],
                clusters[routed[text]],
                num_prompt_tokens=split_point(len(ids)),
                half_tokens=HALF_TOKENS,
            )
            for text, ids in enumerate(self.token_ids)
        ]
        return np.stack(mixed)


@contextmanager
def open_bench(config: CompileConfig, texts: Sequence[str]) -> Iterator[Bench]:
    """Load and store the model, and cluster the corpus, for the time of the block."""
    keep_few_primitives()
    progress = TqdmProgress()
    source = find_source(config.model)
    family, model_config = read_config(source)
    loaded = load_model(source, family, model_config, device=config.device, dtype=config.dtype)
    cache, team = Cache(config.cache_dir), Alone(loaded)
    if config.cache_dir is not None:
        config.cache_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=config.cache_dir, prefix="bench-") as folder:
        model_sha256 = source.sha256(model_config.to_dict())
        material = gather_material(config, team, model_sha256, cache, Path(folder), progress)
        routing = build_routing(config, config.clusters, team, material.corpus, cache, progress)
        found = [
            split_into_documents([text], loaded.tokenizer.backend_tokenizer, config.document_tokens)[:1]
            for text in texts
        ]
        documents = [document for documents in found for document in documents]
        yield Bench(
            config=config,
            material=material,
            routing=routing,
            documents=documents,
            assignments=_assignments(config, loaded, routing, documents),
            progress=progress,
        )


def _assignments(
    config: CompileConfig, loaded: LoadedModel, routing: Routing, documents: Sequence[Document]
) -> list[Assignment]:
    token_ids = [document.token_ids for document in documents]
    halves = [loaded.tokenizer.decode(list(ids[: split_point(len(ids))])) for ids in token_ids]
    routed = nearest(routing.encoder.embed(halves), routing.centroids)
    clusters = replace(routing.assignment, held_out=routed)
    return [clusters, *(control_assignments(clusters, seed=config.seed) if config.effective_controls else ())]


def choose_each(scores: Floats, budgets: Sequence[int]) -> Choice:
    """Keep the highest scores of every text, as one cluster a text."""
    return Choice(scores=scores, neuron_ids=[select_neurons(layers, budgets) for layers in scores])


def chosen_cut(stored: StoredModel, choice: Choice) -> CutOf:
    """Give neurons of the stored dense FFN, as modes stability and fused read them."""
    return lambda loaded: partial(_chosen_layer, dense_cut(loaded, stored), choice)


def _chosen_layer(dense: Cut, choice: Choice, layer: int, cluster: int) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(choice.neuron_ids[cluster][layer]).long()
    tensors: dict[str, Any] = dict(dense(layer, 0))
    for role in tensors.keys() - {"down_bias"}:
        tensors[role] = (tensors[role][:, ids] if role == "down" else tensors[role][ids]).contiguous()
    return tensors
