"""Which FFN weights the decoder runs with: they change only where the next call needs others."""

from coreinfer.runtime.engines.protocol import Decoder, FfnChoice

__all__ = ["FfnSwitch", "same_weights"]


class FfnSwitch:
    """Remembers the weights in use."""

    def __init__(self, decoder: Decoder) -> None:
        """Begin without knowing what is in use."""
        self._decoder = decoder
        self._in_use: FfnChoice | None = None

    def use(self, choice: FfnChoice, *, anew: bool = False) -> None:
        """Run with these weights from the next call on.

        Args:
            anew: set them even if they seem to be in use already: other code may have changed them since.
        """
        if choice is self._in_use and not anew:
            return
        if anew or self._in_use is None or not same_weights(self._in_use, choice):
            # Unknown while it changes, and if it fails.
            self._in_use = None
            self._decoder.use(choice)
            self._in_use = choice


def same_weights(a: FfnChoice, b: FfnChoice) -> bool:
    """Whether two choices are the same weights."""
    return a.is_same(b)
