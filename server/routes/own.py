"""The routes that are not OpenAI's: the page, its map, health and metrics."""

import base64
import hashlib
import re
from importlib import resources
from typing import Annotated

from coreinfer.bundles.cluster_map import PROMPT_SOFTNESS, pull_of_clusters
from coreinfer.runtime.generation import MODES
from coreinfer.server.answers.response_bodies import ClusterPoint, Health, ModelMap, Place
from coreinfer.server.api_errors import ERRORS
from coreinfer.server.requests.bounds import BoundedRoute
from coreinfer.server.requests.request_bodies import PlaceRequest
from coreinfer.server.service import VERSION, Service, service_of
from fastapi import APIRouter, Depends, Query
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

__all__ = ["router"]

router = APIRouter(route_class=BoundedRoute)

ServiceOf = Annotated[Service, Depends(service_of)]


def _policy(page: str) -> str:
    """Allow the page its own script and style, by their hashes, and requests to where it came from."""
    script, style = (_hash(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(page: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


_PAGE = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
_PAGE_HEADERS = {"Content-Security-Policy": _policy(_PAGE), "Referrer-Policy": "no-referrer"}


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """Show the page; it runs what is in it, asks this server, and nothing else."""
    return HTMLResponse(_PAGE, headers=_PAGE_HEADERS)


@router.get("/health")
async def health(service: ServiceOf) -> Health:
    """Say that the server lives."""
    return Health(
        version=VERSION,
        models=list(service.models),
        key_required=service.config.api_key is not None,
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}, 401: ERRORS[401]},
)
async def metrics(service: ServiceOf) -> Response:
    """Return all counters in Prometheus' text format."""
    return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)


@router.get("/coreinfer/map", responses={status: ERRORS[status] for status in (400, 401, 404)})
async def show_map(model: Annotated[str, Query(min_length=1)], service: ServiceOf) -> ModelMap:
    """Show a bundle's clusters and their places on its map."""
    served = service.model(model)
    clusters = [
        ClusterPoint(
            id=number,
            label=cluster.label,
            num_sentences=cluster.num_sentences,
            examples=list(cluster.examples),
            x=cluster.map_x,
            y=cluster.map_y,
        )
        for number, cluster in enumerate(served.manifest.clusters)
    ]
    return ModelMap(
        model=model,
        name=served.manifest.model.name,
        # What is asked for must fit beside the prompt: the page leaves it as much room.
        max_new_tokens=min(service.config.max_new_tokens, served.max_tokens // 2),
        has_chat_template=served.prompts.chat_template is not None,
        modes=list(MODES) if served.manifest.has_dense else ["auto", "similarity"],
        clusters=clusters,
    )


@router.post("/coreinfer/place", responses={status: ERRORS[status] for status in (400, 401, 404, 413, 415)})
def show_place(body: PlaceRequest, service: ServiceOf) -> Place:
    """Return where a text is on the map, without answering it; in a thread, not in the event loop."""
    served = service.model(body.model)
    clusters = served.manifest.clusters
    route, distances = served.router.route(body.text), served.router.distances(body.text)
    weights = pull_of_clusters(distances, softness=PROMPT_SOFTNESS)
    return Place(
        cluster=route.cluster,
        label=clusters[route.cluster].label,
        distance=route.distance,
        familiar=route.familiar,
        x=sum(weight * cluster.map_x for weight, cluster in zip(weights, clusters, strict=True)),
        y=sum(weight * cluster.map_y for weight, cluster in zip(weights, clusters, strict=True)),
        distances=distances.tolist(),
        weights=weights.tolist(),
    )
