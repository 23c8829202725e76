"""What packs of a mixture of experts cost at one size: whole experts, all of them narrower, or fewer and narrower ones.

    python benchmarks/expert_packs.py [--families olmoe,mixtral] [--keep 0.5]

Compiles tiny random models of the tests, as they are and with routers that hardly choose two of each layer's six
experts. Narrow packs come first, the others keep as many neurons as these do after rounding to blocks of 32; then
narrow ones of which a token reads as much as of those that have both, and last those that have both by a budget of the
bytes that a token reads of the first. Prints a Markdown table: of each kind of pack the
share of the experts' neurons that it has, the share of the dense model's bytes of them that a token reads, and KL
against the dense model on held-out text. Then one line of JSON. Random weights say what the arithmetic does, and not
what a trained model loses.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import click
from coreinfer.bundles.expert_packs import ExpertPacks
from coreinfer.bundles.token_bytes import token_bytes
from coreinfer.compiler import CompileConfig, compile_model

_MODELS = ("random", "two experts neglected")


@click.command(context_settings={"show_default": True})
@click.option("--families", default="mixtral,qwen3_moe,olmoe,granitemoe,gpt_oss", help="With commas between them.")
@click.option("--keep", type=float, default=0.5, help="Neurons that packs keep.")
@click.option("--clusters", type=int, default=2)
@click.option("--effort", type=click.Choice(["quick", "normal"]), default="normal")
def main(families: str, keep: float, clusters: int, effort: Any) -> None:
    """Compile and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = _shared_options(folder) | {"keep": keep, "clusters": clusters, "effort": effort}
        rows = [row for family in families.split(",") for row in _rows(folder, family, given)]
    click.echo("| model | family | packs | neurons kept | bytes a token | KL |\n|---|---|---|---|---|---|")
    for row in rows:
        sizes = f"{row['kept']:.2f} | {row['read']:.2f}"
        click.echo(f"| {row['model']} | {row['family']} | {row['packs']} | {sizes} | {row['kl']:.3f} |")
    click.echo(json.dumps({"results": rows}))


def _shared_options(folder: Path) -> dict[str, Any]:
    factory = _tests().model_factory
    encoder, corpus = factory.save_encoder(folder), factory.save_corpus(folder / "corpus.txt")
    return {"encoder": str(encoder), "calibration": (str(corpus),), "dtype": "float32", "quantize": "bf16"}


def _rows(folder: Path, family: str, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    tests = _tests()
    settings = tests.test_narrow_experts.wide_settings(family)
    saves: Sequence[Callable[..., Path]] = (tests.model_factory.save_model, tests.skewed_mixtures.save_skewed)
    for title, save in zip(_MODELS, saves, strict=True):
        model = save(folder / f"{family} {title}", family, **settings)
        options = {**given, "model": str(model)}
        for packs in ("narrow", *(other for other in get_args(ExpertPacks) if other != "narrow")):
            row = _row(folder / f"{family} {title} {packs}", packs, options)
            yield {"model": title, "family": family, **row}
            if packs == "narrow":
                options["keep"] = row["kept"]
                budget = {"keep": None, "budget_mb": row["token_mb"]}
        options["keep"] = row["read"]
        row = _row(folder / f"{family} {title} wide", "narrow", options)
        yield {"model": title, "family": family, **row, "packs": "narrow, as many bytes"}
        row = _row(folder / f"{family} {title} budget", "both", options | budget)
        yield {"model": title, "family": family, **row, "packs": "both, --budget-mb"}


def _row(output: Path, packs: Any, options: dict[str, Any]) -> dict[str, Any]:
    manifest = compile_model(CompileConfig(output=output, experts=packs, controls=False, **options))
    assert manifest.quality is not None
    return {
        "packs": packs,
        "kept": sum(cluster.keep_ratio for cluster in manifest.clusters) / len(manifest.clusters),
        "read": manifest.mean_pack_bytes / manifest.ffn_bytes,
        "token_mb": token_bytes(manifest).pack / 1e6,
        "kl": manifest.quality.clusters.kl,
        "layer_experts": [cluster.layer_experts for cluster in manifest.clusters],
    }


def _tests() -> Any:
    """The package of the tests, which no wheel has."""
    sys.path.append(str(Path(__file__).parents[1]))
    import tests.skewed_mixtures
    import tests.test_narrow_experts

    return tests


if __name__ == "__main__":
    main()
