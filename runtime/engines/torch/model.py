"""Build the transformers model of a bundle: first without memory, then with the base's weights."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError
from coreinfer.bundles.contract import is_norms
from coreinfer.bundles.families import Family, family_by_name, resolve
from coreinfer.bundles.formats import float_matrix, stored_parts
from coreinfer.bundles.shared.machine import cpu_multiplies_bf16
from coreinfer.bundles.tensors import StoredTensor, TensorFile
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .joined import take_apart
from .mixture import ExpertRun, take_experts
from .packed_linear import replace_linear
from .sparse_gate import take_sparse_gates

__all__ = [
    "base_bytes",
    "decoder_layers",
    "empty_model",
    "fill_model",
    "matrix_to_torch",
    "pick_device",
    "pick_dtype",
    "to_torch",
    "watch_activations",
]

Floats = npt.NDArray[np.float32]
Place = Callable[[torch.Tensor], torch.Tensor]
Collect = Callable[[int, int, Floats, Floats | None], None]
"""Takes a layer, an expert (0 where the FFN is one), its activations (tokens, neurons), and of an expert what the
router multiplies its outputs by, (tokens,)."""
_PACKED_SUFFIX = re.compile(r"\.(q4|q8|high|low|scale|zero)$")


def empty_model(bundle: Bundle, device: torch.device, dtype: torch.dtype, *, packed: bool) -> nn.Module:
    """Build the model without memory for its weights; those of the FFN can be swapped by `assign_ffn`.

    Args:
        packed: let the FFN's modules take packed weights too.
    """
    model = _model_of_config(bundle, dtype)
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).register_buffer(leaf, torch.empty_like(buffer, device=device), persistent=False)
    # Only those buffers are filled in: parameters are still without memory.
    _fill_buffers(model, model)
    family = family_by_name(bundle.manifest.model.family)
    _empty_ffn(model, family, device, dtype, packed=packed)
    empty: nn.Module = model
    return empty


def _fill_buffers(module: Any, owner: Any) -> None:
    """Let each module be filled by the innermost of transformers' models that it belongs to, whose sizes it may ask."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        _fill_buffers(child, owner)
    owner._init_weights(module)


def decoder_layers(model: nn.Module, family: Family) -> list[nn.Module]:
    """List the decoder layers."""
    return list(resolve(model, family.layers))


def base_bytes(model: nn.Module) -> int:
    """Memory that the base of an empty model will take; a tied head counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def fill_model(model: Any, bundle: Bundle, dtype: torch.dtype, place: Place) -> None:
    """Put the base's tensors into an empty model.

    Args:
        place: puts a host tensor of the model's dtype where the model is to run.
    Raises:
        BundleCorrupt: the base does not hold what the model needs.
    """
    tensors = _base_tensors(bundle, model, dtype, place)
    try:
        _, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        # Shapes that differ are raised even where names may.
        reason = " ".join(str(error).split())
        raise BundleCorrupt(
            f"{bundle.base.path}: does not fit the model ({reason}); compile the bundle again"
        ) from error
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if unexpected or missing:
        raise BundleCorrupt(
            f"{bundle.base.path}: does not fit the model: missing {missing or 'nothing'}, "
            f"unknown {unexpected or 'nothing'}; compile the bundle again"
        )
    model.eval().requires_grad_(False)


def to_torch(stored: StoredTensor) -> torch.Tensor:
    """Wrap stored values without a copy."""
    if stored.dtype == "BF16":
        return torch.from_numpy(stored.array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(stored.array)


def matrix_to_torch(file: TensorFile, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """Wrap a stored matrix without a copy, or unpack it."""
    kind, parts = stored_parts(file, name)
    if kind in ("bf16", "f32"):
        return to_torch(parts[0])
    return torch.from_numpy(float_matrix(file, name, shape))


def _base_tensors(bundle: Bundle, model: nn.Module, dtype: torch.dtype, place: Place) -> dict[str, torch.Tensor]:
    """Read the base under the names of the model's parameters; names that it does not know are passed on.

    Raises:
        BundleCorrupt: a packed matrix does not fit the model.
    """
    shapes = {name: (parameter.shape[0], parameter.shape[-1]) for name, parameter in model.named_parameters()}
    names = {_PACKED_SUFFIX.sub("", name): None for name in bundle.base if not is_norms(name)}
    tensors = {}
    for name in names:
        if name in bundle.base:
            tensors[name] = place(to_torch(bundle.base[name]).to(dtype))
        elif name in shapes:
            with _fitting(bundle.base):
                tensors[name] = place(matrix_to_torch(bundle.base, name, shapes[name]).to(dtype))
        else:
            tensors[name] = torch.empty(0)
    return tensors


@contextmanager
def _fitting(file: TensorFile) -> Iterator[None]:
    """Turn parts of a packed matrix that are missing or of the wrong shape into an error that names the file."""
    try:
        yield
    except (KeyError, ValueError) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise BundleCorrupt(f"{file.path}: does not fit the model: {reason}; compile the bundle again") from error


def _model_of_config(bundle: Bundle, dtype: torch.dtype) -> Any:
    """Build the model of the manifest's config without memory for its weights."""
    settings = dict(bundle.manifest.model.config)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleCorrupt(
            f"bundle {bundle.path}: transformers builds no model from manifest.model.config ({reason}); "
            "compile the bundle again, or upgrade transformers"
        ) from error
    family = family_by_name(bundle.manifest.model.family)
    take_apart(model, family)
    take_experts(model, family)
    take_sparse_gates(model, family)
    return model


def _empty_ffn(model: nn.Module, family: Family, device: torch.device, dtype: torch.dtype, *, packed: bool) -> None:
    """Prepare the FFN modules for weights that `assign_ffn` can swap; weights come with the first choice."""
    for layer in resolve(model, family.layers):
        for role, path in family.projections.items():
            if packed:
                replace_linear(layer, path, keep_padding=role != "down")
                continue
            module = layer.get_submodule(path)
            for name, _ in list(module.named_parameters()):
                empty = torch.empty(0, device=device, dtype=dtype)
                module.register_parameter(name, nn.Parameter(empty, requires_grad=False))


@contextmanager
def watch_activations(layers: Sequence[nn.Module], family: Family, collect: Collect) -> Iterator[None]:
    """Call `collect` with the input of every down projection, those of experts each by itself."""
    with ExitStack() as ends:
        for number, layer in enumerate(layers):
            if family.experts is not None:
                mixture: Any = layer.get_submodule(family.experts.module)
                mixture.watch = partial(_collect_run, collect, number)
                ends.callback(setattr, mixture, "watch", None)
                continue
            hook = partial(_collect_inputs, collect, number)
            ends.callback(resolve(layer, family.down).register_forward_pre_hook(hook).remove)
        yield


def _collect_inputs(collect: Collect, layer: int, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    collect(layer, 0, _rows_on_host(inputs[0]), None)


def _collect_run(collect: Collect, layer: int, run: ExpertRun) -> None:
    collect(layer, run.expert, _rows_on_host(run.activations), _rows_on_host(run.weights[:, None])[:, 0])


def _rows_on_host(values: torch.Tensor) -> Floats:
    rows: Floats = values.reshape(-1, values.shape[-1]).float().cpu().numpy()
    return rows


def pick_device(name: str) -> torch.device:
    """Find a device by its torch name; "auto" is a GPU where there is one.

    Raises:
        ConfigError: torch cannot use it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        # With its number, which streams and memory queries ask for.
        device = torch.zeros(1, device=device).device
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"device {name!r}: torch cannot use it here ({reason}); try 'cpu'") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Find a dtype by name; "auto" is bfloat16 where the device multiplies it natively.

    Raises:
        ConfigError: there is no such dtype.
    """
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name == "auto":
        return torch.bfloat16 if device.type != "cpu" or cpu_multiplies_bf16() else torch.float32
    if name not in dtypes:
        raise ConfigError(f"dtype: expected auto, {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]
