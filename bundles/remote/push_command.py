"""`coreinfer-push`: upload a bundle to the Hugging Face Hub."""

import json
from dataclasses import asdict
from pathlib import Path

import click
from coreinfer.bundles.shared.command import command_errors, start_logging

from .places import hub_place
from .push import push_bundle

__all__ = ["main"]


@click.command(context_settings={"show_default": True})
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("target", metavar="hf:USER/NAME")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--message", default=None, help="Message of the commit.  [default: names the model]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Log progress on stderr.")
@click.version_option(package_name="coreinfer")
@command_errors
def main(bundle_dir: Path, target: str, private: bool, message: str | None, as_json: bool, verbose: bool) -> None:
    """Upload the bundle in DIR to a repository of the Hub, with a model card.

    Every file is checked first. hf:USER/NAME@BRANCH uploads to a branch. The token is HF_TOKEN, or that of `hf auth
    login`. Labels and typical sentences of the clusters go along: with a private corpus, make the repository private.
    """
    start_logging(verbose=verbose)
    place = hub_place(target)
    done = push_bundle(bundle_dir, place, private=private, message=message)
    if as_json:
        click.echo(json.dumps({"place": str(place), **asdict(done)}))
    else:
        click.echo(
            f"pushed {done.num_files} files, {done.num_bytes / 1e6:.1f} MB, to {place}, commit {done.commit[:12]}"
        )
