"""`coreinfer-serve`: answer requests with bundles."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import click
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.command import command_errors, start_logging
from coreinfer.bundles.shared.extras import needs_extra
from coreinfer.runtime.commands.load_options import LoadOptions, load_options
from coreinfer.runtime.engine import Engine

from .server_config import LOOPBACK_HOSTS, ServerConfig

__all__ = ["main"]

_KEY = "COREINFER_API_KEY"


@click.command(context_settings={"show_default": True})
@click.argument("bundle_dirs", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all addresses.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 for any free one.")
@click.option("--parallel", type=int, default=8, help="Number of requests that each bundle answers at once.")
@click.option(
    "--queue", type=int, default=64, help="Number of requests that may wait for each bundle; others get status 429."
)
@click.option("--timeout", type=float, default=300.0, help="Maximum seconds for one request, waiting included.")
@click.option(
    "--grace", type=float, default=10.0, help="Seconds that running requests get to finish after SIGTERM or Ctrl-C."
)
@click.option("--max-body-kb", type=int, default=1024, help="Maximum size of a request's body.")
@click.option("--max-new-tokens", type=int, default=2048, help="Maximum number of tokens that a request may ask for.")
@click.option(
    "--allow-host",
    multiple=True,
    help="Also answer requests to this host name; only needed when listening on loopback.  [default: none]",
)
@click.option(
    "--cors-origin",
    multiple=True,
    help="Allow web pages of this origin, such as https://app.example; * for all; repeatable.  [default: none]",
)
@click.option("--any-model", is_flag=True, help="Answer with the one DIR, also when a request names another model.")
@load_options
@click.option("-v", "--verbose", is_flag=True, help="Log progress on stderr.")
@click.version_option(package_name="coreinfer")
@command_errors
def main(
    bundle_dirs: tuple[Path, ...],
    host: str,
    port: int,
    parallel: int,
    queue: int,
    timeout: float,
    grace: float,
    max_body_kb: int,
    max_new_tokens: int,
    allow_host: tuple[str, ...],
    cors_origin: tuple[str, ...],
    any_model: bool,
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
    config = ServerConfig(
        parallel=parallel,
        queue=queue,
        timeout_seconds=timeout,
        grace_seconds=grace,
        max_body_bytes=max_body_kb << 10,
        max_new_tokens=max_new_tokens,
        api_key=os.environ.get(_KEY),
        allowed_hosts=(*LOOPBACK_HOSTS, *allow_host) if is_loopback else (),
        cors_origins=cors_origin,
        any_model=any_model,
    )
    names = _model_names(bundle_dirs)
    if any_model and len(names) > 1:
        raise ConfigError(f"--any-model: expected one DIR, got {len(names)}")
    taken = serving.bind(host, port)
    if not is_loopback and config.api_key is None:
        click.echo(f"warning: {host} can be reached from elsewhere, and no key is asked for; set {_KEY}", err=True)
    engines = {name: loading.load(path) for name, path in zip(names, bundle_dirs, strict=True)}
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{taken.getsockname()[1]}"
    serving.serve(engines, config, taken, on_start=lambda: _announce(engines, address))


def _announce(engines: Mapping[str, Engine], address: str) -> None:
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
