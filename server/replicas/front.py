"""A server whose engines run on Ray: starts their fleets, serves, and exchanges bundles while it does."""

import logging
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from coreinfer.bundles import Bundle, open_bundle
from coreinfer.bundles.errors import ConfigError, CoreInferError
from coreinfer.bundles.layout import LAYOUT
from coreinfer.bundles.shared.ray_cluster import on_ray
from coreinfer.runtime.load_options import LoadOptions
from coreinfer.runtime.prompts.prompt_format import PromptFormat
from coreinfer.runtime.routing.router import Router
from coreinfer.server.bundle_files import created_seconds, fingerprint
from coreinfer.server.metrics import ModelMetrics
from coreinfer.server.server_config import ServerConfig
from coreinfer.server.service import Model, Service
from coreinfer.server.serving import serve
from ray import serve as ray_serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import LoggingConfig

from .fleet import Fleet, cpus_of_replica
from .hints import Hints
from .messages import Facts
from .replica_config import ReplicaConfig
from .replicas import Replicas

__all__ = ["serve_replicas"]

_log = logging.getLogger(__name__)

_OF_THE_MODEL = (LAYOUT.tokenizer, LAYOUT.chat_template, LAYOUT.tool_template, LAYOUT.generation)
"""Files that two bundles must share to be exchanged: while both answer, the front reads the words of either."""


@dataclass(kw_only=True)
class _Served:
    """A bundle under a name.

    Attributes:
        folder: as the command has it, which may be a link to another folder tomorrow.
    """

    folder: Path
    fleet: Fleet
    replicas: Replicas
    metrics: ModelMetrics
    model: Model


def serve_replicas(
    folders: Mapping[str, Path],
    config: ServerConfig,
    replicas: ReplicaConfig,
    loading: LoadOptions,
    taken: socket.socket,
    *,
    on_start: Callable[[Mapping[str, Facts]], None],
) -> None:
    """Serve bundles by engines on Ray, until SIGTERM or SIGINT; SIGHUP exchanges those whose folder is another one now.

    Args:
        folders: of the bundles, by the names that clients use.
        taken: a bound socket.
        on_start: called when requests are answered, with what engines said of themselves.
    Raises:
        ConfigError: Ray cannot be reached, or does not start the engines.
        BundleError: there is no bundle, or it is damaged.
    """
    assert replicas.ray is not None
    # One more than at most, so that a bundle can be exchanged.
    num_cpus = (replicas.most_replicas + 1) * cpus_of_replica(loading) * len(folders)
    bundles = {name: _open(folder.resolve()) for name, folder in folders.items()}
    with ExitStack() as stack:
        stack.enter_context(on_ray(replicas.ray, num_cpus=num_cpus))
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        ray_serve.start(proxy_location=ProxyLocation.Disabled, logging_config=LoggingConfig(log_level="WARNING"))
        service = Service(config)
        served, facts = {}, {}
        for name, folder in folders.items():
            fleet = Fleet(name=name, config=replicas, server=config, loading=loading)
            fleet.claim()
            stack.callback(fleet.end)
            served[name], facts[name] = _start(fleet, bundles[name], folder, service)
        exchange = _Exchange(served, service)
        signal.signal(signal.SIGHUP, lambda *_: exchange.begin())
        serve(service, taken, on_start=lambda: on_start(facts))


def _open(folder: Path) -> Bundle:
    return open_bundle(folder, lazy_packs=True, spare_memory=True)


def _start(fleet: Fleet, bundle: Bundle, folder: Path, service: Service) -> tuple[_Served, Facts]:
    num_clusters = len(bundle.manifest.clusters)
    handle = fleet.deploy(str(bundle.path), num_clusters)
    router = Router(bundle)
    metrics = ModelMetrics(metrics=service.metrics, model=fleet.name)
    hints = Hints(bundle, router, fleet.loading.mode)
    replicas = Replicas(handle, hints, parallel=service.config.parallel, capacity=service.config.queue, metrics=metrics)
    replicas.use(hints, num_clusters)
    replicas.count(fleet.num_running())
    fleet.on_count = replicas.count
    fleet.watch()
    facts = fleet.facts(handle)
    model = Model(
        id=fleet.name,
        bundle=bundle,
        prompts=PromptFormat(bundle),
        router=router,
        max_tokens=facts.max_tokens,
        answering=replicas,
        created_seconds=created_seconds(bundle),
        fingerprint=fingerprint(bundle),
    )
    service.add(model)
    return _Served(folder=folder, fleet=fleet, replicas=replicas, metrics=metrics, model=model), facts


class _Exchange:
    """Replaces bundles by those that their folders are now, in a thread, one exchange at a time."""

    def __init__(self, served: Mapping[str, _Served], service: Service) -> None:
        self._served, self._service = served, service
        self._busy = threading.Lock()

    def begin(self) -> None:
        """Begin in a thread, and return at once."""
        threading.Thread(target=self._run, name="exchange of bundles", daemon=True).start()

    def _run(self) -> None:
        if not self._busy.acquire(blocking=False):
            _log.warning("a bundle is being exchanged already; send SIGHUP again when that is done")
            return
        try:
            for name, served in self._served.items():
                self._exchange(name, served)
        finally:
            self._busy.release()

    def _exchange(self, name: str, served: _Served) -> None:
        before = served.model
        try:
            bundle = _open(served.folder.resolve())
            if fingerprint(bundle) == before.fingerprint:
                _log.warning("%s: the bundle is still %s", name, before.fingerprint)
                return
            _check_alike(before.bundle, bundle)
            self._replace(served, bundle)
        except Exception as error:
            served.metrics.exchanged("failed")
            known = isinstance(error, CoreInferError)
            _log.error("%s: not exchanged, %s stays: %s", name, before.fingerprint, error, exc_info=not known)
            return
        served.metrics.exchanged("done")
        _log.warning("%s: exchanged %s for %s", name, before.fingerprint, served.model.fingerprint)

    def _replace(self, served: _Served, bundle: Bundle) -> None:
        before, num_clusters = served.model, len(bundle.manifest.clusters)
        prompts, router = PromptFormat(bundle), Router(bundle)
        try:
            handle = served.fleet.deploy(str(bundle.path), num_clusters)
        except ConfigError:
            served.fleet.deploy(str(before.bundle.path), len(before.manifest.clusters))
            raise
        served.replicas.use(Hints(bundle, router, served.fleet.loading.mode), num_clusters)
        served.model = Model(
            id=before.id,
            bundle=bundle,
            prompts=prompts,
            router=router,
            max_tokens=served.fleet.facts(handle).max_tokens,
            answering=served.replicas,
            created_seconds=created_seconds(bundle),
            fingerprint=fingerprint(bundle),
        )
        self._service.add(served.model)


def _check_alike(before: Bundle, after: Bundle) -> None:
    """Refuse another model's bundle.

    Raises:
        ConfigError: it has other words or another chat template.
    """
    files = (before.manifest.files, after.manifest.files)
    if other := [name for name in _OF_THE_MODEL if files[0].get(name) != files[1].get(name)]:
        raise ConfigError(
            f"{after.path}: it is of another model ({', '.join(other)} differ); serve it under a name of its own"
        )
