"""The control of token shares: a bundle as it is, but with equal shares of all layers and groups in its plan.

`python benchmarks/equal_shares.py DIR OUT`, then `coreinfer-eval DIR OUT --token-share 0.64` on the same files.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.manifest import read_manifest
from coreinfer.bundles.shared.command import command_errors
from coreinfer.bundles.tensors import StoredTensor, TensorFile, write_tensors
from coreinfer.bundles.writer import finish_manifest, stage_bundle


@click.command()
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@command_errors
def main(bundle_dir: Path, output: Path) -> None:
    """Write the control of DIR to OUT."""
    manifest = read_manifest(bundle_dir)
    if manifest.token_shares is None:
        raise ConfigError(f"{bundle_dir}: expected a bundle with token shares; compile it with --token-share")
    with stage_bundle(output, force=False) as stage:
        shutil.copytree(bundle_dir, stage, dirs_exist_ok=True)
        file = TensorFile(bundle_dir / LAYOUT.token_shares)
        targets = file["targets"].array
        plan = np.empty_like(file["plan"].array)
        plan[...] = targets[:, None, None]
        tensors = {**file, "plan": StoredTensor("F32", plan)}
        write_tensors(stage / LAYOUT.token_shares, tensors)
        finish_manifest(stage, replace(manifest, files={}))


if __name__ == "__main__":
    main()
