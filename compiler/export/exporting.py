"""Export: choose a model of a bundle, write it, and describe it."""

from dataclasses import dataclass
from pathlib import Path

from coreinfer.bundles import ConfigError
from coreinfer.bundles.model_card import ModelCard, write_card
from coreinfer.bundles.writer import disk_errors, stage_bundle

from .chosen import ChosenModel, choose_model
from .gguf_file import write_gguf
from .gguf_header import export_facts
from .hf_folder import write_hf

__all__ = ["ExportedFiles", "export_model"]

_CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class ExportedFiles:
    """What an export wrote.

    Attributes:
        title: the model's name.
        facts: name -> value, for people.
        num_bytes, padding_bytes: of weights, and of those that are zeros to fill up to the width that a format needs.
    """

    folder: Path
    title: str
    facts: dict[str, str]
    num_bytes: int
    padding_bytes: int


def export_model(
    bundle_dir: Path, output: Path, *, form: str, cluster: int | None, dense: bool, dtype: str
) -> ExportedFiles:
    """Write one of a bundle's models as an ordinary one, whole or not at all.

    Args:
        output: folder to write.
        form: "gguf" or "hf".
        cluster, dense: which model; one of the two.
        dtype: of the weights of form "hf".
    Raises:
        BundleError: there is no bundle, or the disk cannot take the export.
        ConfigError: the output exists or is no name of a folder, or the bundle does not hold the model.
        UnsupportedModelError: the form cannot express the model.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"-o {output}: exists; give a folder that does not exist yet")
    if output.suffix.lower() == ".gguf":
        raise ConfigError(
            f"-o {output}: expected a folder, which gets model.gguf and README.md, got the name of a file; "
            f"give -o {output.with_suffix('')}"
        )
    chosen = choose_model(bundle_dir, cluster=cluster, dense=dense)
    with disk_errors(output):
        if output.exists():
            output.rmdir()
        with stage_bundle(output, force=False) as stage:
            card, num_bytes, padding_bytes = _gguf(stage, chosen) if form == "gguf" else _hf(stage, chosen, dtype)
            (stage / _CARD).write_text(write_card(chosen.bundle.manifest, card), encoding="utf-8")
    return ExportedFiles(
        folder=output, title=chosen.title, facts=card.facts, num_bytes=num_bytes, padding_bytes=padding_bytes
    )


def _gguf(stage: Path, chosen: ChosenModel) -> tuple[ModelCard, int, int]:
    name = "model.gguf"
    done = write_gguf(stage / name, chosen)
    facts = {
        "architecture": done.architecture,
        "tensors": ", ".join(f"{count} {kind}" for kind, count in done.types.items()),
        **_sizes(done.num_bytes, done.padding_bytes),
        **export_facts(chosen),
    }
    usage = ("```", f"llama-cli -m {name}", "```")
    return _card(chosen, tags=("gguf",), facts=facts, usage=usage), done.num_bytes, done.padding_bytes


def _hf(stage: Path, chosen: ChosenModel, dtype: str) -> tuple[ModelCard, int, int]:
    done = write_hf(stage, chosen, dtype=dtype)
    experts = "" if chosen.experts is None else f"{len(chosen.experts[0])} experts of "
    facts = {"width": f"{experts}{done.width} neurons in each layer", "dtype": dtype}
    facts |= _sizes(done.num_bytes, done.padding_bytes)
    usage = (
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
        "```",
    )
    return _card(chosen, tags=("transformers",), facts=facts, usage=usage), done.num_bytes, done.padding_bytes


def _card(chosen: ChosenModel, *, tags: tuple[str, ...], facts: dict[str, str], usage: tuple[str, ...]) -> ModelCard:
    return ModelCard(
        title=chosen.title, tags=tags, summary=_summary(chosen), usage=usage, facts=facts, cluster=chosen.cluster
    )


def _summary(chosen: ChosenModel) -> str:
    manifest = chosen.bundle.manifest
    if chosen.cluster is None:
        return f"The model {manifest.model.name}, as a CoreInfer bundle holds it: quantized, with all of its neurons."
    cluster = manifest.clusters[chosen.cluster]
    what = "its FFN's neurons" if chosen.experts is None else "its experts"
    if manifest.narrows_experts:
        what = "the neurons of its experts"
    return (
        f"The model {manifest.model.name} with {cluster.keep_ratio:.0%} of {what}, those that text like "
        f'"{cluster.label}" needs. It is one of the {len(manifest.clusters)} cluster packs of a CoreInfer bundle; on '
        "other text it is worse than the figures below, and nothing chooses another pack."
    )


def _sizes(num_bytes: int, padding_bytes: int) -> dict[str, str]:
    zeros = f", {padding_bytes / 1e6:.1f} MB of them zeros that fill up narrower layers" if padding_bytes else ""
    return {"weights": f"{num_bytes / 1e6:.1f} MB{zeros}"}
