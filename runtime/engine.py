"""Load a bundle and generate from it: the runtime's main path."""

import logging
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack, cast, overload

from coreinfer.bundles import Bundle, Manifest, open_bundle
from coreinfer.bundles.remote.opening import find_bundle
from coreinfer.bundles.shared.machine import give_back_heap
from tokenizers import Tokenizer

from .asynchronous import in_thread
from .conversation import Conversation
from .decoding.drafting import DraftCosts
from .decoding.grammar import JsonGrammars
from .engines.load import load_decoder
from .engines.protocol import Decoder
from .generation import Generation, Mode, Token, collect
from .load_options import LoadKeywords, LoadOptions
from .options import DEFAULTS, GenerationKeywords, GenerationOptions
from .prompts.prompt_format import PromptFormat, read_tokenizer
from .prompts.requests import Loaded, Prompt, Prompts, Request, is_batch, read_request, read_requests
from .routing.centroids import import_faiss
from .routing.router import Router
from .scheduling import Driver, Post, Run, Scheduler, prepare

__all__ = ["Engine", "Prompt", "Prompts", "load", "load_engine"]

_log = logging.getLogger(__name__)


def load(bundle_dir: str | Path, **options: Unpack[LoadKeywords]) -> "Engine":
    """Open a bundle, check it, and make it ready to generate; the keywords are the fields of `LoadOptions`.

    Everything is checked now, except the contents of cluster packs: each is hashed when it is first used.

    Args:
        bundle_dir: a folder that coreinfer-compile wrote; or hf:USER/NAME[@REVISION], https://... or s3://..., of which
            packs are fetched when they are first used (docs/sharing.md).
    Raises:
        BundleError: there is no bundle, or it is damaged; the message names all damaged files.
        ConfigError: an argument is wrong, or the engine's packages are not installed.
        UnsupportedModelError: engine "native" does not compute this model.
    """
    return load_engine(bundle_dir, LoadOptions(**options))


def load_engine(bundle_dir: str | Path, options: LoadOptions) -> "Engine":
    """Make a bundle ready to generate, with the options of `load` in one object."""
    bundle, tokenizer = _open(bundle_dir, spare_memory=options.memory_mb is not None)
    loaded = Engine(bundle, load_decoder(bundle, options), mode=options.mode, tokenizer=tokenizer)
    # Parsing tokenizers leaves 10 to 20 MB free; giving it back takes 1 to 5 ms.
    give_back_heap()
    return loaded


def _open(bundle_dir: str | Path, *, spare_memory: bool) -> tuple[Bundle, Future[Tokenizer]]:
    """Open a bundle and, at the same time, do what comes next: hashing releases Python's lock.

    Returns:
        The bundle, and what parsing returned or raised; its thread has ended.
    Raises:
        BundleError: as `load`; errors from parsing a damaged bundle are dropped.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="coreinfer-load") as pool:
        # First, because parsing keeps the lock to its end: an import lets the threads that hash begin.
        pool.submit(import_faiss)
        found = find_bundle(bundle_dir)
        tokenizer = pool.submit(read_tokenizer, found.folder)
        bundle = open_bundle(found.folder, lazy_packs=True, fetch=found.fetch, spare_memory=spare_memory)
        return bundle, tokenizer


class Engine:
    """A loaded bundle. Several generations may run at once, in one thread or in many; they share reads of weights."""

    def __init__(
        self, bundle: Bundle, decoder: Decoder, *, mode: Mode = "auto", tokenizer: Future[Tokenizer] | None = None
    ) -> None:
        """Put an engine together. Use `load` to get one."""
        prompts = PromptFormat(bundle, tokenizer)
        vocab_size = bundle.manifest.model.vocab_size
        self.loaded = Loaded(
            bundle=bundle,
            decoder=decoder,
            router=Router(bundle),
            prompts=prompts,
            grammars=JsonGrammars(prompts.tokenizer, vocab_size=vocab_size, eos_token_ids=prompts.eos_token_ids),
            draft_costs=DraftCosts(),
            mode=mode,
        )
        self.bundle, self.decoder, self.mode, self.router = bundle, decoder, mode, self.loaded.router
        self.tokenizer, self.chat_template = prompts.tokenizer, prompts.chat_template
        self.eos_token_ids, self.special_tokens = prompts.eos_token_ids, prompts.special_tokens
        self.driver = Driver(Scheduler(decoder))
        if bundle.token_shares is not None and not decoder.token_shares_pay:
            _log.info("token_share: this machine reads all weights as fast; nothing is left out")

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    # A text is also a sequence of texts, of one character each; it is never taken for one.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, **options: Unpack[GenerationKeywords]
    ) -> Generation: ...

    @overload
    def generate(self, prompt: Prompts, **options: Unpack[GenerationKeywords]) -> list[Generation]: ...

    def generate(
        self, prompt: Prompt | Prompts, **keywords: Unpack[GenerationKeywords]
    ) -> Generation | list[Generation]:
        """Generate a whole answer; the keywords are the fields of `GenerationOptions`.

        Args:
            prompt: one prompt, as for `stream`; or a list of prompts, all texts or all lists of messages, which are
                answered together: prompts of one cluster share each read of the weights. Each gets the text that it
                would get alone. A list of messages (a list of dicts) is always one conversation.
        Returns:
            The text, its token ids, and measurements; for several prompts a list of these, in the order of the prompts.
        Raises:
            ConfigError: as `stream`; or `on_token` is given with several prompts.
        """
        options = GenerationOptions(**keywords)
        if is_batch(prompt):
            return self.answer_all(prompt, options)
        reader = self.loaded.prompts.call_reader(options.offered_tools)
        if options.on_token is not None:
            return collect(list(self.start(cast(Prompt, prompt), options)), reader)
        run = prepare(self.loaded, read_request(self.loaded, cast(Prompt, prompt), options), options)
        return collect(self.driver.finish([run])[0], reader)

    def stream(self, prompt: Prompt, **options: Unpack[GenerationKeywords]) -> Generator[Token, None, None]:
        """Generate token by token; the same prompt, options and seed return the same text, whatever ran before.

        The keywords are the fields of `GenerationOptions`.

        Args:
            prompt: a text, or a list of chat messages ({"role", "content"}). A text is what a user says; where the
                model has no chat template, or with the option `raw`, it is continued as it is. A message of the
                assistant may have "tool_calls"; a message of role "tool" answers one of them by its "tool_call_id".
        Yields:
            A `Token` for each token; the last has a finish reason.
        Raises:
            ConfigError: an argument is wrong, or the prompt is too long.
        """
        return self.start(prompt, GenerationOptions(**options))

    def start(self, prompt: Prompt, options: GenerationOptions = DEFAULTS) -> Generator[Token, None, None]:
        """Generate token by token, with the options of `stream` in one object."""
        # Arguments are checked when a stream is made, not when its first token is asked for.
        return self._answer(read_request(self.loaded, prompt, options), options)

    def answer_all(self, prompts: Prompts, options: GenerationOptions = DEFAULTS) -> list[Generation]:
        """Answer several prompts together, with the options of `generate` in one object."""
        requests = read_requests(self.loaded, prompts, options)
        runs = [prepare(self.loaded, request, options) for request in requests]
        reader = self.loaded.prompts.call_reader
        return [collect(tokens, reader(options.offered_tools)) for tokens in self.driver.finish(runs)]

    def astream(self, prompt: Prompt, options: GenerationOptions = DEFAULTS) -> AsyncGenerator[Token, None]:
        """Generate token by token for asyncio, in a worker thread; closing the stream ends the generation."""
        return in_thread(self.start(prompt, options))

    def conversation(self, system: str | None = None) -> Conversation:
        """Begin a conversation, whose turns reuse what the KV cache holds of it.

        Args:
            system: the system message.
        """
        return Conversation(self.loaded, self._answer, system=system)

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of a conversation in the model's chat template.

        Raises:
            ConfigError: the model has no chat template, or the template refuses the messages.
        """
        return self.loaded.prompts.read_messages(messages)

    def submit(self, prompt: Prompt, options: GenerationOptions, post: Post, *, watched: bool = True) -> Run:
        """Begin a generation that another thread decodes, the one in `driver.serve`.

        Args:
            post: called in that thread with each token, or with the exception that ended the generation; must not
                block.
            watched: whether tokens should come evenly; if none is watched, more are decoded in the same time.
        Returns:
            The run, which `driver.end` takes to end it early.
        Raises:
            ConfigError: as `stream`.
        """
        run = prepare(self.loaded, read_request(self.loaded, prompt, options), options)
        run.watched, run.post = watched, post
        self.driver.submit(run)
        return run

    def _answer(self, request: Request, options: GenerationOptions) -> Generator[Token, None, None]:
        run = prepare(self.loaded, request, options)
        # A token is decoded when it is asked for.
        run.watched, run.ahead = True, 1
        return self.driver.stream(run)
