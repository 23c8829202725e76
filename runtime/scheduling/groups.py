"""Decoding: runs with the same FFN weights share each read of them."""

import time
from collections.abc import Iterable, Sequence

from coreinfer.runtime.engines.protocol import DENSE, Decoder, FfnChoice

from .ffn_switch import FfnSwitch, same_weights
from .posting import post_token
from .prefill import Block, read_beside
from .run import Logits, Run
from .speculative import draft_round

__all__ = ["Group", "decode_alone", "decode_beside", "decode_group", "draft_alone", "group_by_weights", "post_rows"]

Group = tuple[FfnChoice, list[Run]]


def group_by_weights(runs: Iterable[Run]) -> list[Group]:
    """Group runs whose next token uses the same weights."""
    groups: list[Group] = []
    for run in runs:
        choice = run.choice if run.lengths is None else DENSE
        if not groups:
            groups.append((choice, [run]))
            continue
        found = next((group for known, group in groups if same_weights(known, choice)), None)
        if found is None:
            groups.append((choice, [run]))
        else:
            found.append(run)
    return groups


def decode_group(decoder: Decoder, switch: FfnSwitch, group: Group) -> Logits:
    """Run the last token of each run through the weights of a group, in one pass: (runs, vocab)."""
    choice, runs = group
    switch.use(choice)
    begin = time.perf_counter()
    _start_clocks(runs, begin)
    if len(runs) > 1:
        rows, last_ids = [_number(run) for run in runs], [run.token_ids[-1] for run in runs]
        greedy = all(run.chooser.greedy for run in runs)
        logits = decoder.forward_rows(rows, last_ids, greedy=greedy)
        _note_bytes(decoder, runs, choice, greedy=greedy, alone=False)
    else:
        logits = decode_alone(decoder, runs[0])
    _note_plain(runs, time.perf_counter() - begin if len(runs) == 1 else None)
    return logits


def decode_alone(decoder: Decoder, run: Run) -> Logits:
    """Run a run's last token through the weights in use: (1, vocab)."""
    if decoder.sequence != (number := _number(run)):
        decoder.select(number)
    logits = decoder.forward(run.token_ids[-1:], greedy=run.chooser.greedy)
    if run.lengths is None:
        _note_bytes(decoder, [run], run.choice, greedy=run.chooser.greedy, alone=True)
    return logits


def decode_beside(decoder: Decoder, switch: FfnSwitch, group: Group, block: Block) -> tuple[Logits | None, Logits]:
    """`decode_group` and `read_beside` in one pass: logits of the prompt's end, if it was read, and (runs, vocab)."""
    choice, runs = group
    switch.use(choice, anew=True)
    _start_clocks(runs, time.perf_counter())
    rows = [_number(run) for run in runs]
    greedy = all(run.chooser.greedy for run in (block.run, *runs))
    result = read_beside(block, decoder, rows, [run.token_ids[-1] for run in runs], greedy=greedy)
    _note_plain(runs, None)
    _note_bytes(decoder, runs, choice, greedy=greedy, alone=False)
    return result


def _note_bytes(decoder: Decoder, runs: Sequence[Run], choice: FfnChoice, *, greedy: bool, alone: bool) -> None:
    """Note what the pass of some tokens read, where it is not always the same."""
    if choice.token_share == 1 and not decoder.skips_neurons:
        return
    num_bytes = decoder.weight_bytes(greedy=greedy, alone=alone)
    if num_bytes is not None:
        for run in runs:
            # What verifies drafts reads several tokens at once.
            if run.lengths is None:
                run.weight_bytes.append(num_bytes)


def _note_plain(runs: Sequence[Run], seconds: float | None) -> None:
    for run in runs:
        run.num_to_draft = None
        if run.lengths is not None:
            # What a token takes in company says nothing of what drafting saves alone.
            run.lengths.note_plain(seconds)


def draft_alone(decoder: Decoder, switch: FfnSwitch, run: Run, length: int) -> None:
    """Draft and verify for a run in mode lossless; tokens are then chosen from its rows."""
    assert run.lengths is not None
    _start_clocks([run], time.perf_counter())
    decoder.select(_number(run))
    rows = draft_round(
        decoder,
        switch,
        run.token_ids[-1],
        length=length,
        pack=run.choice,
        propose=run.chooser.propose,
        lengths=run.lengths,
        greedy=run.chooser.greedy,
    )
    run.rows.extend(rows)


def post_rows(decoder: Decoder, run: Run) -> None:
    """Choose from verified rows as long as drafts are accepted and tokens are wanted."""
    while run.rows and run.wants:
        row = run.rows.popleft()
        token_id = post_token(run, row)
        if run.finished or row.draft is None or token_id != row.draft.token_id:
            run.rows.clear()
            decoder.select(_number(run))
            decoder.truncate(len(run.request.token_ids) + len(run.token_ids) - 1)


def _start_clocks(runs: Sequence[Run], seconds: float) -> None:
    for run in runs:
        if len(run.token_ids) == 1:
            # The time in which others were read is not its own.
            run.decode_start = seconds


def _number(run: Run) -> int:
    assert run.sequence is not None
    return run.sequence
