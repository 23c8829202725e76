"""The dense model as a bundle of its own: what the runtime opens to write text with it."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import (
    ClusterRecord,
    Manifest,
    ModelRecord,
    Plan,
    Provenance,
    RouterRecord,
    TensorRecord,
)
from coreinfer.bundles.tensors import TensorFile
from coreinfer.bundles.writer import finish_manifest
from coreinfer.compiler.clusters.embed import StaticEncoder
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.prune.narrow import NarrowModel
from coreinfer.compiler.prune.select import Choice
from coreinfer.compiler.quantize.pack import (
    Packer,
    write_base,
    write_cluster,
    write_dense,
    write_router,
    write_tokenizer,
)
from coreinfer.compiler.quantize.quantize import QuantizeOptions
from coreinfer.compiler.report.describe import quantization_records
from tokenizers import Tokenizer, models

__all__ = ["write_dense_bundle"]

# Near lossless without moments, which only text could tell; twice as fast to read as bf16.
_FORMATS = QuantizeOptions(body="int8", head="int8")


def write_dense_bundle(folder: Path, loaded: LoadedModel) -> None:
    """Write the model in int8, with its tokenizer, into an empty folder.

    Every bundle has clusters and a router. This one has a cluster of one neuron in each layer, or of the first experts,
    and a router that knows this cluster alone; mode "dense" uses neither.
    """
    packer = Packer(formats=_FORMATS, moments={})
    base_tensors = write_base(folder, loaded, packer)
    write_dense(folder, loaded, packer)
    write_cluster(folder / LAYOUT.cluster(0), loaded, packer, _one_neuron(loaded), 0, TensorFile(folder / LAYOUT.dense))
    write_tokenizer(folder, loaded)
    encoder = StaticEncoder(table=np.zeros((1, 1), dtype=np.float16), tokenizer_json=Tokenizer(models.BPE()).to_str())
    write_router(folder, encoder, np.ones((1, 1), dtype=np.float32))
    finish_manifest(folder, _manifest(loaded, base_tensors))


def _one_neuron(loaded: LoadedModel) -> NarrowModel:
    num_layers = loaded.record.num_layers
    units = np.arange(_num_units(loaded.record), dtype=np.int32)
    return NarrowModel(
        choice=Choice(
            scores=np.ones((1, *loaded.column_norms.shape), dtype=np.float32), neuron_ids=[[units] * num_layers]
        ),
        downs=[[None]] * num_layers,
        biases=[[None]] * num_layers,
        ridges=(None,) * num_layers,
    )


def _num_units(record: ModelRecord) -> int:
    """The fewest neurons, or experts, that a layer can have."""
    return 1 if record.experts is None else record.experts.num_chosen


def _manifest(loaded: LoadedModel, base_tensors: dict[str, TensorRecord]) -> Manifest:
    record = loaded.record
    budget = _num_units(record) * record.expert_neurons
    layer_budgets = (budget,) * record.num_layers
    return Manifest(
        model=record,
        quantization=quantization_records(_FORMATS),
        clusters=(
            ClusterRecord(
                file=LAYOUT.cluster(0),
                label="",
                num_sentences=0,
                num_tokens=0,
                examples=(),
                layer_budgets=layer_budgets,
                keep_ratio=budget / record.ffn_dim,
                ffn_bytes=0,
                map_x=0.0,
                map_y=0.0,
            ),
        ),
        router=RouterRecord(encoder="static", dimension=1, distance_p99=0.0, agreement=None, num_agreement_sentences=0),
        plan=Plan(
            selection="output-aware",
            keep=budget / record.ffn_dim,
            alpha=1.0,
            beta=1.0,
            cluster_weight=1.0,
            budgets="uniform",
            layer_budgets=layer_budgets,
            reconstruct=False,
            ridges=(None,) * record.num_layers,
            dense=True,
            stability_min_tokens=0,
            fused_half_tokens=0,
        ),
        quality=None,
        provenance=Provenance(
            coreinfer=version("coreinfer"), packages={}, model_sha256="", corpus_sha256="", encoder="", config={}
        ),
        base_tensors=base_tensors,
    )
