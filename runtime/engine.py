"""Load a bundle and generate from it: the runtime's main path."""

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, Unpack, cast, get_args, overload

from coreinfer.bundles import Bundle, Manifest, open_bundle
from coreinfer.bundles.shared.machine import give_back_heap
from tokenizers import Tokenizer

from .asynchronous import in_thread
from .conversation import Conversation
from .decoding.drafting import DraftCosts
from .decoding.grammar import JsonGrammars
from .engines.load import CudaGraphs, EngineName, Weights, load_decoder
from .engines.protocol import Decoder
from .generation import MODES, Generation, Mode, Token, collect
from .options import DEFAULTS, GenerationKeywords, GenerationOptions, check_choice
from .prompts.prompt_format import PromptFormat, read_tokenizer
from .prompts.requests import Loaded, Prompt, Prompts, Request, is_batch, read_request, read_requests
from .routing.router import Router
from .scheduling import Driver, Post, Run, Scheduler, prepare

__all__ = ["Engine", "Prompt", "Prompts", "load"]


def load(
    bundle_dir: str | Path,
    *,
    engine: EngineName = "auto",
    device: str = "auto",
    mode: Mode = "auto",
    threads: int | None = None,
    dtype: str = "auto",
    isa: str = "auto",
    kv_cache_mb: float | None = None,
    gpu_memory_mb: float | None = None,
    cuda_graphs: CudaGraphs = "auto",
    weights: Weights = "auto",
) -> "Engine":
    """Open a bundle, check it, and make it ready to generate.

    Everything is checked at once but the contents of cluster packs, each of which is hashed when it is first used.

    Args:
        bundle_dir: a folder that coreinfer-compile wrote.
        engine: "native" (C++, CPU), "torch" (any device), or "auto": native, but torch where there is a GPU or where
            `device` or `dtype` asks for it.
        device: a torch device, or "auto" for a GPU when there is one.
        mode: how FFN weights are chosen when `generate` is not told.
        threads: CPU threads; None for one a core.
        dtype: of the torch engine: "bfloat16", "float32", or "auto" for bfloat16 where the device computes it natively.
        isa: kernels of the native engine, such as "avx2"; "auto" for COREINFER_ISA, else the best that the CPU has.
        kv_cache_mb: megabytes (10^6 bytes) of keys and values, for all generations together; None for half of the free
            memory, but no more than 64 whole contexts need. Memory is taken as it is used. A prompt that has no room in
            it alone is refused, and an answer ends where there is none.
        gpu_memory_mb: of the torch engine: megabytes of weights and KV cache on the GPU; None for what is free. Where
            the dense FFN does not fit, its layers are streamed while a prompt is read (docs/gpu.md).
        cuda_graphs: of the torch engine: decode in recorded steps of fixed shapes; "auto" on a GPU, unless a recorded
            step differs from the step itself.
        weights: of the torch engine: "packed" multiplies by int4 weights as they are, "bfloat16" unpacks them; "auto"
            is packed for int4 on a GPU whose product comes out right.
    Raises:
        BundleError: there is no bundle, or it is damaged; all damaged files are named.
        ConfigError: an argument is wrong, or the engine's packages are not installed.
        UnsupportedModelError: engine "native" does not compute this model.
    """
    check_choice("mode", mode, MODES)
    check_choice("engine", engine, get_args(EngineName))
    check_choice("cuda_graphs", cuda_graphs, get_args(CudaGraphs))
    check_choice("weights", weights, get_args(Weights))
    bundle, tokenizer = _open(bundle_dir)
    decoder = load_decoder(
        bundle,
        engine=engine,
        device=device,
        threads=threads,
        dtype=dtype,
        isa=isa,
        kv_cache_mb=kv_cache_mb,
        gpu_memory_mb=gpu_memory_mb,
        cuda_graphs=cuda_graphs,
        weights=weights,
    )
    loaded = Engine(bundle, decoder, mode=mode, tokenizer=tokenizer)
    # Parsing tokenizers leaves 10 to 20 MB free; giving it back takes 1 to 5 ms.
    give_back_heap()
    return loaded


def _open(bundle_dir: str | Path) -> tuple[Bundle, Future[Tokenizer]]:
    """Open a bundle, and meanwhile do what comes after: hashing leaves Python's lock to it.

    Returns:
        The bundle, and what parsing gave or raised; its thread has ended.
    Raises:
        BundleError: as `load`; whatever parsing says of a damaged bundle is dropped.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="coreinfer-load") as pool:
        # First, because parsing keeps the lock to its end: an import lets the threads that hash begin.
        pool.submit(import_module, "faiss")
        tokenizer = pool.submit(read_tokenizer, Path(bundle_dir))
        return open_bundle(bundle_dir, lazy_packs=True), tokenizer


class Engine:
    """A loaded bundle. Several generations may run at once, in one thread or in many; they share passes."""

    def __init__(
        self, bundle: Bundle, decoder: Decoder, *, mode: Mode = "auto", tokenizer: Future[Tokenizer] | None = None
    ) -> None:
        """Put an engine together; `load` is the way to get one."""
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

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
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
        """Generate text; the keywords are the fields of `GenerationOptions`.

        Args:
            prompt: as `stream` takes it; or a list of such prompts, all texts or all lists of messages, which are
                answered together: prompts of one cluster share each read of the weights. Each gets the text that it
                would get alone. A list of messages (a list of dicts) is always one conversation.
        Returns:
            The text, its token ids, and what was measured; of several prompts a list in their order.
        Raises:
            ConfigError: as `stream`; or `on_token` is given, which does not go with several prompts.
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
        """Generate token by token; the same prompt, options and seed give the same text, whatever ran before.

        The keywords are the fields of `GenerationOptions`.

        Args:
            prompt: chat messages ({"role", "content"}) for the chat template, of which the assistant's may have
                "tool_calls", and one of role "tool" answers one by its "tool_call_id"; or a text: what a user says
                where the model has a chat template, and to be continued as it is where it has none or the option `raw`
                is set.
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
        """Begin a conversation, whose turns keep what the KV cache holds of it.

        Args:
            system: the system message.
        """
        return Conversation(self.loaded, self._answer, system=system)

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation in the model's chat template.

        Raises:
            ConfigError: the model has no chat template, or it refuses the messages.
        """
        return self.loaded.prompts.read_messages(messages)

    def submit(self, prompt: Prompt, options: GenerationOptions, post: Post) -> Run:
        """Begin a generation for a thread that steps for all, in `driver.serve`.

        Args:
            post: is given each token, or the exception that ended the generation, in that thread; must not block.
        Returns:
            What `driver.end` takes to end it early.
        Raises:
            ConfigError: as `stream`.
        """
        run = prepare(self.loaded, read_request(self.loaded, prompt, options), options)
        run.watched, run.post = True, post
        self.driver.submit(run)
        return run

    def _answer(self, request: Request, options: GenerationOptions) -> Generator[Token, None, None]:
        run = prepare(self.loaded, request, options)
        # A token is decoded when it is asked for.
        run.watched, run.ahead = True, 1
        return self.driver.stream(run)
