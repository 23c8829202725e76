"""Load a model and its tokenizer, and know its shapes before a byte of weights is read."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from coreinfer.bundles.errors import ConfigError, UnsupportedModelError
from coreinfer.bundles.families import FAMILIES, Family, cache_argument, family_of_config, resolve
from coreinfer.bundles.manifest import ModelRecord
from coreinfer.compiler.config import DType
from coreinfer.runtime.engines.torch.joined import take_apart
from coreinfer.runtime.engines.torch.mixture import Mixture, take_experts
from coreinfer.runtime.engines.torch.sparse_gate import take_sparse_gates
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import extract_commit_hash

from .built_config import build_config
from .checkpoint import LOADING_ERRORS, check_files, check_finite, check_loaded, check_tied_head
from .devices import pick_device, pick_dtype
from .gguf.config import config_fields
from .gguf.parts import read_parts
from .gguf.tokenizer import build_tokenizer
from .gguf.weights import load_weights
from .mapped import convert_on_use
from .multimodal.text_chats import with_text_templates
from .multimodal.text_models import TEXT_NAMES, Multimodal
from .multimodal.text_part import log_left_out, parts_of, read_text_config, without_others
from .quiet import quiet_transformers
from .record import column_norms, record_of
from .settings import check_settings
from .source_files import source_file
from .sources import ModelSource
from .stated import CONFIG, check_mappable, check_stays_mapped
from .states import StateForm, state_form
from .tokenizer_files import check_templates, with_own_file
from .unpack.asked import settings_of
from .unpack.methods import check_family, check_quantization
from .unpack.weights import load_unpacked
from .vocabulary import fit_tokenizer

__all__ = [
    "LoadedModel",
    "hub_revision",
    "load_model",
    "load_tokenizer",
    "read_config",
    "stop_ids",
    "wrap_model",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A causal language model ready to be profiled.

    Attributes:
        model: the transformers model, in evaluation mode, on `device`.
        record: what the manifest says of it.
        dtype: that it computes in; weights that stay in their file may have another.
        keeps_in: dtype in which what its layers did with a whole text is kept: bfloat16 unless another was asked for.
        column_norms: (layers, ffn_dim) float32, L2 norms of the down projections' columns; of a mixture (layers,
            experts) ones, for what experts put out is measured as it is.
        mapped: whether weights stay in their file, because all of them at once would be too much.
    """

    model: nn.Module
    tokenizer: Any
    family: Family
    record: ModelRecord
    device: torch.device
    dtype: torch.dtype
    keeps_in: torch.dtype
    column_norms: np.ndarray[Any, np.dtype[np.float32]]
    mapped: bool = False

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return list(resolve(self.model, self.family.layers))

    def forward(self, token_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Read tokens after those in the cache, which grows: (batch, tokens) -> (batch, tokens, vocabulary)."""
        logits: torch.Tensor = self.model(token_ids, use_cache=True, **cache_argument(self.model, cache)).logits
        return logits

    def read(self, token_ids: torch.Tensor, cache: Cache) -> None:
        """Read tokens for the sake of the cache alone."""
        self.states(token_ids, cache)

    def states(
        self,
        token_ids: torch.Tensor,
        cache: Cache,
        weights: Mapping[str, torch.Tensor] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Read tokens as `forward` does, up to the head.

        Args:
            weights: by the model's own names, in the place of its weights; gradients go through to them.
            arguments: of the model's forward pass, such as a mask of the places in the cache.
        Returns:
            (batch, tokens, size) what the head reads.
        """
        body, prefix = cast("nn.Module", self.model.base_model), f"{self.model.base_model_prefix}."
        own = {name.removeprefix(prefix): weight for name, weight in (weights or {}).items()}
        passed = {"input_ids": token_ids, "use_cache": True, **cache_argument(self.model, cache), **(arguments or {})}
        states: torch.Tensor = functional_call(body, own, kwargs=passed).last_hidden_state
        return states

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of what `states` returns: (..., size) -> (..., vocabulary)."""
        model = cast("PreTrainedModel", self.model)
        head: nn.Module = model.get_output_embeddings()
        logits: torch.Tensor = head(states)
        if (divisor := getattr(model.config, "logits_scaling", None)) not in (None, 1):
            logits = logits / divisor
        cap = getattr(model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def states_form(self) -> StateForm:
        """What a token takes from layer to layer."""
        return state_form(self.family, self.model.config)

    def cutoff(self, layer: int) -> nn.Module | None:
        """What says how much is taken off a layer's gates; None where nothing is."""
        path = self.family.cutoff
        parent, _, name = (path or "").rpartition(".")
        return None if path is None else getattr(resolve(self.layers[layer], parent), name, None)

    def mixture(self, layer: int) -> Mixture:
        """The mixture of experts that a layer's FFN is."""
        assert self.family.experts is not None
        module = resolve(self.layers[layer], self.family.experts.module)
        assert isinstance(module, Mixture)
        return module

    def projection(self, layer: int, role: str) -> nn.Linear:
        """One linear module of a layer's FFN: "gate", "up" or "down"."""
        module = resolve(self.layers[layer], self.family.projections[role])
        assert isinstance(module, nn.Linear)
        return module


def read_config(source: ModelSource) -> tuple[Family, PreTrainedConfig]:
    """Read a model's config, refusing a family that is not in the table before any weight is loaded.

    Raises:
        ConfigError: there is no such model, or its config cannot be read.
        UnsupportedModelError: its family, its quantization or another of its settings is not supported.
    """
    if source.gguf_file:
        fields = config_fields(read_parts(source.gguf_path), source.name)
        config = build_config(fields, f"--model {source.name}: its header")
        return family_of_config(config.to_dict(), source.name), config
    try:
        with quiet_transformers():
            config = read_text_config(source) or AutoConfig.from_pretrained(source.location)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = _first_line(error)
        if "not supported" in reason or "does not recognize" in reason:
            supported = ", ".join(family.name for family in FAMILIES)
            raise UnsupportedModelError(f"--model {source.name}: {reason}; supported families: {supported}") from error
        raise ConfigError(
            f"--model {source.name}: no model can be read there ({reason}); "
            "give a Hub id, a folder with config.json, a .gguf file or package:NAME/PATH"
        ) from error
    family = family_of_config(config.to_dict(), source.name)
    check_quantization(config.to_dict(), f"--model {source.name}")
    check_family(family, config.to_dict(), f"--model {source.name}")
    check_settings(family, config, source.name)
    return family, config


def hub_revision(source: ModelSource) -> str | None:
    """Find the commit of a model on the Hub that is read; None of a local one, or where it cannot be told."""
    if source.path is not None:
        return None
    found = source_file(source, CONFIG)
    return extract_commit_hash(str(found) if found else None, None)


def load_model(
    source: ModelSource, family: Family, config: PreTrainedConfig, *, device: str, dtype: DType, mapped: bool = False
) -> LoadedModel:
    """Load a model for profiling; family and config are what `read_config` returned.

    Args:
        mapped: leave the weights in their file, in their stored dtype, and convert each layer's while it runs.
    Raises:
        ConfigError: the model, the device or the dtype is not available.
    """
    target, what = pick_device(device), f"--model {source.name}"
    quantized = not source.gguf_file and settings_of(config.to_dict()) is not None
    if mapped:
        check_mappable(source)
        check_stays_mapped(family, source.name)
    if mapped and quantized:
        raise ConfigError(
            f"--max-memory: expected plain weights, which can stay in their file, and those of {source.name} are "
            "quantized; leave out --max-memory, or give the model that it was quantized from"
        )
    computes_in = pick_dtype(dtype, target)
    try:
        with quiet_transformers():
            parts = parts_of(source)
            if not source.gguf_file and not quantized and source.path:
                check_files(source.path, what, parts)
            if quantized:
                model = load_unpacked(_folder(source), config, what, dtype=computes_in, parts=parts)
            else:
                model = _read_weights(source, config, computes_in, parts, mapped=mapped)
    except LOADING_ERRORS as error:
        raise ConfigError(f"{what}: its weights cannot be loaded ({_first_line(error)})") from error
    if parts is not None:
        log_left_out(source, parts)
    tied = bool(config.tie_word_embeddings)
    check_tied_head(model, resolve(model, family.embedding), tied=tied, what=what)
    check_finite(model, what)
    model = model.eval().to(target)
    tokenizer = load_tokenizer(source)
    fit_tokenizer(tokenizer, resolve(model, family.embedding).num_embeddings, source.name)
    loaded = wrap_model(model, tokenizer, family=family, name=source.name, config=config)
    if mapped:
        convert_on_use(model, family, computes_in)
    # float32 may be computed in for speed alone, and would take twice the memory.
    keeps_in = torch.bfloat16 if dtype == "auto" else computes_in
    return replace(loaded, dtype=computes_in, keeps_in=keeps_in, mapped=mapped)


def _read_weights(
    source: ModelSource, config: PreTrainedConfig, dtype: torch.dtype, parts: Multimodal | None, *, mapped: bool
) -> PreTrainedModel:
    """Read all parameters from the model's files, and nothing else."""
    if source.gguf_file:
        return load_weights(read_parts(source.gguf_path), config, dtype=dtype, name=source.name)
    text_alone = {"config": config, "key_mapping": dict(TEXT_NAMES)} if parts else {}
    loading: Any = AutoModelForCausalLM.from_pretrained(
        source.location,
        dtype="auto" if mapped else dtype,
        # Both for `check_loaded`, which names what does not fit.
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **text_alone,
    )
    model, info = loading
    check_loaded(without_others(info, parts) if parts else info, f"--model {source.name}")
    return cast("PreTrainedModel", model)


def _folder(source: ModelSource) -> Path:
    """The folder of a model's safetensors files; those of a Hub model are downloaded, unless they were before."""
    patterns = ["*.safetensors", SAFE_WEIGHTS_INDEX_NAME, "generation_config.json"]
    return source.path or Path(snapshot_download(source.location, allow_patterns=patterns))


def _first_line(error: BaseException) -> str:
    first, rest = (*str(error).strip().split("\n", 1), "")[:2]
    return f"{first} {rest.strip()}" if first.endswith(":") else first


def wrap_model(model: nn.Module, tokenizer: Any, *, family: Family, name: str, config: PreTrainedConfig) -> LoadedModel:
    """Describe a model that is in memory already; modules that are several in one are taken apart."""
    take_apart(model, family)
    take_experts(model, family)
    take_sparse_gates(model, family)
    record = record_of(model, family, name, config)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        family=family,
        record=record,
        device=next(model.parameters()).device,
        dtype=next(model.parameters()).dtype,
        keeps_in=next(model.parameters()).dtype,
        column_norms=column_norms(model, family, record),
    )


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer of a model.

    Raises:
        ConfigError: there is none, or it has no `tokenizer.json` form that the runtime can use.
    """
    tokenizer: Any
    try:
        with quiet_transformers():
            if source.gguf_file:
                tokenizer = build_tokenizer(read_parts(source.gguf_path), source.name)
            else:
                tokenizer = AutoTokenizer.from_pretrained(source.location)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model {source.name}: its tokenizer cannot be loaded ({_first_line(error)})") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(f"--model {source.name}: its tokenizer has no fast form (tokenizer.json); convert it first")
    check_templates(tokenizer, source.name)
    return tokenizer if source.gguf_file else with_text_templates(with_own_file(tokenizer, source), source)


def stop_ids(loaded: LoadedModel) -> set[int]:
    """Token ids that end a text, from the model's generation defaults and its tokenizer."""
    defaults = getattr(loaded.model, "generation_config", None)
    stops = getattr(defaults, "eos_token_id", None)
    found = {*stops} if isinstance(stops, list) else {stops}
    found.add(loaded.tokenizer.eos_token_id)
    return {int(stop) for stop in found if stop is not None}
