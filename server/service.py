"""What is served: models with what answers for them, and what routes share."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from coreinfer.bundles import Bundle, Manifest
from coreinfer.bundles.errors import ConfigError
from coreinfer.runtime import Engine, GenerationOptions
from coreinfer.runtime.decoding.text import token_text
from coreinfer.runtime.prompts.prompt_format import PromptFormat
from coreinfer.runtime.prompts.requests import Prompt
from coreinfer.runtime.routing.router import Router
from fastapi import Request

from .api_errors import ApiError
from .bundle_files import created_seconds, fingerprint
from .desk import Answering
from .jobs import Job
from .metrics import Metrics, ModelMetrics
from .server_config import ServerConfig
from .worker import Worker

__all__ = ["VERSION", "Model", "Service", "engine_service", "service_of"]

VERSION = metadata.version("coreinfer")
"""Looked up each time it would be read from a file each time."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle that is served: what routes read of it, and what answers.

    Attributes:
        bundle, prompts, router: of the bundle; replicas have their own.
        max_tokens: those of a prompt and its answer together, at most.
        answering: an engine in this process, or replicas.
        created_seconds: when its manifest was written, since 1970.
        fingerprint: says which bundle it is: the same name may be another one tomorrow.
    """

    id: str
    bundle: Bundle
    prompts: PromptFormat
    router: Router
    max_tokens: int
    answering: Answering
    created_seconds: int
    fingerprint: str

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    def word(self, token_id: int) -> str:
        """The text of one token, special ones too."""
        return token_text(self.prompts.tokenizer, token_id)


class Service:
    """All models of a server, by the names that clients use."""

    def __init__(self, config: ServerConfig) -> None:
        """Begin without models."""
        self.config = config
        self.metrics = Metrics()
        self.models: dict[str, Model] = {}

    def add(self, model: Model) -> None:
        """Serve a model from now on, instead of the one of its name."""
        self.models[model.id] = model

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

    def submit(
        self,
        model: Model,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        arrived_seconds: float,
        streamed: bool,
    ) -> Job:
        """Put a request into its model's queue.

        Args:
            arrived_seconds: when it came, by `time.monotonic`.
            streamed: whether its client sees tokens before the last one.
        Raises:
            QueueFull: it has to come again.
            ShuttingDown: it has to go elsewhere.
        """
        return model.answering.submit(
            prompt,
            options,
            arrived_seconds=arrived_seconds,
            timeout_seconds=self.config.timeout_seconds,
            streamed=streamed,
        )

    def cut(self) -> None:
        """End all that waits or runs, and take no more."""
        for model in self.models.values():
            model.answering.cut()

    def close(self) -> None:
        """End what answers."""
        self.cut()
        for model in self.models.values():
            model.answering.close()


def engine_service(engines: Mapping[str, Engine], config: ServerConfig) -> Service:
    """Serve engines in this process, each by a worker.

    Args:
        engines: by the names that clients use.
    Raises:
        ConfigError: `any_model` with several.
    """
    if config.any_model and len(engines) != 1:
        raise ConfigError(f"any_model: expected one model, got {len(engines)}")
    service = Service(config)
    for name, engine in engines.items():
        service.add(_engine_model(name, engine, config, service.metrics))
    return service


def _engine_model(name: str, engine: Engine, config: ServerConfig, metrics: Metrics) -> Model:
    loaded = engine.loaded
    # Made for the first request that needs them, they would hold up everybody else.
    loaded.grammars.prepare()
    loaded.prompts.prepare()
    worker = Worker(
        name,
        engine,
        parallel=config.parallel,
        capacity=config.queue,
        metrics=ModelMetrics(metrics=metrics, model=name),
    )
    return Model(
        id=name,
        bundle=loaded.bundle,
        prompts=loaded.prompts,
        router=loaded.router,
        max_tokens=loaded.max_tokens,
        answering=worker,
        created_seconds=created_seconds(loaded.bundle),
        fingerprint=fingerprint(loaded.bundle),
    )


def service_of(request: Request) -> Service:
    """Return the service of a route's application."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
