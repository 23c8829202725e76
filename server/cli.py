"""`coreinfer-serve`: answer requests with bundles."""

import gc
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.command import command_errors, start_logging
from coreinfer.bundles.shared.command_options import field_options
from coreinfer.bundles.shared.extras import needs_extra
from coreinfer.bundles.shared.ray_cluster import check_ray
from coreinfer.runtime.engine import load_engine
from coreinfer.runtime.load_options import LoadOptions

from .replicas.replica_config import ReplicaConfig
from .server_config import KEY_VARIABLE, LOOPBACK_HOSTS, ServerConfig

if TYPE_CHECKING:
    from .replicas.messages import Facts

__all__ = ["main"]


@click.command(context_settings={"show_default": True})
@click.argument("bundle_dirs", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@command_errors
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all addresses.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 for any free one.")
@field_options(ServerConfig, "limits", make=dict)
@field_options(LoadOptions, "loading")
@field_options(ReplicaConfig, "replicas")
@click.option("-v", "--verbose", is_flag=True, help="Log progress on stderr.")
@click.version_option(package_name="coreinfer")
def main(
    bundle_dirs: tuple[Path, ...],
    host: str,
    port: int,
    limits: dict[str, Any],
    loading: LoadOptions,
    replicas: ReplicaConfig,
    verbose: bool,
) -> None:
    """Serve the bundle in each DIR under its folder's name: OpenAI's API at /v1, a page at /.

    If the environment variable COREINFER_API_KEY is set, clients must send that key. SIGTERM and Ctrl-C stop the server
    cleanly, with exit code 0.
    """
    start_logging(verbose=verbose)
    serving = _import_serving()
    if replicas.ray is not None:
        # Known before a bundle is read.
        check_ray("--ray")
    is_loopback = host in LOOPBACK_HOSTS
    # The key is no option, because others see a command's options; and names guard a loopback address only.
    limits["api_key"] = os.environ.get(KEY_VARIABLE)
    limits["allowed_hosts"] = (*LOOPBACK_HOSTS, *limits["allowed_hosts"]) if is_loopback else ()
    config = ServerConfig(**limits)
    names = _model_names(bundle_dirs, follow_links=replicas.ray is None)
    if config.any_model and len(names) > 1:
        raise ConfigError(f"--any-model: expected one DIR, got {len(names)}")
    taken = serving.bind(host, port)
    if not is_loopback and config.api_key is None:
        click.echo(
            f"warning: {host} can be reached from elsewhere, and no key is asked for; set {KEY_VARIABLE}", err=True
        )
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{taken.getsockname()[1]}"
    folders = dict(zip(names, bundle_dirs, strict=True))
    if replicas.ray is not None:
        _serve_replicas(folders, config, replicas, loading, taken, address)
        return
    engines = {name: load_engine(path, loading) for name, path in folders.items()}
    tokens = {name: engine.decoder.num_pages * engine.decoder.page_tokens for name, engine in engines.items()}
    serving.serve_engines(engines, config, taken, on_start=lambda: _start(tokens, address))


def _serve_replicas(
    folders: Mapping[str, Path],
    config: ServerConfig,
    replicas: ReplicaConfig,
    loading: LoadOptions,
    taken: socket.socket,
    address: str,
) -> None:
    # Not at the top: it imports Ray.
    from .replicas.front import serve_replicas

    def on_start(facts: "Mapping[str, Facts]") -> None:
        _start({name: each.num_cache_tokens for name, each in facts.items()}, address)

    serve_replicas(folders, config, replicas, loading, taken, on_start=on_start)


def _start(cache_tokens: Mapping[str, int], address: str) -> None:
    """Say what is served.

    Args:
        cache_tokens: room of each model's KV cache.
    """
    # To look through all that stays for the whole life of the process takes some 60 ms, in which nothing is answered.
    gc.collect()
    gc.freeze()
    click.echo(f"serving {', '.join(cache_tokens)} on {address}", err=True)
    for name, num_tokens in cache_tokens.items():
        click.echo(f"{name}: the KV cache has room for {num_tokens} tokens (--kv-cache-mb)", err=True)


def _import_serving() -> ModuleType:
    """Load what the extra brings; not at the top, so that `--help` works without it.

    Raises:
        ConfigError: the extra is not installed.
    """
    with needs_extra("serving", "serve"):
        from . import serving
    return serving


def _model_names(bundle_dirs: Sequence[Path], *, follow_links: bool) -> list[str]:
    """Name each bundle after its folder.

    Args:
        follow_links: name it after the folder that a link points to, which is another one after an exchange.
    Raises:
        ConfigError: two folders have one name.
    """
    names = [(path.resolve() if follow_links else path.absolute()).name for path in bundle_dirs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"DIR: a bundle is served under its folder's name, and two are called {', '.join(twice)}")
    return names
