"""Answer several prompts at once: those that decode with the same FFN weights share each read of the weights."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .decoder import Decoder, FfnChoice
from .decoding import Run, follow_drift, next_token, prepare, read_prompt, tokens
from .generation import Token
from .lossless import Row
from .options import GenerationOptions
from .requests import Loaded, Request

__all__ = ["decode_together"]

Logits = npt.NDArray[np.float32]


@dataclass(kw_only=True)
class _Member:
    """A generation of the batch, on a sequence of its own."""

    run: Run
    sequence: int
    tokens: list[Token] = field(default_factory=list)
    waits: bool = True  # its time does not run before its first pass

    @property
    def is_finished(self) -> bool:
        return bool(self.tokens) and self.tokens[-1].finish_reason is not None


def decode_together(loaded: Loaded, requests: Sequence[Request], options: GenerationOptions) -> list[list[Token]]:
    """Answer requests, each as it would be answered alone.

    Prompts are read one by one. Then those whose FFN weights are the same decode in one pass a token; other weights
    have their turn when the first prompt's generation is over. In mode lossless, where a pass verifies several tokens
    of one prompt already and the weights change all the time, prompts are answered one by one.

    Returns:
        The tokens of each request, in the order of the requests.
    Raises:
        ConfigError: the JSON schema cannot be used.
    """
    decoder = loaded.decoder
    runs = [prepare(loaded, request, options) for request in requests]
    with _sequences(decoder, len(runs)) as sequences:
        members = [_Member(run=run, sequence=number) for run, number in zip(runs, sequences, strict=True)]
        for member in members:
            _begin(decoder, member)
        while active := [member for member in members if not member.is_finished]:
            choice = active[0].run.choice
            group = [member for member in active if _same(member.run.choice, choice)]
            _decode_group(decoder, choice, group)
    return [member.tokens for member in members]


@contextmanager
def _sequences(decoder: Decoder, count: int) -> Iterator[list[int]]:
    selected, numbers = decoder.sequence, list[int]()
    try:
        for _ in range(count):
            numbers.append(decoder.add_sequence())
        yield numbers
    finally:
        decoder.select(selected)
        for number in numbers:
            decoder.drop_sequence(number)


def _begin(decoder: Decoder, member: _Member) -> None:
    """Read a prompt and choose its first token; in mode lossless all of them."""
    decoder.select(member.sequence)
    run = member.run
    # The time in which others were read is not its own.
    run.request = replace(run.request, start_seconds=time.perf_counter())
    if run.lengths is not None:
        member.tokens = list(tokens(run))
    else:
        _take(member, read_prompt(run))


def _take(member: _Member, logits: Logits) -> None:
    member.tokens.append(next_token(member.run, Row(logits=logits)))
    if not member.is_finished:
        follow_drift(member.run)


def _decode_group(decoder: Decoder, choice: FfnChoice, group: list[_Member]) -> None:
    """Decode with the same weights until a member has finished or drifted."""
    decoder.use(choice)
    for member in group:
        if member.waits:
            member.run.decode_start, member.waits = time.perf_counter(), False
    while all(not member.is_finished and _same(member.run.choice, choice) for member in group):
        for member, logits in zip(group, _forward(decoder, group), strict=True):
            _take(member, logits)


def _forward(decoder: Decoder, group: list[_Member]) -> Logits:
    token_ids = [member.tokens[-1].token_id for member in group]
    if len(group) == 1:
        decoder.select(group[0].sequence)
        return decoder.forward(token_ids, greedy=group[0].run.chooser.greedy)
    return decoder.forward_rows([member.sequence for member in group], token_ids)


def _same(a: FfnChoice, b: FfnChoice) -> bool:
    # Neuron ids are a prompt's own; as arrays they do not compare as one.
    return a is b or (a.neuron_ids is None and b.neuron_ids is None and a.cluster == b.cluster)
