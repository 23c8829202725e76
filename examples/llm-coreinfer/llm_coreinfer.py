"""Bundles of CoreInfer as models of the command llm: registered by name, loaded with the first prompt."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import llm
from coreinfer import runtime
from pydantic import Field

__all__ = ["BundleModel", "register_commands", "register_models"]


class Options(llm.Options):
    """What is left out is as in coreinfer-run; coreinfer itself checks the values."""

    max_tokens: int | None = Field(default=None, description="Maximum number of tokens to decode.")
    temperature: float | None = Field(default=None, description="0 for the likeliest token each time.")
    top_p: float | None = Field(default=None, description="Share of probability that is drawn from.")
    top_k: int | None = Field(default=None, description="Number of likeliest tokens that are drawn from.")
    seed: int | None = Field(default=None, description="The same seed draws the same text.")
    mode: str | None = Field(default=None, description="How FFN weights are chosen: auto, dense and so on.")


class BundleModel(llm.Model):
    """One bundle."""

    can_stream = True
    supports_schema = True
    Options = Options

    def __init__(self, name: str, place: str) -> None:
        """Name a bundle; `place` is a folder, or an address as `runtime.load` takes it."""
        self.model_id, self.place = name, place

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """Answer the prompt and what came before it; text comes as it is decoded."""
        try:
            yield from self._answer(prompt, response)
        except runtime.CoreInferError as error:
            raise llm.ModelError(str(error)) from error

    def _answer(self, prompt: Any, response: Any) -> Iterator[str]:
        engine = _engine(self.place)
        for token in engine.stream([_message(message) for message in prompt.messages], **_keywords(prompt)):
            response.set_usage(input=token.num_prompt_tokens, output=token.num_tokens)
            if token.text:
                yield token.text


@cache
def _engine(place: str) -> runtime.Engine:
    return runtime.load(place)


def _keywords(prompt: Any) -> Any:
    given = prompt.options.model_dump(exclude_none=True)
    if "max_tokens" in given:
        given["max_new_tokens"] = given.pop("max_tokens")
    if prompt.schema is not None:
        given["json_schema"] = prompt.schema
    return given


def _message(message: Any) -> dict[str, str]:
    unknown = {type(part).__name__ for part in message.parts if not hasattr(part, "text")}
    if unknown:
        raise llm.ModelError(f"a message of {message.role}: expected text, got {', '.join(sorted(unknown))}")
    return {"role": message.role, "content": "".join(part.text for part in message.parts)}


# Which bundles there are


def _list_path() -> Path:
    return llm.user_dir() / "coreinfer.json"


def _places() -> dict[str, str]:
    path = _list_path()
    places: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return places


def _save(places: dict[str, str]) -> None:
    _list_path().write_text(json.dumps(places, indent=1) + "\n", encoding="utf-8")


@llm.hookimpl
def register_models(register: Any) -> None:
    """Offer every bundle that was added."""
    for name, place in _places().items():
        register(BundleModel(name, place))


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """Offer `llm coreinfer add`, `list` and `remove`."""

    @cli.group()
    def coreinfer() -> None:
        """Bundles of CoreInfer."""

    @coreinfer.command()
    @click.argument("name")
    @click.argument("bundle")
    def add(name: str, bundle: str) -> None:
        """Offer BUNDLE, a folder or an address, as the model NAME."""
        is_address = ":" in bundle.split("/")[0]
        if not is_address and not (Path(bundle) / "manifest.json").is_file():
            raise click.BadParameter(f"{bundle} is no bundle: expected a folder with manifest.json")
        _save({**_places(), name: bundle if is_address else str(Path(bundle).resolve())})

    @coreinfer.command("list")
    def list_() -> None:
        """Show names and bundles."""
        for name, place in _places().items():
            click.echo(f"{name}\t{place}")

    @coreinfer.command()
    @click.argument("name")
    def remove(name: str) -> None:
        """Offer a model no more; its bundle stays."""
        places = _places()
        if name not in places:
            raise click.BadParameter(f"{name} is no model of this plugin: expected one of llm coreinfer list")
        del places[name]
        _save(places)
