"""Run calibration text through a model one layer at a time.

Only one layer need be on the device, and only the hidden states between layers are kept: (tokens, hidden size) in
all. What each layer needs besides hidden states (masks, positions, rotary embeddings) differs between families;
it is recorded by running the model's own forward pass once with its layers taken out.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles.families import CACHE_ARGUMENTS, cache_argument, resolve
from coreinfer.compiler.text.corpus import Document
from torch import nn

from .later import Beginning, GoOn, KeepBeginning, later_arguments
from .load import LoadedModel
from .states import SHARED

__all__ = [
    "Batch",
    "LayerRun",
    "PartialRun",
    "READING",
    "document_starts",
    "goes_on",
    "head_logits",
    "layer_output",
    "pick",
    "prepare_batches",
    "run_layer",
    "run_partly",
]

READING = 5
"""Part of the keys of all stages that run text; one more as soon as layers give other results, if only by rounding."""
_BATCH_TOKENS = 4096
_CPU_BATCH_TOKENS = 1024
# What a layer's FFN computes of so many stays in a CPU's third-level cache, and little of a batch is padding.


@dataclass(kw_only=True)
class Batch:
    """Documents that go through a layer together.

    Attributes:
        token_ids: (batch, length), documents begin at the left.
        rows: (tokens,) places of the batch's real tokens in the order of all documents.
        mask: (batch, length) which places hold real tokens.
        hidden: (batch, length, row) that the next layer reads, overwritten layer by layer: rows are hidden states, or
            what else a token takes from layer to layer (`states.py`).
        arguments: keyword arguments of each layer.
    """

    token_ids: torch.Tensor
    rows: torch.Tensor
    mask: torch.Tensor
    hidden: torch.Tensor
    arguments: list[dict[str, Any]]

    def real(self, values: torch.Tensor) -> torch.Tensor:
        """Drop the padding: (batch, length, n) -> (tokens, n), in the order of `rows`."""
        return pick(values, self.mask)


def pick(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Take some places of (batch, length, n) or (batch x length, n) values: (places, n).

    Whole rows are copied, where indexing by a mask would go number by number.

    Args:
        places: (batch, length) bool.
    """
    return values.reshape(-1, values.shape[-1]).index_select(0, places.reshape(-1).nonzero()[:, 0])


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """What came out of one layer for one batch.

    Attributes:
        output: (batch, length, row) that leaves the layer.
        activations: (batch, length, ffn_dim), input of the down projection.
        ffn_output: (batch, length, hidden size), output of the down projection.
    """

    output: torch.Tensor
    activations: torch.Tensor
    ffn_output: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class PartialRun:
    """What came out of a layer whose FFN was computed for some tokens, and only as far as the down projection.

    Attributes:
        output: (batch, length, row) that leaves the layer.
        activations: (tokens asked for, ffn_dim), what the down projection would read.
    """

    output: torch.Tensor
    activations: torch.Tensor


class _Substitute(nn.Module):
    """Stands in for a decoder layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Models ask their layers for such things before calling them.
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type


class _Given(_Substitute):
    """Gives hidden states that were computed elsewhere."""

    def __init__(self, layer: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__(layer)
        self.hidden = hidden

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self.hidden


class _Recorder(_Substitute):
    """Keeps what it was called with."""

    def __init__(self, layer: nn.Module, calls: list[dict[str, Any]]) -> None:
        super().__init__(layer)
        self.calls = calls
        # Some models give their layers more than the hidden states by position.
        self.names = list(inspect.signature(type(layer).forward).parameters)[1:]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append({**dict(zip(self.names, (hidden_states, *args), strict=False)), **kwargs})
        return hidden_states


def document_starts(documents: Sequence[Document]) -> npt.NDArray[np.int64]:
    """Where each document's tokens begin, documents one after another: (documents + 1,), the last is their number."""
    return np.concatenate([[0], np.cumsum([len(document.token_ids) for document in documents])]).astype(np.int64)


def prepare_batches(
    loaded: LoadedModel,
    documents: Sequence[Document],
    starts: npt.NDArray[np.int64],
    *,
    batch_tokens: int | None = None,
) -> list[Batch]:
    """Batch documents of similar length, up to a number of tokens, and record what the layers are called with."""
    most = batch_tokens or (_CPU_BATCH_TOKENS if loaded.device.type == "cpu" else _BATCH_TOKENS)
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].token_ids))
    batches, members = [], list[int]()
    for index in order:
        longest = len(documents[index].token_ids)
        if members and (len(members) + 1) * longest > most:
            batches.append(_record_batch(loaded, documents, members, starts))
            members = []
        members.append(index)
    batches.append(_record_batch(loaded, documents, members, starts))
    return batches


def _record_batch(
    loaded: LoadedModel, documents: Sequence[Document], members: Sequence[int], starts: npt.NDArray[np.int64]
) -> Batch:
    lengths = [len(documents[i].token_ids) for i in members]
    token_ids = torch.zeros((len(members), max(lengths)), dtype=torch.long)
    mask = torch.zeros_like(token_ids, dtype=torch.bool)
    for row, (i, length) in enumerate(zip(members, lengths, strict=True)):
        token_ids[row, :length] = torch.tensor(documents[i].token_ids)
        mask[row, :length] = True
    rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in members])
    # Padding stands after a document, where causal attention does not look, so that no mask is needed for it.
    calls = _record_calls(loaded, token_ids.to(loaded.device))
    hidden = loaded.states_form.pack(calls[0]["hidden_states"])
    arguments = [{name: value for name, value in call.items() if name not in _STATE_ARGUMENTS} for call in calls]
    return Batch(
        token_ids=token_ids.to(loaded.device),
        rows=rows.to(loaded.device),
        mask=mask.to(loaded.device),
        hidden=hidden,
        arguments=arguments,
    )


_STATE_ARGUMENTS = frozenset({"hidden_states", "use_cache", SHARED, *CACHE_ARGUMENTS})


def _record_calls(loaded: LoadedModel, token_ids: torch.Tensor) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    with _layers_replaced(loaded, lambda layer: _Recorder(layer, calls)):
        backbone = getattr(loaded.model, str(loaded.model.base_model_prefix))
        backbone(input_ids=token_ids, use_cache=False)
    return calls


def head_logits(loaded: LoadedModel, token_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """What the model makes of (batch, length, row) that leave its layers: (batch, length, vocabulary)."""
    states, _ = loaded.states_form.unpack(hidden)
    with _layers_replaced(loaded, lambda layer: _Given(layer, states)):
        logits: torch.Tensor = loaded.model(token_ids, use_cache=False).logits
    return logits


@contextmanager
def _layers_replaced(loaded: LoadedModel, replacement: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    parent_path, _, name = loaded.family.layers.rpartition(".")
    parent = resolve(loaded.model, parent_path)
    layers = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(replacement(layer) for layer in layers))
    try:
        yield
    finally:
        setattr(parent, name, layers)


def run_layer(
    loaded: LoadedModel, index: int, batch: Batch, hidden: torch.Tensor, keep: KeepBeginning | None = None
) -> LayerRun:
    """Run one batch through one layer.

    Args:
        hidden: (batch, length, row) that enters.
        keep: takes the first places' keys and values.
    """
    seen: dict[str, torch.Tensor] = {}

    def look(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # Some models flatten batch and length for their FFN.
        seen["activations"], seen["ffn_output"] = inputs[0], output

    handle = loaded.projection(index, "down").register_forward_hook(look)
    cache = {} if keep is None else cache_argument(loaded.layers[index], keep)
    try:
        output = _called(loaded, index, hidden, {**batch.arguments[index], **cache})
    finally:
        handle.remove()
    return LayerRun(
        output=output,
        activations=seen["activations"].reshape(*hidden.shape[:2], -1),
        ffn_output=seen["ffn_output"].reshape(*hidden.shape[:2], -1),
    )


def layer_output(loaded: LoadedModel, index: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    """Run one batch through one layer, whatever its FFN is; see `run_layer`."""
    return _called(loaded, index, hidden, batch.arguments[index])


def run_partly(
    loaded: LoadedModel,
    index: int,
    batch: Batch,
    hidden: torch.Tensor,
    places: torch.Tensor,
    ffn_output: torch.Tensor,
    beginning: Beginning | None = None,
) -> PartialRun:
    """Run one batch through one layer, but its FFN for some tokens only and without the down projection.

    Args:
        hidden: (batch, length, row) that enters; with a beginning, of the places after it only, as are `places`
            and `ffn_output`.
        places: (batch, length) bool, the tokens whose activations are wanted.
        ffn_output: (batch, length, hidden size) to take as the down projection's output.
        beginning: of `run_layer`, whose first places are the same; for layers that `goes_on` is true of.
    """
    seen: dict[str, torch.Tensor] = {}

    def enter(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        # Some models flatten batch and length for their FFN, and want its output back in that shape.
        seen["entering"] = inputs[0]
        return pick(inputs[0], places)

    def put(activations: torch.Tensor) -> torch.Tensor:
        seen["activations"] = activations
        return ffn_output.reshape(seen["entering"].shape)

    handles = [module.register_forward_pre_hook(enter) for module in _entries(loaded, index)]
    try:
        with _computed_by(loaded.projection(index, "down"), put):
            output = _called(loaded, index, hidden, _arguments_after(loaded, index, batch, beginning))
    finally:
        for handle in handles:
            handle.remove()
    return PartialRun(output=output, activations=seen["activations"])


def _entries(loaded: LoadedModel, index: int) -> list[nn.Module]:
    """Modules that read what enters a layer's FFN."""
    modules: list[nn.Module] = [loaded.projection(index, role) for role in loaded.family.projections if role != "down"]
    cutoff = loaded.cutoff(index)
    return modules if cutoff is None else [*modules, cutoff]


def goes_on(batch: Batch, index: int) -> bool:
    """Whether a layer can be run for later tokens alone: it takes nothing for each token that is not known."""
    return later_arguments(batch.arguments[index], 0, batch.mask.shape[1]) is not None


def _arguments_after(loaded: LoadedModel, index: int, batch: Batch, beginning: Beginning | None) -> dict[str, Any]:
    arguments = batch.arguments[index]
    if beginning is None:
        return arguments
    later = later_arguments(arguments, beginning.num_places, batch.mask.shape[1])
    assert later is not None
    return {**later, **cache_argument(loaded.layers[index], GoOn(beginning))}


@contextmanager
def _computed_by(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let a function take the place of a module's forward: a hook could only replace what was computed in vain."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward


def _called(loaded: LoadedModel, index: int, rows: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Call a layer on (batch, length, row), and return what leaves it in the same form."""
    form = loaded.states_form
    hidden, shared = form.unpack(rows)
    output = loaded.layers[index](hidden, **arguments, **shared)
    return form.pack(output[0] if isinstance(output, tuple) else output, shared.get(SHARED))
