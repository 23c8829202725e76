"""From a prompt and its options to a request: what to read, where it belongs, how to decode it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

from coreinfer.bundles import Bundle, ConfigError, ContextTooLong
from coreinfer.runtime.decoding.drafting import DraftCosts
from coreinfer.runtime.decoding.grammar import JsonGrammars
from coreinfer.runtime.engines.protocol import Decoder
from coreinfer.runtime.generation import Mode
from coreinfer.runtime.options import GenerationOptions
from coreinfer.runtime.routing.modes import ModePlan, check_prompt_ffn, plan_mode, serving_cluster
from coreinfer.runtime.routing.router import Route, Router
from coreinfer.runtime.routing.token_shares import check_token_share, leaves_out

from .chat_template import check_messages, routing_text
from .prompt_format import PromptFormat

__all__ = ["Loaded", "Prompt", "Prompts", "Request", "is_batch", "read_request", "read_requests"]

Prompt = str | Sequence[Mapping[str, Any]]
Prompts = Sequence[str] | Sequence[Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What generating needs of a loaded bundle."""

    bundle: Bundle
    decoder: Decoder
    router: Router
    prompts: PromptFormat
    grammars: JsonGrammars
    draft_costs: DraftCosts
    mode: Mode

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and its answer may have: the model's positions, or fewer where the KV cache is small."""
        # An answer's last token is never put into it.
        room = self.decoder.num_pages * self.decoder.page_tokens + 1
        return min(self.bundle.manifest.model.max_positions, room)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, ready to be read.

    Attributes:
        token_ids: of the whole prompt.
        route: where it belongs.
        plan: the mode that serves it.
        distance: of the prompt to the cluster that serves it.
        keeps_decoded: whether all that it shares with the KV cache counts as read, decoded tokens too; otherwise only
            what reading it would compute once more, bit for bit.
        routing_seconds: what tokenizing and routing it took.
    """

    token_ids: tuple[int, ...]
    route: Route
    plan: ModePlan
    distance: float
    keeps_decoded: bool
    routing_seconds: float


def is_batch(prompt: Prompt | Prompts) -> TypeGuard[Prompts]:
    """Whether this is a list of prompts: no text, and no list whose first item is a message.

    An empty list is a conversation without messages.
    """
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return is_list and len(prompt) > 0 and not isinstance(prompt[0], Mapping)


def read_requests(loaded: Loaded, prompts: Prompts, options: GenerationOptions) -> list[Request]:
    """Read several prompts; see `read_request`.

    Raises:
        ConfigError: naming the prompt; or `on_token` is given.
    """
    if options.on_token is not None:
        raise ConfigError("on_token: cannot be used with several prompts; leave it out")
    requests = []
    for number, prompt in enumerate(cast(Sequence[Prompt], prompts)):
        try:
            requests.append(read_request(loaded, prompt, options))
        except ConfigError as error:
            raise ConfigError(f"prompts[{number}]: {error}") from error
    return requests


def read_request(
    loaded: Loaded, prompt: Prompt, options: GenerationOptions, *, known_ids: Sequence[int] = ()
) -> Request:
    """Tokenize and route a prompt, and settle the mode.

    Args:
        known_ids: tokens of a conversation's prompt and answer before this turn; those in the KV cache are reused.
    Raises:
        ConfigError: the prompt is empty, malformed or too long, or its mode cannot be had.
    """
    start = time.perf_counter()
    if prompt == "":
        # Many tokenizers begin a text with a token of its own, so that this would be a prompt of 1 token.
        raise ConfigError("prompt: expected text or messages, got an empty text")
    if isinstance(prompt, str) and not options.raw and loaded.prompts.chat_template is not None:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        _check_text_options(options)
        source, token_ids = prompt, loaded.prompts.encode(prompt)
    else:
        check_messages(prompt)
        if options.raw:
            raise ConfigError("raw: can only be used with a prompt that is plain text, not with messages; leave it out")
        source = routing_text(prompt)
        token_ids = loaded.prompts.read_messages(prompt, options, known_ids=known_ids)
    _check_length(len(token_ids), options, loaded)
    route = loaded.router.route(source)
    plan = _plan(loaded, options, route, len(token_ids))
    if plan.uses_pack or plan.mode == "fused":
        # Here, because the thread that steps must not wait for a download.
        loaded.bundle.bring(serving_cluster(plan, route))
    if plan.needs_statistic:
        # Computed here where the bundle does not store them, for the same reason.
        _ = loaded.bundle.down_norms
    return Request(
        token_ids=tuple(token_ids),
        route=route,
        plan=plan,
        distance=route.distance if plan.cluster is None else float(loaded.router.distances(source)[plan.cluster]),
        keeps_decoded=bool(known_ids),
        routing_seconds=time.perf_counter() - start,
    )


def _plan(loaded: Loaded, options: GenerationOptions, route: Route, num_tokens: int) -> ModePlan:
    mode, gathers = options.mode or loaded.mode, loaded.decoder.gathers
    if mode == "auto" and (leaves_out(options.token_share) or options.prompt_ffn == "pack"):
        # A prompt's own neurons are all read, and are known of prompts that the dense FFN reads.
        gathers = False
    check_prompt_ffn(mode, options.prompt_ffn, loaded.bundle.manifest)
    plan = plan_mode(mode, loaded.bundle.manifest, route, num_tokens, gathers=gathers)
    check_token_share(loaded.bundle, plan, options.token_share)
    return plan


def _check_length(num_tokens: int, options: GenerationOptions, loaded: Loaded) -> None:
    limit = loaded.max_tokens
    is_small = limit < loaded.bundle.manifest.model.max_positions
    if num_tokens >= limit:
        advice = "; the KV cache has no room for more, raise kv_cache_mb" if is_small else ""
        raise ContextTooLong(f"prompt: expected 1 to {limit - 1} tokens, got {num_tokens}{advice}")
    if num_tokens == 0:
        raise ConfigError(f"prompt: expected 1 to {limit - 1} tokens, got 0")
    if options.whole_length and num_tokens + options.max_new_tokens > limit:
        raise ContextTooLong(
            f"prompt: its {num_tokens} tokens and {options.max_new_tokens} for the answer are more than the "
            f"{limit} that {'the KV cache has room for' if is_small else 'this model reads'}; shorten the prompt or "
            f"ask for at most {limit - num_tokens} tokens"
        )


def _check_text_options(options: GenerationOptions) -> None:
    """Refuse what goes with messages only."""
    given = {
        "tools": options.tools,
        "chat_template_kwargs": options.chat_template_kwargs,
        "continue_final_message": options.continue_final_message,
    }
    if wrong := [name for name, value in given.items() if value]:
        raise ConfigError(f"{', '.join(wrong)}: they go with messages, not with a prompt that is plain text")
