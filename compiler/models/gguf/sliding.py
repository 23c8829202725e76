"""Which layers slide, as a GGUF file states it."""

from .keys import HeaderKeys

__all__ = ["layer_types", "sliding_layers", "sliding_window"]


def sliding_window(keys: HeaderKeys) -> int:
    """Read how many positions a layer that slides sees; 0 where no layer does."""
    if not keys.number("attention.sliding_window"):
        return 0
    return keys.size("attention.sliding_window")


def sliding_layers(keys: HeaderKeys, num_layers: int, usual: int) -> list[bool]:
    """Read which layers slide: a flag for each, or all but every so many.

    Args:
        usual: the pattern of a file that states none.
    """
    pattern = keys.value("attention.sliding_window_pattern")
    if pattern is None:
        pattern = usual
    if isinstance(pattern, list):
        if len(pattern) != num_layers:
            raise keys.refused("attention.sliding_window_pattern", f"expected {num_layers} flags, got {len(pattern)}")
        return [bool(slides) for slides in pattern]
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 1:
        raise keys.unsupported("attention.sliding_window_pattern")
    return [(layer + 1) % pattern != 0 for layer in range(num_layers)]


def layer_types(sliding: list[bool]) -> list[str]:
    """Return transformers' names of what layers attend to."""
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]
