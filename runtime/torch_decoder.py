"""The torch engine: any device and every family of the table, through transformers."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coreinfer.bundles import Bundle, BundleCorrupt, ConfigError
from coreinfer.bundles.contract import tensor_name
from coreinfer.bundles.families import Family, assign_ffn, cache_argument, family_by_name, resolve
from coreinfer.bundles.formats import PACKED_FORMATS, float_matrix, stored_parts
from coreinfer.bundles.machine import cpu_multiplies_bf16
from coreinfer.bundles.statistics import Selection, document_statistic
from coreinfer.bundles.tensors import StoredTensor, TensorFile
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from .cached import CachedTokens
from .decoder import DENSE, FfnChoice

__all__ = ["TorchDecoder"]

_log = logging.getLogger(__name__)
LayerTensors = list[dict[str, torch.Tensor]]
_PACKED_SUFFIX = re.compile(r"\.(q4|q8|high|low|scale|zero)$")


class TorchDecoder:
    """Runs the transformers model of a bundle, with FFN weights that change by pointer swap.

    On the CPU in bfloat16 the weights are the mapped file itself; other dtypes and devices hold copies of the base,
    of the dense FFN where the bundle has one, and of one pack.
    """

    name = "torch"
    block_tokens = 256

    def __init__(self, bundle: Bundle, *, device: str, dtype: str) -> None:
        """Build the model on the device.

        Raises:
            ConfigError: the device or the dtype cannot be had.
            BundleCorrupt: the base does not hold what the model needs.
        """
        self._bundle = bundle
        self._family = family_by_name(bundle.manifest.model.family)
        self._device = _pick_device(device)
        self._dtype = _pick_dtype(dtype, self._device)
        self._model = _build_model(bundle, self._device, self._dtype)
        self._layers: list[nn.Module] = list(resolve(self._model, self._family.layers))
        self._dense = self._tensors(bundle.dense) if bundle.dense else None
        # Without a config every layer of a cache keeps all tokens; sliding windows are left to the mask.
        self._caches = {0: DynamicCache()}
        self._records = {0: CachedTokens()}
        self.sequence = 0
        self._choice: FfnChoice | None = None
        self._last_pack: dict[int, LayerTensors] = {}
        self.use(DENSE if self._dense else FfnChoice(cluster=0))

    @property
    def device(self) -> str:
        """The torch device."""
        return str(self._device)

    @property
    def num_cached(self) -> int:
        """Tokens in the KV cache."""
        return int(self._caches[self.sequence].get_seq_length())

    @property
    def cached(self) -> CachedTokens:
        """Which tokens are in the KV cache of the selected sequence."""
        return self._records[self.sequence]

    def use(self, choice: FfnChoice) -> None:
        """Run with other FFN weights from the next token on.

        Raises:
            ConfigError: the choice needs the dense FFN and the bundle has none.
        """
        # Arrays do not compare as one, so neuron ids are always gathered.
        if choice.neuron_ids is None and choice == self._choice:
            return
        for layer, tensors in zip(self._layers, self._chosen(choice), strict=True):
            assign_ffn(layer, self._family, tensors)
        self._choice = choice

    def _chosen(self, choice: FfnChoice) -> LayerTensors:
        if choice.cluster is not None:
            # Lossless decoding goes to and fro between one pack and the dense FFN.
            if choice.cluster not in self._last_pack:
                self._last_pack = {choice.cluster: self._tensors(self._bundle.pack(choice.cluster))}
            return self._last_pack[choice.cluster]
        if self._dense is None:
            raise ConfigError(f"bundle {self._bundle.path} has no dense FFN; compile it with --dense or use a cluster")
        if choice.neuron_ids is None:
            return self._dense
        return [_gather(tensors, ids) for tensors, ids in zip(self._dense, choice.neuron_ids, strict=True)]

    def truncate(self, num_tokens: int) -> None:
        """Keep only the first `num_tokens` tokens of the KV cache."""
        self.cached.truncate(num_tokens)
        if num_tokens == 0:
            self._caches[self.sequence] = DynamicCache()
        elif num_tokens < self.num_cached:
            self._caches[self.sequence].crop(num_tokens - self.num_cached)

    def add_sequence(self) -> int:
        """Begin another sequence; see `Decoder.add_sequence`."""
        number = max(self._caches) + 1
        self._caches[number], self._records[number] = DynamicCache(), CachedTokens()
        return number

    def drop_sequence(self, sequence: int) -> None:
        """Give a sequence's memory back; see `Decoder.drop_sequence`."""
        if sequence == 0 or sequence not in self._caches:
            raise ConfigError(f"sequence: expected one that was added, other than 0, got {sequence}")
        del self._caches[sequence], self._records[sequence]
        if sequence == self.sequence:
            self.sequence = 0

    def select(self, sequence: int) -> None:
        """Choose the sequence to go on with; see `Decoder.select`."""
        if sequence not in self._caches:
            raise ConfigError(f"sequence: expected one that was added, got {sequence}")
        self.sequence = sequence

    def forward_rows(self, sequences: Sequence[int], token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens to several sequences, one sequence after another; see `Decoder.forward_rows`."""
        rows: dict[int, list[int]] = {}
        for row, sequence in enumerate(sequences):
            rows.setdefault(sequence, []).append(row)
        if unknown := sorted(set(rows) - set(self._caches)):
            raise ConfigError(f"sequences: expected such that were added, got {unknown[0]}")
        selected = self.sequence
        logits = np.empty((len(token_ids), self._bundle.manifest.model.vocab_size), dtype=np.float32)
        try:
            for sequence, places in rows.items():
                self.select(sequence)
                logits[places] = self.forward([token_ids[row] for row in places], all_logits=True)
        finally:
            self.select(selected)
        return logits

    def forward(
        self, token_ids: Sequence[int], *, all_logits: bool = False, greedy: bool = False
    ) -> npt.NDArray[np.float32]:
        """Append tokens to the KV cache; see `Decoder.forward`. All logits are exact, `greedy` or not."""
        ids = torch.tensor([list(token_ids)], dtype=torch.long, device=self._device)
        with torch.inference_mode():
            output = self._model(
                ids,
                **cache_argument(self._model, self._caches[self.sequence]),
                use_cache=True,
                logits_to_keep=0 if all_logits else 1,
            )
        logits: npt.NDArray[np.float32] = output.logits[0].float().cpu().numpy()
        self.cached.append(token_ids, self._choice)
        return logits

    def prompt_statistics(
        self, token_ids: Sequence[int], selections: Sequence[Selection]
    ) -> tuple[npt.NDArray[np.float32], dict[Selection, npt.NDArray[np.float32]]]:
        """Append a prompt and sum up its FFN activations; see `Decoder.prompt_statistics`."""
        plan, model = self._bundle.manifest.plan, self._bundle.manifest.model
        shape = (model.num_layers, model.ffn_dim)
        statistics = {selection: np.zeros(shape, dtype=np.float32) for selection in selections}

        def collect(layer: int, activations: torch.Tensor) -> None:
            flat = activations.reshape(-1, activations.shape[-1]).float().cpu().numpy()
            for selection, sums in statistics.items():
                sums[layer] = document_statistic(selection, flat, alpha=plan.alpha, beta=plan.beta, sentence=False)

        with _watch_activations(self._layers, self._family, collect):
            logits = self.forward(token_ids)
        return logits, statistics

    def _tensors(self, file: TensorFile) -> LayerTensors:
        manifest = self._bundle.manifest
        wide = (manifest.model.ffn_dim,) * manifest.model.num_layers
        budgets = wide if file is self._bundle.dense else manifest.plan.layer_budgets
        return [self._layer_tensors(file, layer, budget) for layer, budget in enumerate(budgets)]

    def _layer_tensors(self, file: TensorFile, layer: int, num_neurons: int) -> dict[str, torch.Tensor]:
        hidden = self._bundle.manifest.model.hidden_size
        tensors = {}
        for role in self._family.projections:
            name = tensor_name(layer, role)
            shape = (hidden, num_neurons) if role == "down" else (num_neurons, hidden)
            tensors[role] = self._place(_matrix_to_torch(file, name, shape))
            if f"{name}_bias" in file:
                tensors[f"{role}_bias"] = self._place(_to_torch(file[f"{name}_bias"]))
        return tensors

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._dtype)


def _gather(tensors: dict[str, torch.Tensor], neuron_ids: npt.NDArray[np.int32]) -> dict[str, torch.Tensor]:
    """Cut a dense layer down to some neurons; the bias behind the down projection stays whole."""
    ids = torch.from_numpy(neuron_ids).long().to(tensors["down"].device)
    narrow = {role: tensor[ids] for role, tensor in tensors.items() if role not in ("down", "down_bias")}
    narrow["down"] = tensors["down"][:, ids]
    return narrow | {role: tensors[role] for role in ("down_bias",) if role in tensors}


def _to_torch(stored: StoredTensor) -> torch.Tensor:
    """Wrap stored values without a copy."""
    if stored.dtype == "BF16":
        return torch.from_numpy(stored.array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored.array)


def _matrix_to_torch(file: TensorFile, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """Wrap a stored matrix without a copy, or unpack it."""
    kind, parts = stored_parts(file, name)
    if kind in PACKED_FORMATS:
        return torch.from_numpy(float_matrix(file, name, shape))
    return _to_torch(parts[0])


def _base_tensors(
    bundle: Bundle, model: nn.Module, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Read the base under the names of the model's parameters; names that it does not know are passed on.

    Raises:
        BundleCorrupt: a packed matrix does not fit the model.
    """
    shapes = {name: (parameter.shape[0], parameter.shape[-1]) for name, parameter in model.named_parameters()}
    names = {_PACKED_SUFFIX.sub("", name): None for name in bundle.base}
    tensors = {}
    for name in names:
        if name in bundle.base:
            tensors[name] = _to_torch(bundle.base[name]).to(device=device, dtype=dtype)
        elif name in shapes:
            with _fitting(bundle.base):
                tensors[name] = _matrix_to_torch(bundle.base, name, shapes[name]).to(device=device, dtype=dtype)
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


def _build_model(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build the model without weights, then put the base's tensors into it."""
    model = _model_of_config(bundle, dtype)
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).register_buffer(leaf, torch.empty_like(buffer, device=device), persistent=False)
    # Only those buffers are filled in: parameters are still without memory.
    model.apply(model._init_weights)
    _empty_ffn(model, family_by_name(bundle.manifest.model.family), device, dtype)
    tensors = _base_tensors(bundle, model, device, dtype)
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
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def _model_of_config(bundle: Bundle, dtype: torch.dtype) -> Any:
    """Build the model of the manifest's config without memory for its weights."""
    settings = dict(bundle.manifest.model.config)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleCorrupt(
            f"bundle {bundle.path}: transformers builds no model from manifest.model.config ({reason}); "
            "compile the bundle again, or upgrade transformers"
        ) from error


def _empty_ffn(model: nn.Module, family: Family, device: torch.device, dtype: torch.dtype) -> None:
    """Give the FFN modules parameters that `assign_ffn` can swap; their weights come with the first choice."""
    for layer in resolve(model, family.layers):
        for path in family.projections.values():
            module = layer.get_submodule(path)
            for name, _ in list(module.named_parameters()):
                empty = torch.empty(0, device=device, dtype=dtype)
                module.register_parameter(name, nn.Parameter(empty, requires_grad=False))


@contextmanager
def _watch_activations(layers: Sequence[nn.Module], family: Family, collect: Any) -> Iterator[None]:
    """Call `collect(layer, activations)` with the input of every down projection."""

    def hook(layer: int) -> Any:
        def before(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            collect(layer, inputs[0])

        return before

    handles = [resolve(layer, family.down).register_forward_pre_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"device {name!r}: torch cannot use it here ({reason}); try 'cpu'") from error
    return device


def _pick_dtype(name: str, device: torch.device) -> torch.dtype:
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name == "auto":
        return torch.bfloat16 if device.type != "cpu" or cpu_multiplies_bf16() else torch.float32
    if name not in dtypes:
        raise ConfigError(f"dtype: expected auto, {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]
