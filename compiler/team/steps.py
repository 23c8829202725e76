"""Steps of a stage that are done within a task."""

from coreinfer.compiler.progress import Advance, ignore_steps

__all__ = ["Steps"]


class Steps:
    """Counts steps where a task runs; what is not seen from there is reported when the task is done."""

    def __init__(self, advance: Advance = ignore_steps) -> None:
        self._advance, self._num_done = advance, 0

    def __call__(self, steps: int = 1) -> None:
        """Advance."""
        self._num_done += steps
        self._advance(steps)

    def reach(self, num_steps: int) -> None:
        """Report what is left of so many steps."""
        if num_steps > self._num_done:
            self(num_steps - self._num_done)

    def __reduce__(self) -> tuple[type["Steps"], tuple[()]]:
        """In another process nobody sees them."""
        return Steps, ()
