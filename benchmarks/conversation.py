"""One conversation over three topics: which packs serve it, what stays in the KV cache, what the first token costs.

    python benchmarks/conversation.py DIR [--max-new-tokens 200]

Every turn is one line: the path of clusters, the tokens of the prompt and those that were cached, the time to the first
token, and beside it the time to read the same prompt into an empty cache (median of 3). The conversation is held twice:
in the first round each pack is hashed when it is first used, which counts in. Then one JSON line.
"""

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from coreinfer import runtime
from coreinfer.runtime.load_options import EngineName

SYSTEM = "You are a helpful assistant. Answer in plain words, with an example where one helps."
TURNS = (
    "Here is my recipe for tomato soup. Soften a chopped onion and two cloves of garlic in a spoon of butter over "
    "low heat for ten minutes. Add a pinch of sugar, a teaspoon of salt, some thyme and a kilogram of ripe tomatoes, "
    "cut into quarters. Pour in half a litre of vegetable stock, bring it to the boil, then turn the heat down and "
    "let it simmer for twenty-five minutes with the lid on. Take the thyme out, blend the soup until it is smooth, "
    "and press it through a sieve if the skins bother you. Stir in a little cream and fresh basil, season with "
    "pepper, and serve it with toasted bread that was rubbed with garlic. And here is the bread that goes with it. "
    "Mix half a kilogram of flour, ten grams of salt, a little yeast and three hundred and fifty grams of lukewarm "
    "water, and knead the dough for ten minutes until it no longer sticks to the bowl. Cover it with a cloth and let "
    "it rise in a warm place for an hour and a half, fold it twice, shape a round loaf and let it rise once more on "
    "a floured board. Heat the oven with an iron pot inside as hot as it goes, put the loaf into the pot, cut a "
    "cross into its top, close the lid and bake it for thirty minutes; then take the lid off and bake it for fifteen "
    "minutes more, until the crust is brown. Let it cool on a rack for an hour before you cut it. How can I make the "
    "soup thicker without cream?",
    "Write a Python function that counts the words in a string and returns a dictionary.",
    "Why does the moon have phases, and how long does one cycle of the moon around the Earth last?",
)


@click.command()
@click.argument("bundle_dir", type=click.Path(path_type=Path))
@click.option("-n", "--max-new-tokens", type=int, default=200)
@click.option("--engine", "name", type=click.Choice(["native", "torch"]), default="native")
@click.option("--threads", type=int, default=None)
def main(bundle_dir: Path, max_new_tokens: int, name: EngineName, threads: int | None) -> None:
    """Hold the conversation, then read each of its prompts cold."""
    engine = runtime.load(bundle_dir, engine=name, threads=threads)
    options = runtime.GenerationOptions(max_new_tokens=max_new_tokens, mode="similarity")
    conversation = engine.conversation(SYSTEM)
    # The first call of a process is slower than the others; its tokens are no part of the conversation.
    engine.generate("Warm up.", max_new_tokens=8)
    rounds = []
    for _ in range(2):
        engine.decoder.truncate(0)
        conversation.reset()
        rounds.append([conversation.send(text, options) for text in TURNS])
    cold = [cold_seconds(engine, conversation.messages[: 2 + 2 * number]) for number in range(len(TURNS))]
    rows = [[row(*measured) for measured in zip(turns, cold, strict=True)] for turns in rounds]
    for number, found in enumerate(rows, start=1):
        for turn, measured in enumerate(found, start=1):
            click.echo(f"round {number}, turn {turn}: {line(measured)}")
    click.echo(json.dumps({"bundle": bundle_dir.name, "engine": name, "rounds": rows}))


def cold_seconds(engine: runtime.Engine, messages: list[dict[str, str]]) -> float:
    """Read a prompt into an empty cache: median of 3."""
    seconds = []
    for _ in range(3):
        engine.decoder.truncate(0)
        seconds.append(engine.generate(messages, mode="similarity", max_new_tokens=1).prefill_seconds)
    return statistics.median(seconds)


def row(turn: runtime.Generation, cold: float) -> dict[str, Any]:
    """Sum up a turn."""
    return {
        "path": [asdict(step) for step in turn.path],
        "prompt_tokens": turn.num_prompt_tokens,
        "cached_tokens": turn.num_cached_tokens,
        "first_token_seconds": turn.prefill_seconds,
        "cold_seconds": cold,
        "decode_tokens_per_second": turn.decode_tokens_per_second,
    }


def line(found: dict[str, Any]) -> str:
    """Write a turn for people."""
    first, cold = found["first_token_seconds"], found["cold_seconds"]
    steps = [f"{step['cluster']} ({step['label']}) from token {step['first_token']}" for step in found["path"]]
    return (
        f"cluster {' -> '.join(steps)}; {found['prompt_tokens']} prompt tokens, {found['cached_tokens']} cached; first "
        f"token after {first * 1e3:.0f} ms, cold {cold * 1e3:.0f} ms ({first / cold:.3f}); "
        f"{found['decode_tokens_per_second']:.1f} tok/s"
    )


if __name__ == "__main__":
    main()
