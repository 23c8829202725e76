"""The loop of all generations: admit, read a block of a prompt, decode a token of each that runs, post them."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from coreinfer.bundles.errors import CoreInferError, GenerationCancelled
from coreinfer.runtime.engines.protocol import Decoder, FfnChoice, KvPoolFull

from .ffn_switch import FfnSwitch, same_weights
from .groups import decode_alone, decode_beside, decode_group, draft_alone, group_by_weights, post_rows
from .kv_pool import KvPool
from .posting import post_token
from .prefill import Block, begin, block_beside, read_block, reader
from .run import Logits, Row, Run
from .turns import Pace, Turns

__all__ = ["MAX_PARALLEL", "Scheduler"]

T = TypeVar("T")

MAX_PARALLEL = 64
# After this many blocks the prompt that came first is read, so that a long one does not wait for ever.
_OLDEST_EVERY = 4


class Scheduler:
    """Steps all runs of one decoder. Only one thread at a time may call it; `add` may be called by any thread.

    Attributes:
        max_parallel: maximum number of runs that are read and decoded at once; others wait.
        on_pass: called with the number of runs that a pass decodes.
        on_posted: called after the tokens of a prompt's end, and those of a step, were posted.
        clock: returns seconds; used to make blocks take about as long as a step.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Begin without runs."""
        self.max_parallel = MAX_PARALLEL
        self.on_pass: Callable[[int], object] | None = None
        self.on_posted: Callable[[], object] | None = None
        self.clock = time.perf_counter
        self.decoder, self.pool = decoder, KvPool(decoder)
        self._switch = FfnSwitch(decoder)
        self._turns = Turns(cheap_swaps=decoder.cheap_swaps)
        self._pace = Pace()
        self._arrived: deque[Run] = deque()
        self._waiting: deque[Run] = deque()
        self._active: list[Run] = []  # in the order in which they came
        self._num_blocks = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._arrived) or any(run.wants or run.is_over for run in (*self._waiting, *self._active))

    @property
    def runs(self) -> Sequence[Run]:
        """Runs that are read or decoded, in order of arrival."""
        return tuple(self._active)

    @property
    def num_waiting(self) -> int:
        """Number of runs that wait."""
        return len(self._arrived) + len(self._waiting)

    @property
    def num_active(self) -> int:
        """Runs that are read or decoded."""
        return len(self._active)

    def add(self, run: Run) -> None:
        """Take a run from any thread; the next step admits it, or a later one."""
        self._arrived.append(run)

    def step(self) -> None:
        """Admit runs, read one block of one prompt, decode a token of each run that may have one, and post them."""
        try:
            if (alone := self._decodes_alone) is not None:
                self._step_alone(alone)
            else:
                self._step_all()
        finally:
            self._note_posted()

    @property
    def _decodes_alone(self) -> Run | None:
        """The only run that is there, if all that it needs is its next token."""
        if len(self._active) != 1 or self._arrived or self._waiting:
            return None
        run = self._active[0]
        # The first step after a prompt starts the run's clock.
        return run if len(run.token_ids) > 1 and run.lengths is None and run.is_read and run.wants else None

    def _step_alone(self, run: Run) -> None:
        """Do what `_step_all` would, without looking for others.

        A token's weights have just passed through the caches, so that each function that is called comes from memory.
        """
        runs, begun = [run], self.clock()
        logits = self._pass(runs, self._forward_alone)
        if logits is not None:
            if self.on_pass is not None:
                self.on_pass(1)
            self._call(runs, partial(post_token, run, Row(logits=logits[0])))
        self._pace.note_step(1, self.clock() - begun)
        if run.is_over:
            self.sweep()
        else:
            self._select_first()

    def _forward_alone(self, runs: list[Run]) -> Logits:
        (run,) = runs
        self._switch.use(run.choice)
        return decode_alone(self.decoder, run)

    def _step_all(self) -> None:
        for run in (*self._waiting, *self._active):
            run.check_cancelled()
        self.sweep()
        self._admit()
        reading = self._next_reading()
        has_read = isinstance(reading, Run) and self._read(reading)
        self._decode(reading if isinstance(reading, Block) else None, has_read=has_read)
        self.sweep()

    def sweep(self) -> None:
        """Free what finished runs hold."""
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        for run in tuple(self._active):
            if run.is_over:
                self._free(run)
                self._active.remove(run)
        if self._waiting and any(run.is_over for run in self._waiting):
            self._waiting = deque(run for run in self._waiting if not run.is_over)
        self._select_first()

    def _select_first(self) -> None:
        if self.decoder.sequence != 0:
            # Whoever uses the decoder without a scheduler expects it so.
            self.decoder.select(0)

    def _free(self, run: Run) -> None:
        if run.sequence is None:
            return
        if run.failure is not None and not isinstance(run.failure, GenerationCancelled):
            # A call that failed may have left some layers' caches longer than others.
            self.pool.drop(run.sequence)
        else:
            self.pool.leave(run.sequence, run.num_read + max(len(run.token_ids) - 1, 0))
        run.sequence = None
        run.rows.clear()

    def _admit(self) -> None:
        if not self._waiting:
            return
        # Who does not ask for tokens takes no place.
        num_free = self.max_parallel - sum(run.wants for run in self._active)
        while self._waiting and num_free > 0:
            self._active.append(self._waiting.popleft())
            num_free -= 1

    # Reading

    @property
    def _unread(self) -> list[Run]:
        # Who gave way while nobody asked for its tokens is read again when somebody does.
        return [run for run in self._active if run.wants and not run.is_read]

    @property
    def _others_decode(self) -> bool:
        return any(run.watched for run in self._running)

    def _next_reading(self) -> Run | Block | None:
        """Choose what is read in this step: a block in the pass that decodes others, or a run's by itself."""
        unread = self._unread
        if not unread:
            return None
        others_decode = self._others_decode
        if others_decode and not self._pace.may_read:
            return None
        run = self._next_to_read(unread)
        if run is None or not others_decode or not self._shares_pass(run):
            return run
        num_running = len(self._running)
        if not self._pace.may_read_beside(num_running):
            return None
        limit = self._pace.block_tokens(num_running, beside=True, num_waiting=len(unread))
        return block_beside(run, self.decoder, limit) or run

    def _shares_pass(self, run: Run) -> bool:
        choice = reader(run)
        return any(other.lengths is None and same_weights(other.choice, choice) for other in self._running)

    def _read(self, run: Run) -> bool:
        """Read a block of a prompt; whether some of the prompt was read."""
        others_decode, limit = self._others_decode, None
        if others_decode:
            limit = self._pace.block_tokens(len(self._running), beside=False, num_waiting=len(self._unread))
        num_left, begun = run.num_left, self.clock()
        logits = self._pass([run], lambda _: read_block(run, self.decoder, self._switch, limit))
        if (num_read := num_left - run.num_left) > 0:
            self._pace.note_block(num_read, self.clock() - begun, others_decode=others_decode)
        if logits is not None:
            self._post([run], [logits])
            self._note_posted()
        # Where there was no room, others go on decoding until there is.
        return num_read > 0

    def _next_to_read(self, unread: list[Run]) -> Run | None:
        """Choose the prompt with the fewest tokens left, and now and then the one that came first."""
        if not unread:
            return None
        oldest = unread[0]
        if not self._has_begun(oldest):
            # It waits for room, which whoever came later must not take.
            unread = [run for run in unread if run.sequence is not None]
        self._num_blocks += 1
        if self._num_blocks % _OLDEST_EVERY == 0 and oldest in unread:
            return oldest
        return next((run for run in sorted(unread, key=lambda run: run.num_left) if self._has_begun(run)), None)

    def _has_begun(self, run: Run) -> bool:
        """Have a run begin if it has not and there is room; whether it has."""
        while run.sequence is None and not run.is_over:
            if not self._call([run], lambda: begin(run, self.decoder, self.pool)) and not self._pauses_end():
                return False
        return run.sequence is not None

    def _pauses_end(self) -> bool:
        """Take the room of a run of which nobody asks for tokens, unless others will make room."""
        holders = [run for run in self._active if run.sequence is not None]
        if not holders or any(run.wants for run in holders):
            return False
        self._interrupt(holders[-1])
        return True

    # Decoding

    @property
    def _running(self) -> list[Run]:
        return [run for run in self._active if run.is_read and run.wants]

    def _decode(self, block: Block | None, *, has_read: bool) -> None:
        running = self._running
        if not running or (has_read and self._unread and not any(run.watched for run in running)):
            # Where nobody follows the tokens, more share a pass when all prompts are read that can be.
            return
        begun, num_read = self.clock(), 0
        together = [run for run in running if run.lengths is None or not self._draft(run)]
        for choice, runs in self._turns.pick(group_by_weights(together)):
            if block is not None and not num_read and same_weights(choice, reader(block.run)):
                num_read = self._decode_beside(choice, runs, block)
            else:
                self._decode_group(choice, runs)
        seconds = self.clock() - begun
        if num_read:
            self._pace.note_beside(len(running), num_read, seconds)
        else:
            self._pace.note_step(len(running), seconds)

    def _decode_group(self, choice: FfnChoice, runs: list[Run]) -> None:
        # Those that gave way to others are out of it.
        runs = [run for run in runs if run.is_read]
        rows = self._pass(runs, lambda left: decode_group(self.decoder, self._switch, (choice, left)))
        if rows is not None:
            self._post_pass(runs, rows)

    def _decode_beside(self, choice: FfnChoice, runs: list[Run], block: Block) -> int:
        """Decode runs and read a block in one pass; returns the number of tokens read."""
        reading, both = block.run, [run for run in (*runs, block.run) if run.sequence is not None]

        def decode(left: list[Run]) -> tuple[Logits | None, Logits] | None:
            # Without either, the other has a pass of its own.
            if reading not in left or len(left) < 2:
                return None
            return decode_beside(
                self.decoder, self._switch, (choice, [run for run in left if run is not reading]), block
            )

        result = self._pass(both, decode)
        if result is None:
            self._decode_group(choice, [run for run in both if run is not reading and not run.is_over])
            return 0
        both.remove(reading)
        first, rows = result
        self._post_pass(both, rows)
        if first is not None:
            self._post([reading], [first])
        return len(block.token_ids)

    def _post_pass(self, runs: list[Run], rows: Logits) -> None:
        if self.on_pass is not None:
            self.on_pass(len(runs))
        self._post(runs, rows)

    def _draft(self, run: Run) -> bool:
        """Decode a run by drafts, if it is in mode lossless and drafting is faster now."""
        if not run.is_read:
            return True
        assert run.lengths is not None
        if not run.rows:
            if run.num_to_draft is None:
                # A round gives one token more than are accepted.
                run.num_to_draft = run.lengths.next(run.max_tokens - len(run.token_ids) - 1)
            if (length := run.num_to_draft) < 1:
                return False
            if not self._has_room_to_draft(run, length):
                return True
            run.num_to_draft = None
            self._call([run], lambda: draft_alone(self.decoder, self._switch, run, length))
        self._call([run], lambda: post_rows(self.decoder, run))
        return True

    def _has_room_to_draft(self, run: Run, length: int) -> bool:
        """Make room for a whole round: half of one could not be taken back. False if the run itself gave way."""
        num_cached = run.num_read + len(run.token_ids) - 1
        while not self.pool.make_room(num_cached, length + 1) and self._give_way():
            if run.sequence is None:
                return False
        return True

    def _post(self, runs: Sequence[Run], rows: Sequence[Logits] | Logits) -> None:
        for run, logits in zip(runs, rows, strict=True):
            self._call([run], partial(post_token, run, Row(logits=logits)))

    def _note_posted(self) -> None:
        if self.on_posted is not None:
            self.on_posted()

    # Calls that fail

    def _pass(self, runs: list[Run], call: Callable[[list[Run]], T]) -> T | None:
        """Do something for runs that takes pages; runs that must give way leave the list."""
        while runs:
            try:
                return call(runs)
            except KvPoolFull as error:
                if not self._give_way():
                    self._fail(runs, error)
                    return None
                runs[:] = [run for run in runs if run.sequence is not None]
            except Exception as error:
                self._fail(runs, error)
                return None
            except BaseException:
                self._fail(runs, _interrupted())
                raise
        return None

    def _give_way(self) -> bool:
        """Free pages: what finished runs left, else what a run has, which is read again later.

        It is the youngest of those whose tokens nobody asks for, else of all.
        """
        if self.pool.evict():
            return True
        holders = [run for run in self._active if run.sequence is not None]
        if len(holders) < 2:
            # Its tokens do not fit even alone.
            return False
        self._interrupt(next((run for run in reversed(holders) if not run.wants), holders[-1]))
        return True

    def _interrupt(self, run: Run) -> None:
        assert run.sequence is not None
        self.pool.drop(run.sequence)
        run.sequence, run.num_read = None, 0

    def _call(self, runs: Sequence[Run], call: Callable[[], T]) -> T | None:
        """Do something for runs; if it fails, only these runs fail."""
        try:
            return call()
        except Exception as error:
            self._fail(runs, error)
        except BaseException:
            self._fail(runs, _interrupted())
            raise
        return None

    def _fail(self, runs: Sequence[Run], error: Exception) -> None:
        for run in runs:
            run.fail(error)


def _interrupted() -> CoreInferError:
    return CoreInferError("interrupted together with the thread that decoded for this generation as well")
