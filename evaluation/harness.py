"""A bundle as a model of lm-evaluation-harness.

    coreinfer-lm-eval --model coreinfer --model_args bundle=DIR,mode=similarity --tasks ...

is `lm_eval` with this model registered: the harness finds models of other packages only once they are imported.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from coreinfer.bundles.shared.command import command_errors
from coreinfer.bundles.shared.extras import needs_extra
from coreinfer.runtime.decoding.text import text_after
from coreinfer.runtime.prompts.chat_template import render_chat
from tqdm import tqdm

from .logits import greedy_ids, log_likelihood
from .subjects import BundleSubject
from .tasks import Tools, encode_pair

with needs_extra("lm-evaluation-harness", "lm-eval"):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

__all__ = ["CoreInferLM", "main"]

_DEFAULT_NEW_TOKENS = 256


@register_model("coreinfer")
class CoreInferLM(LM):  # type: ignore[misc]
    """Scores and generates with a bundle; all scored tokens are predicted by the mode's own FFN."""

    def __init__(
        self,
        bundle: str,
        mode: str = "similarity",
        engine: Any = "auto",
        dtype: Any = "auto",
        threads: int | None = None,
        **_harness: Any,
    ) -> None:
        """Load a bundle.

        Args:
            bundle: folder.
            mode: of `subjects.MODES`.
            engine: "native", "torch" or "auto".
            dtype: arithmetic of the torch engine, such as "float32"; "auto" as the runtime has it.
            threads: CPU threads; None for all cores.
            _harness: batch size, device and others that the harness hands to every model; there is no use for them.
        """
        super().__init__()
        self._subject = BundleSubject(
            Path(bundle), modes=(mode,), engine=engine, dtype=dtype, threads=None if threads is None else int(threads)
        )
        self._mode = mode
        loaded = self._subject.engine
        self._tools = Tools(
            tokenizer=loaded.tokenizer, eos_ids=loaded.eos_token_ids, room=loaded.manifest.model.max_positions
        )

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness keeps requests apart."""
        return self._subject.name

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is the greedy one."""
        return [self._score(*request.args) for request in tqdm(requests, desc="loglikelihood")]

    def _score(self, context: str, continuation: str) -> tuple[float, bool]:
        if context:
            # As the harness's own models have it: spaces at the end are the beginning of what follows.
            stem = context.rstrip()
            ids, rest = encode_pair(self._tools, stem or context, (context[len(stem) :] if stem else "") + continuation)
        else:
            ids, rest = [], self._tools.encode(continuation)
        return self._score_ids(ids, rest, context)

    def _score_ids(self, ids: Sequence[int], rest: Sequence[int], routing_text: str) -> tuple[float, bool]:
        # Without a context the text's first token is given: nothing predicts it.
        ids, rest = (ids, rest) if ids else (rest[:1], rest[1:])
        # What does not fit is cut off at the left.
        ids = ids[-max(1, self._tools.room - len(rest)) :]
        if not rest:
            return 0.0, True
        self._subject.read(ids[:-1], routing_text)
        self._subject.begin(self._mode)
        logits = self._subject.append([ids[-1], *rest[:-1]], all_logits=True)
        return log_likelihood(logits, rest)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        return [self._roll(request.args[0]) for request in tqdm(requests, desc="loglikelihood_rolling")]

    def _roll(self, text: str) -> float:
        ids, total = self._tools.encode(text), 0.0
        room = self._tools.room
        for first in range(0, len(ids), room - 1):
            # The token before a window is its context.
            before = ids[max(0, first - 1) : first]
            window = ids[first : first + room - 1]
            total += self._score_ids(before, window, self._tools.decode(window[: room // 2]))[0]
        return total

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, up to the first of the texts that end them."""
        return [self._generate(*request.args) for request in tqdm(requests, desc="generate_until")]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        if options.get("do_sample") and float(options.get("temperature", 1.0)) > 0:
            raise NotImplementedError("coreinfer: expected greedy decoding, got do_sample; set temperature 0")
        budget = int(options.get("max_gen_toks", _DEFAULT_NEW_TOKENS))
        ids = self._tools.encode(context)[-(self._tools.room - budget) :]
        self._subject.read(ids[:-1], context)
        self._subject.begin(self._mode)
        answer = greedy_ids(
            partial(self._subject.append, greedy=True),
            ids[-1],
            max_new_tokens=budget,
            eos_ids=self._tools.eos_ids,
            stopped=lambda found: any(stop in text_after(self._tools.tokenizer, ids, found) for stop in stops),
        )
        text = text_after(self._tools.tokenizer, ids, answer)
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation by the bundle's chat template."""
        loaded = self._subject.engine
        if loaded.chat_template is None:
            raise NotImplementedError(f"{self._subject.name} has no chat template; leave --apply_chat_template out")
        return render_chat(
            loaded.chat_template,
            chat_history,
            special_tokens=loaded.special_tokens,
            # As the harness's own models have it: without it the last message is the start of the answer.
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for the harness's record."""
        return self._subject.engine.chat_template


@command_errors
def main() -> None:
    """Run `lm_eval` with the model "coreinfer" registered."""
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
