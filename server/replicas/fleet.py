"""The replicas of one bundle as an application of Ray Serve: deployed, exchanged, deleted."""

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.shared.machine import usable_cores
from coreinfer.runtime.load_options import LoadOptions
from coreinfer.server.server_config import ServerConfig
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from .messages import Facts
from .replica import Replica
from .replica_config import ReplicaConfig

__all__ = ["Fleet", "cpus_of_replica"]

_log = logging.getLogger(__name__)

_DEPLOYMENT = "replicas"
_FACTS_SECONDS = 60.0
_SPARE_SECONDS = 15.0
"""After a request's own time, in which a replica that is to end may still finish it."""
_UPSCALE_SECONDS, _DOWNSCALE_SECONDS, _LOOK_BACK_SECONDS = 5.0, 120.0, 15.0
_COUNT_SECONDS = 1.0
_MAX_BACKOFF_SECONDS = 0.1
_HELD_TIMES = 3
"""A replica holds as many times the requests that it answers at once. Those that wait in it need not find it again;
where all are full, a freed place goes to whoever comes, and nothing stays warm."""


def cpus_of_replica(loading: LoadOptions) -> int:
    """CPUs that Ray sets aside for a replica: its threads."""
    return loading.threads or usable_cores()


class _Owner:
    """An actor without work, whose name says that a front lives; Ray ends it with the front's process."""


@dataclass(kw_only=True)
class Fleet:
    """The replicas of one model. Its calls block; they are made before the event loop runs, or in a thread.

    Attributes:
        name: of the model.
        on_count: told, from a thread, how many replicas answer.
    """

    name: str
    config: ReplicaConfig
    server: ServerConfig
    loading: LoadOptions
    on_count: Callable[[int], object] = field(default=lambda count: None)
    _ended: threading.Event = field(default_factory=threading.Event, init=False)
    _owner: Any = field(default=None, init=False)

    def claim(self) -> None:
        """Make sure that no other front has replicas under this name; those of one that died are replaced.

        Raises:
            ConfigError: another front does.
        """
        owner = ray.remote(num_cpus=0)(_Owner)
        try:
            self._owner = owner.options(name=f"coreinfer-serve of {self.name}", namespace="coreinfer").remote()
        except ValueError as error:
            raise ConfigError(
                f"--ray {self.config.ray}: another coreinfer-serve serves {self.name!r} there; end it, or give the "
                "bundle's folder another name"
            ) from error

    def deploy(self, bundle_dir: str, num_clusters: int) -> DeploymentHandle[Any]:
        """Have replicas of a bundle; if there are some of another one, Ray exchanges them one after another.

        An old replica ends when its requests have, and not before a new one answers.

        Raises:
            ConfigError: they cannot be started.
        """
        deployment = serve.deployment(Replica, name=_DEPLOYMENT).options(
            max_ongoing_requests=_HELD_TIMES * self.server.parallel,
            ray_actor_options=self._resources(),
            # One more for as long as an exchange lasts; of up to 100 replicas, 1% is one.
            max_surge_percent=1,
            graceful_shutdown_timeout_s=self.server.timeout_seconds + _SPARE_SECONDS,
            graceful_shutdown_wait_loop_s=0.5,
            health_check_period_s=5,
            max_constructor_retry_count=2,
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
            request_router_config=self._router(num_clusters),
            **self._size(),
        )
        application = deployment.bind(bundle_dir, self.loading, self.server.parallel, self.name)
        try:
            return serve.run(application, name=self._application, route_prefix=None)
        except RuntimeError as error:
            raise ConfigError(f"{self.name}: Ray could not start its engines: {self._reason(error)}") from error

    def facts(self, handle: DeploymentHandle[Any]) -> Facts:
        """Ask a replica for what the front must know."""
        found = handle.facts.remote().result(timeout_s=_FACTS_SECONDS)
        assert isinstance(found, Facts)
        return found

    def watch(self) -> None:
        """Count replicas from now on, in a thread that ends with `end`."""
        threading.Thread(target=self._count, name=f"count of {self.name}", daemon=True).start()

    def end(self) -> None:
        """End all replicas."""
        self._ended.set()
        try:
            serve.delete(self._application)
            ray.kill(self._owner)
        except Exception as error:
            # Where Ray itself has ended, so have they.
            _log.warning("%s: Ray did not end its engines: %s", self.name, error)

    def num_running(self) -> int:
        """Number of replicas that answer."""
        application = serve.status().applications.get(self._application)
        deployment = application.deployments.get(_DEPLOYMENT) if application else None
        return deployment.replica_states.get("RUNNING", 0) if deployment else 0

    def _reason(self, error: RuntimeError) -> str:
        """What an engine said of why it did not start; else what Ray says."""
        application = serve.status().applications.get(self._application)
        said = [deployment.message for deployment in application.deployments.values()] if application else []
        ours = re.findall(r"coreinfer\.bundles\.errors\.\w+: (.+)", "\n".join([str(error), *said]))
        return str(ours[-1] if ours else error).strip().splitlines()[-1]

    def _count(self) -> None:
        while not self._ended.wait(_COUNT_SECONDS):
            try:
                self.on_count(self.num_running())
            except Exception as error:
                # It may come again, and requests tell more.
                _log.warning("Ray does not say how many replicas there are: %s", error)

    @property
    def _application(self) -> str:
        return f"coreinfer-{self.name}"

    def _resources(self) -> dict[str, float]:
        num_gpus = 1 if self.loading.device.startswith("cuda") else 0
        return {"num_cpus": cpus_of_replica(self.loading), "num_gpus": num_gpus}

    def _size(self) -> dict[str, Any]:
        config = self.config
        if config.max_replicas is None or config.max_replicas == config.replicas:
            return {"num_replicas": config.replicas}
        scaling = AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=config.max_replicas,
            # What a replica answers at once: more than that waits.
            target_ongoing_requests=self.server.parallel,
            upscale_delay_s=_UPSCALE_SECONDS,
            downscale_delay_s=_DOWNSCALE_SECONDS,
            look_back_period_s=_LOOK_BACK_SECONDS,
        )
        return {"autoscaling_config": scaling}

    def _router(self, num_clusters: int) -> RequestRouterConfig:
        if self.config.route_by == "load":
            return RequestRouterConfig(max_backoff_s=_MAX_BACKOFF_SECONDS)
        return RequestRouterConfig(
            request_router_class="coreinfer.server.replicas.cluster_router:ClusterRouter",
            request_router_kwargs={"num_clusters": num_clusters, "num_at_once": self.server.parallel},
            max_backoff_s=_MAX_BACKOFF_SECONDS,
        )
