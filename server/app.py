"""The application: its routes, and what every request passes through."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from coreinfer.runtime import Engine
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from .access import Gate, HeadAsGet
from .api_errors import add_error_handlers
from .metrics import CountRequests
from .routes import ollama as ollama_routes
from .routes import openai as openai_routes
from .routes import own as own_routes
from .server_config import ServerConfig
from .service import VERSION, Service, engine_service

__all__ = ["app_of", "create_app"]


def create_app(engines: Mapping[str, Engine], config: ServerConfig) -> FastAPI:
    """Put the server's application together.

    Args:
        engines: loaded bundles by the names that clients use.
        config: limits and access.
    Returns:
        An ASGI application; its workers end with its lifespan. `app.state.service` is what it serves.
    """
    return app_of(engine_service(engines, config))


def app_of(service: Service) -> FastAPI:
    """Put the application of a service together; the service ends with its lifespan."""
    config = service.config

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="CoreInfer",
        version=VERSION,
        description="OpenAI's and Ollama's interfaces to bundles, and a page with a map of their clusters.",
        lifespan=lifespan,
        # These pages load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(HeadAsGet),
            Middleware(CountRequests, metrics=service.metrics),
            *_cors(config),
            Middleware(Gate, config=config),
        ],
    )
    app.state.service = service
    app.include_router(openai_routes.router)
    app.include_router(ollama_routes.router)
    app.include_router(own_routes.router)
    add_error_handlers(app)
    return app


def _cors(config: ServerConfig) -> list[Middleware]:
    """Let pages of other origins ask; before the gate, because a browser's question whether it may has no key."""
    if not config.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    ]
