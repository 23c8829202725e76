"""Where a request would find what it needs in memory, from its text and options."""

import hashlib
import json

from coreinfer.bundles import Bundle
from coreinfer.bundles.errors import CoreInferError
from coreinfer.runtime import GenerationOptions, Mode
from coreinfer.runtime.prompts.chat_template import routing_text
from coreinfer.runtime.prompts.requests import Prompt
from coreinfer.runtime.routing.modes import plan_mode, serving_cluster
from coreinfer.runtime.routing.router import Router

from .messages import Hint

__all__ = ["Hints"]


class Hints:
    """Reads requests of one bundle, by the bundle's own router."""

    def __init__(self, bundle: Bundle, router: Router, mode: Mode) -> None:
        """Prepare to read.

        Args:
            mode: of requests that do not say.
        """
        self._manifest, self._router, self._mode = bundle.manifest, router, mode

    def has_pack(self, cluster: int) -> bool:
        """Whether a cluster has a pack, which may be warm here or there."""
        return self._manifest.clusters[cluster].file is not None

    def read(self, prompt: Prompt, options: GenerationOptions) -> Hint:
        """Route a request; one that a replica will refuse has no hint."""
        try:
            continues = not isinstance(prompt, str) and any(message["role"] == "assistant" for message in prompt)
            return Hint(cluster=self._cluster(prompt, options), conversation=_conversation(prompt), continues=continues)
        except CoreInferError:
            return Hint()

    def _cluster(self, prompt: Prompt, options: GenerationOptions) -> int | None:
        text = prompt if isinstance(prompt, str) else routing_text(prompt)
        route = self._router.route(text)
        # A long prompt may choose neurons of its own, which are in no pack: here it counts as a short one.
        plan = plan_mode(options.mode or self._mode, self._manifest, route, 0)
        cluster = serving_cluster(plan, route)
        return cluster if plan.uses_pack and self.has_pack(cluster) else None


def _conversation(prompt: Prompt) -> str | None:
    """What all turns of a conversation have in common: all up to the user's first message."""
    if isinstance(prompt, str):
        return None
    first = next((place for place, message in enumerate(prompt) if message["role"] == "user"), len(prompt))
    beginning = [dict(message) for message in prompt[: first + 1]]
    return hashlib.sha256(json.dumps(beginning).encode()).hexdigest()
