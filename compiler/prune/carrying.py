"""One place's text on its way through the dense model and the narrow ones, as far as these are made."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from coreinfer.compiler.models.layerwise import pick
from coreinfer.compiler.models.load import LoadedModel
from coreinfer.compiler.quantize.rounding import Rounding
from coreinfer.compiler.team.passage import WALK
from coreinfer.compiler.team.team import Shared, Worker

from .candidates import Ids, cut_to_candidates, positions_in
from .dealt import LayerTokens, PlaceText, Seen, own_rows
from .layer_results import LayerResult
from .narrow import from_bits
from .streams import Stream, begin_stream, begin_text, move, read_dense, read_narrow

__all__ = ["Found", "Journey", "find_carried"]

Found = Mapping[str, LayerResult]
"""Assignment name -> one layer's result."""


@dataclass(frozen=True, kw_only=True)
class Journey:
    """What places need to bring their text to any layer, from wherever they are.

    Attributes:
        key: no other run of text through the layers has it.
        results: layer -> its results, of all layers before the one that is narrowed.
        first: the first layer that leaves anything out.
        candidates: of each layer, the neurons that may stay, ascending; None where all may.
        rounding: see `NarrowInputs`.
    """

    key: str
    results: Callable[[int], Found]
    first: int
    candidates: Sequence[Ids | None]
    rounding: Rounding | None


def find_carried(
    worker: Worker,
    text: Shared[PlaceText],
    journey: Shared[Journey],
    layer: int,
    number: int,
    found: Mapping[str, Shared[LayerResult]],
) -> Seen:
    """What the repair of one assignment, the n-th, reads of a layer.

    Args:
        found: this layer's results of the assignments before.
    """
    own, plan = text.value(), journey.value()
    begin = partial(_Carried, worker, own, plan)
    carried = worker.recall(WALK, plan.key, begin)
    if carried.place > (layer, number):
        worker.forget(WALK)
        carried = worker.recall(WALK, plan.key, begin)
    tokens = carried.to(layer, number, lambda name: found[name].value())
    return Seen(tokens=tokens, rows=own_rows(worker, own, [*own.labels][number]))


class _Carried:
    """Hidden states of all streams between two layers, and the tokens of the stream that was read last."""

    def __init__(self, worker: Worker, text: PlaceText, journey: Journey) -> None:
        self._loaded, self._journey = worker.loaded, journey
        with torch.inference_mode():
            self._text = begin_text(worker.loaded, text.passage.value().documents)
            self._streams = [begin_stream(name, own_rows(worker, text, name), self._text) for name in text.labels]
        self._tokens = self._text.empty_tokens(worker.loaded, 0)
        self._layer = self._number = -1

    @property
    def place(self) -> tuple[int, int]:
        """Layer, and number of the stream whose tokens are there."""
        return self._layer, self._number

    @torch.inference_mode()
    def to(self, layer: int, number: int, result: Callable[[str], LayerResult]) -> LayerTokens:
        """Go on to a layer, and in it to a stream.

        Args:
            result: assignment name -> its result in this layer, of the streams before.
        """
        while self._layer < layer:
            if self._layer >= 0:
                self._leave(self._journey.results(self._layer))
            self._enter()
        self._read_up_to(number, result)
        return self._tokens

    def _enter(self) -> None:
        self._layer, self._number = self._layer + 1, -1
        candidates = self._candidates
        ids = None if candidates is None else torch.from_numpy(candidates).long().to(self._loaded.device)
        # First the room of the layer before goes.
        self._tokens = self._text.empty_tokens(self._loaded, 0)
        num_neurons = self._loaded.record.ffn_dim if candidates is None else len(candidates)
        self._tokens = self._text.empty_tokens(self._loaded, num_neurons)
        # Narrow runs through rounded weights have keys and values of their own.
        begins = self._is_narrow and self._journey.rounding is None
        self._readings = [
            read_dense(self._loaded, self._layer, part, self._tokens, ids, begins=begins) for part in self._text.parts
        ]

    @property
    def _candidates(self) -> Ids | None:
        return self._journey.candidates[self._layer]

    @property
    def _is_narrow(self) -> bool:
        return self._layer >= self._journey.first

    def _leave(self, results: Found) -> None:
        if self._is_narrow:
            self._read_up_to(len(self._streams) - 1, results.__getitem__)
            self._move(results.__getitem__)
            return
        for stream in self._streams:
            stream.hidden = [pick(part.batch.hidden, part.places) for part in self._text.parts]

    def _read_up_to(self, number: int, result: Callable[[str], LayerResult]) -> None:
        while self._number < number:
            if self._number >= 0:
                self._move(result)
            self._number += 1
            self._runs = self._read(self._streams[self._number])

    def _read(self, stream: Stream) -> list[torch.Tensor]:
        with self._rounded(), cut_to_candidates(self._loaded, self._layer, self._candidates):
            return [
                read_narrow(self._loaded, self._layer, part, reading, own, self._tokens)
                for part, reading, own in zip(self._text.parts, self._readings, stream.hidden, strict=True)
            ]

    def _move(self, result: Callable[[str], LayerResult]) -> None:
        """Move the stream that was read past the layer."""
        stream = self._streams[self._number]
        with self._rounded():
            outputs = self._narrow_outputs(stream, result(stream.name))
            stream.hidden = [
                move(self._loaded, self._layer, part, reading, own, run, outputs)
                for part, reading, own, run in zip(
                    self._text.parts, self._readings, stream.hidden, self._runs, strict=True
                )
            ]

    def _rounded(self) -> AbstractContextManager[None]:
        rounding = self._journey.rounding
        return rounding.layer(self._loaded, self._layer) if rounding else nullcontext()

    def _narrow_outputs(self, stream: Stream, result: LayerResult) -> torch.Tensor:
        """What the narrow FFN puts out: (tokens, hidden size), of which only what is read narrow is filled in."""
        tokens, rounding = self._tokens, self._journey.rounding
        # Each stream sets its own targets where they are what is missing from the sum: their memory is free by now.
        outputs = tokens.targets if self._loaded.family.adds_ffn_output else torch.empty_like(tokens.targets)
        for cluster, rows in enumerate(stream.rows.narrow):
            ids = torch.from_numpy(result.neuron_ids[cluster]).long().to(outputs.device)
            down, bias = _down(self._loaded, self._layer, result, cluster, ids)
            if rounding:
                down = rounding.down(self._loaded, self._layer, down, result.neuron_ids[cluster])
            places = torch.from_numpy(positions_in(self._candidates, result.neuron_ids[cluster])).long()
            kept = tokens.activations.index_select(0, rows).index_select(1, places.to(outputs.device))
            product = kept.to(down.dtype) @ down
            outputs.index_copy_(0, rows, (product if bias is None else product + bias).to(outputs.dtype))
        return outputs


def _down(
    loaded: LoadedModel, layer: int, result: LayerResult, cluster: int, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A cluster's down projection, transposed, and its bias; both in the dtype that the model computes in."""
    module = loaded.projection(layer, "down")
    down: torch.Tensor = module.weight.T[ids].to(loaded.device, loaded.dtype)
    bias: torch.Tensor | None = None if module.bias is None else module.bias.to(loaded.device, loaded.dtype)
    if (bits := result.down(cluster)) is not None:
        down = from_bits(bits).to(loaded.device, loaded.dtype)
    if (repaired := result.bias(cluster)) is not None:
        bias = torch.from_numpy(repaired).to(loaded.device, loaded.dtype)
    return down, bias
