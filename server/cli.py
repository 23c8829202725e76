"""`coreinfer-serve`: answer requests with bundles."""

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.command import command_errors, start_logging
from coreinfer.bundles.shared.command_options import field_options
from coreinfer.bundles.shared.extras import needs_extra
from coreinfer.runtime.engine import Engine, load_engine
from coreinfer.runtime.load_options import LoadOptions

from .server_config import KEY_VARIABLE, LOOPBACK_HOSTS, ServerConfig

__all__ = ["main"]


@click.command(context_settings={"show_default": True})
@click.argument("bundle_dirs", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@command_errors
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all addresses.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 for any free one.")
@field_options(ServerConfig, "limits", make=dict)
@field_options(LoadOptions, "loading")
@click.option("-v", "--verbose", is_flag=True, help="Log progress on stderr.")
@click.version_option(package_name="coreinfer")
def main(
    bundle_dirs: tuple[Path, ...],
    host: str,
    port: int,
    limits: dict[str, Any],
    loading: LoadOptions,
    verbose: bool,
) -> None:
    """Serve the bundle in each DIR under its folder's name: OpenAI's API at /v1, a page at /.

    If the environment variable COREINFER_API_KEY is set, clients must send that key. SIGTERM and Ctrl-C stop the server
    cleanly, with exit code 0.
    """
    start_logging(verbose=verbose)
    serving = _import_serving()
    is_loopback = host in LOOPBACK_HOSTS
    # The key is no option, because others see a command's options; and names guard a loopback address only.
    limits["api_key"] = os.environ.get(KEY_VARIABLE)
    limits["allowed_hosts"] = (*LOOPBACK_HOSTS, *limits["allowed_hosts"]) if is_loopback else ()
    config = ServerConfig(**limits)
    names = _model_names(bundle_dirs)
    if config.any_model and len(names) > 1:
        raise ConfigError(f"--any-model: expected one DIR, got {len(names)}")
    taken = serving.bind(host, port)
    if not is_loopback and config.api_key is None:
        click.echo(
            f"warning: {host} can be reached from elsewhere, and no key is asked for; set {KEY_VARIABLE}", err=True
        )
    engines = {name: load_engine(path, loading) for name, path in zip(names, bundle_dirs, strict=True)}
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{taken.getsockname()[1]}"
    serving.serve(engines, config, taken, on_start=lambda: _start(engines, address))


def _start(engines: Mapping[str, Engine], address: str) -> None:
    # To look through all that stays for the whole life of the process takes some 60 ms, in which nothing is answered.
    gc.collect()
    gc.freeze()
    click.echo(f"serving {', '.join(engines)} on {address}", err=True)
    for name, engine in engines.items():
        decoder = engine.decoder
        num_tokens = decoder.num_pages * decoder.page_tokens
        click.echo(f"{name}: the KV cache has room for {num_tokens} tokens (--kv-cache-mb)", err=True)


def _import_serving() -> ModuleType:
    """Load what the extra brings; not at the top, so that `--help` works without it.

    Raises:
        ConfigError: the extra is not installed.
    """
    with needs_extra("serving", "serve"):
        from . import serving
    return serving


def _model_names(bundle_dirs: Sequence[Path]) -> list[str]:
    """Name each bundle after its folder.

    Raises:
        ConfigError: two folders have one name.
    """
    names = [path.resolve().name for path in bundle_dirs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"DIR: a bundle is served under its folder's name, and two are called {', '.join(twice)}")
    return names
