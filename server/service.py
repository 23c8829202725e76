"""What is served: models with their workers, and what routes share."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.layout import LAYOUT
from coreinfer.runtime import Engine, GenerationOptions
from coreinfer.runtime.decoding.text import token_text
from coreinfer.runtime.prompts.requests import Prompt
from fastapi import Request

from .api_errors import ApiError
from .jobs import Job
from .metrics import Metrics, ModelMetrics
from .server_config import ServerConfig
from .worker import Worker

__all__ = ["VERSION", "Model", "Service", "service_of"]

VERSION = metadata.version("coreinfer")
"""Looked up each time it would be read from a file each time."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle that is served.

    Attributes:
        created_seconds: when its manifest was written, since 1970.
        fingerprint: says which bundle it is: the same name may be another one tomorrow.
    """

    id: str
    engine: Engine
    worker: Worker
    created_seconds: int
    fingerprint: str

    def word(self, token_id: int) -> str:
        """The text of one token, special ones too."""
        return token_text(self.engine.tokenizer, token_id)


class Service:
    """All models of a server."""

    def __init__(self, engines: Mapping[str, Engine], config: ServerConfig) -> None:
        """Start a worker for each engine.

        Args:
            engines: by the names that clients use.
        Raises:
            ConfigError: `any_model` with several.
        """
        if config.any_model and len(engines) != 1:
            raise ConfigError(f"any_model: expected one model, got {len(engines)}")
        self.config = config
        self.metrics = Metrics()
        self.models = {name: self._model(name, engine) for name, engine in engines.items()}

    def model(self, name: str) -> Model:
        """Find a model by its name; with `any_model` there is one for all names.

        Raises:
            ApiError: there is none.
        """
        if self.config.any_model:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"no model {name!r} here; there is {known}", param="model", code="model_not_found")
        return self.models[name]

    def submit(self, model: Model, prompt: Prompt, options: GenerationOptions, *, arrived_seconds: float) -> Job:
        """Put a request into its model's queue.

        Args:
            arrived_seconds: when it came, by `time.monotonic`.
        Raises:
            QueueFull: it has to come again.
            ShuttingDown: it has to go elsewhere.
        """
        return model.worker.submit(
            prompt, options, arrived_seconds=arrived_seconds, timeout_seconds=self.config.timeout_seconds
        )

    def cut(self) -> None:
        """End all that waits or runs, and take no more."""
        for model in self.models.values():
            model.worker.cut()

    def close(self) -> None:
        """End the workers."""
        self.cut()
        for model in self.models.values():
            model.worker.close()

    def _model(self, name: str, engine: Engine) -> Model:
        manifest = engine.bundle.path / LAYOUT.manifest
        # Made for the first request that needs them, they would hold up everybody else.
        engine.loaded.grammars.prepare()
        engine.loaded.prompts.prepare()
        return Model(
            id=name,
            engine=engine,
            worker=Worker(
                name,
                engine,
                parallel=self.config.parallel,
                capacity=self.config.queue,
                metrics=ModelMetrics(metrics=self.metrics, model=name),
            ),
            created_seconds=int(manifest.stat().st_mtime),
            fingerprint=f"coreinfer-{hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]}",
        )


def service_of(request: Request) -> Service:
    """Return the service of a route's application."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
