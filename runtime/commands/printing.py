"""What `coreinfer-run` prints about a generation and reads from standard input, for one answer and for a chat."""

from collections.abc import Callable

from coreinfer.bundles.errors import ConfigError
from coreinfer.runtime.generation import DiskReads, Drafting, Fallback, Token

__all__ = ["figures", "from_stdin"]

_FALLBACKS: dict[Fallback | None, str] = {
    "unfamiliar": ", unlike calibration text",
    "unsure": ", about as near to a second cluster",
}


def figures(last: Token) -> str:
    """Summarise an answer in one line, from its last token."""
    cached = f" ({last.num_cached_tokens} cached)" if last.num_cached_tokens else ""
    path = " -> ".join(f"{step.cluster} ({step.label})" for step in last.path)
    distance = f"{last.distance:.3f}{_FALLBACKS.get(last.fallback, '')}"
    return (
        f"[cluster {path}, distance {distance}, mode {last.mode}{_drafted(last.drafting)}{_share(last)}; "
        f"{last.num_prompt_tokens} prompt tokens{cached} in {last.prefill_seconds:.2f} s, "
        f"{last.num_tokens} tokens at {last.decode_tokens_per_second:.1f} tok/s{_read(last.disk_reads)}, "
        f"{last.finish_reason}]"
    )


def _drafted(drafting: Drafting | None) -> str:
    if drafting is None:
        return ""
    off = ", off where it did not pay" if drafting.turned_off else ""
    return f" ({drafting.acceptance:.0%} of drafts accepted, {drafting.mean_length:.1f} a round{off})"


def _share(last: Token) -> str:
    read = last.bytes_read
    said = "" if read is None else f"{read.mean / 1e6:.1f} MB of weights a token, 95% at most {read.p95 / 1e6:.1f}"
    if last.token_share == 1:
        return said and f", {said}"
    return f", token share {last.token_share:g}" + (said and f" ({said})")


def _read(reads: DiskReads | None) -> str:
    if reads is None:
        return ""
    num_needed = reads.num_hits + reads.num_misses
    there = f", {reads.num_hits / num_needed:.0%} of what was needed there in time" if num_needed else ""
    return f", {reads.num_bytes / 1e6:.1f} MB read from disk{there}"


def from_stdin(read: Callable[[], str]) -> str:
    """Read text.

    Raises:
        ConfigError: there are other bytes.
    """
    try:
        return read()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"standard input: expected {error.encoding} text, got other bytes ({error.reason})"
        ) from error
