"""What a compile reads, found and looked at before torch is imported: most refusals come within a second."""

from dataclasses import dataclass

from coreinfer.bundles.errors import ConfigError
from coreinfer.bundles.families import family_of_config
from coreinfer.bundles.shared.extras import require_package
from coreinfer.bundles.writer import check_target

from .config import CompileConfig
from .expert_options import check_expert_options, check_no_expert_options
from .models.sources import ModelSource, find_encoder, find_source
from .models.stated import check_mappable, check_stays_mapped, stated_config
from .stream_options import check_stream_options
from .text.reading import check_elsewhere, is_local, read_order, read_texts, text_sources

__all__ = ["Inputs", "check_document_tokens", "check_zero_neurons", "find_inputs"]

_MOST_CHECKED = 64
"""Of the files at addresses, the first that will be read: of a million files most never are."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a compile reads, not yet loaded.

    Attributes:
        model: to be compiled.
        encoder: of sentences.
        texts: sources of calibration text, with the files of a folder in its place.
    """

    model: ModelSource
    encoder: ModelSource
    texts: tuple[str, ...]


def find_inputs(config: CompileConfig) -> Inputs:
    """Find what a compile reads, and refuse what can be refused without loading any of it.

    What is on the Hub is not looked at.

    Raises:
        CoreInferError: the target exists, an input is missing or is none, the model's family is not supported, or an
            option does not fit the model.
    """
    if config.ray is not None:
        require_package("ray", "--ray", "'coreinfer[ray]'")
    check_target(config.output, force=config.force)
    texts = text_sources(config.calibration)
    model, encoder = find_source(config.model), find_encoder(config.encoder)
    _check_model(config, model)
    if config.max_memory is not None:
        check_mappable(model)
    # Read again when the tokenizer is there: a model may take minutes to load, text never does.
    read_texts([source for source in texts if is_local(source)], config.text_field)
    for source in read_order(texts, config.seed)[:_MOST_CHECKED]:
        check_elsewhere(source, config.text_field)
    return Inputs(model=model, encoder=encoder, texts=tuple(texts))


def _check_model(config: CompileConfig, model: ModelSource) -> None:
    stated = stated_config(model)
    if stated is None:
        return
    family = family_of_config(stated, model.name)
    check_stream_options(config, family, model.name)
    if config.max_memory is not None:
        check_stays_mapped(family, model.name)
    if family.experts is not None:
        check_expert_options(config, model.name)
    else:
        check_no_expert_options(config, model.name)
    # What the files leave out has the default of the model's class, which is known when it is loaded.
    if isinstance(activation := family.activation or stated.get(family.activation_field), str):
        # Which layers cut their gates off may be the class's default too.
        check_zero_neurons(config, activation, activation == "relu" or family.cutoff is not None)
    if isinstance(max_positions := stated.get(family.config_field("max_position_embeddings")), int):
        check_document_tokens(config, max_positions)


def check_document_tokens(config: CompileConfig, max_positions: int) -> None:
    """Check that the model can read a document.

    Args:
        max_positions: that the model reads.
    Raises:
        ConfigError: documents are longer.
    """
    if config.document_tokens > max_positions:
        raise ConfigError(
            f"--document-tokens {config.document_tokens}: the model reads {max_positions} at most; give fewer"
        )


def check_zero_neurons(config: CompileConfig, activation: str, has_zero: bool) -> None:
    """Check that neurons are zero where they are to be left out.

    Args:
        activation: the model's.
        has_zero: whether most of any layer's may be, see `zero_neurons`.
    Raises:
        ConfigError: they are not.
    """
    if config.by_neuron and not has_zero:
        raise ConfigError(
            f"--by-neuron: expected a model whose activation is relu, or which cuts gates off, got {activation}; "
            "compile without it"
        )
