"""`coreinfer-export`: write one of a bundle's models as an ordinary model."""

import json
from pathlib import Path

import click
from coreinfer.bundles import ConfigError
from coreinfer.bundles.shared.command import command_errors, start_logging
from coreinfer.bundles.shared.extras import needs_extra
from coreinfer.bundles.shared.signals import signals_held

__all__ = ["main"]


@click.command(context_settings={"show_default": True})
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    type=click.Choice(["gguf", "hf"]),
    required=True,
    help="gguf: one file for llama.cpp, with the bundle's own rounding; hf: a folder for transformers, in floats.",
)
@click.option("--cluster", type=int, default=None, help="Export this cluster's pack.  [default: none]")
@click.option("--dense", is_flag=True, help="Export the dense model instead.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default=None,
    help="Of the weights with --to hf.  [default: bfloat16]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Log progress on stderr.")
@click.version_option(package_name="coreinfer")
@command_errors
def main(
    bundle_dir: Path,
    form: str,
    cluster: int | None,
    dense: bool,
    output: Path,
    dtype: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write a cluster's pack, or the dense model, of the bundle in DIR as an ordinary model.

    The folder also gets a model card, README.md; tokenizer, chat template and stop tokens are part of the export.
    """
    start_logging(verbose=verbose)
    if dtype is not None and form != "hf":
        raise ConfigError(f"--dtype {dtype}: --to {form} keeps the bundle's own rounding; leave it out, or use --to hf")
    with needs_extra("exporting", "compile"), signals_held():
        from .exporting import export_model
    done = export_model(bundle_dir, output, form=form, cluster=cluster, dense=dense, dtype=dtype or "bfloat16")
    if as_json:
        sizes = {"num_bytes": done.num_bytes, "padding_bytes": done.padding_bytes}
        click.echo(json.dumps({"folder": str(done.folder), "title": done.title, **sizes, "facts": done.facts}))
        return
    click.echo(f"exported   {done.title}, to {done.folder}")
    for name, value in done.facts.items():
        click.echo(f"{name:10s} {value}")
