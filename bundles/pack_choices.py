"""What `--packs auto` chose of a cluster, and why, in words."""

from .quality_records import PackChoice, TriedWeights

__all__ = ["choice_in_words"]


def choice_in_words(choice: PackChoice) -> str:
    """Say what a cluster became, and what the other choice would read."""
    thin = f"thin {_numbers(choice.thin)}"
    if choice.own is not None:
        own = f"own weights, keep {choice.own.keep:g}, {_numbers(choice.own)}"
        said = f"{thin}, no more than {own}" if choice.is_thin else f"{own}, less than {thin}"
    elif choice.tried_keeps:
        tried = ", ".join(f"{keep:g}" for keep in choice.tried_keeps)
        said = f"{thin}; own weights lose more than asked for (keep {tried})"
    else:
        said = f"{thin}; too little held-out text says what own weights would lose"
    together = "" if choice.judged_by == f"cluster {choice.cluster}" else f" (judged with {choice.judged_by})"
    return f"{said}{together}"


def _numbers(tried: TriedWeights) -> str:
    return f"{tried.token_bytes / 1e6:.2f} MB a token, share {tried.share:.3f}, KL {tried.kl:.3f}"
