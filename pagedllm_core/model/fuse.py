"""Decoders of the common shape, run by native code: one call for a whole step.

What fits is found by the shape of the modules, not by a model's name: RMS norms around attention with rotary positions
and around a gated SiLU, in the order of Llama, with or without biases, norms of q and k, windows and merged weights.
Whether what lies between the modules (scales, multipliers, soft-caps) is the common one too is not read from code but
tried: a small random model of the same class and configuration must give the same logits. Everything else is left as it
is.
"""

from __future__ import annotations

import copy
import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.attention.native import MOST_DIM, describe_attention
from pagedllm_core.attention.torch_paged import TorchPagedAttention
from pagedllm_core.kv.storage import KVStorage
from pagedllm_core.model.hf import PAGED
from pagedllm_core.model.probe import ProbedLayer, StepFunction, distances_to_own, probe_layers, probe_tokens
from pagedllm_core.model.support import unsupported
from pagedllm_core.native.library import DTYPES, DecoderStruct, LayerStruct, PackedLinear, Step

logger = logging.getLogger("pagedllm.model")

_SMALL = {"num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 80}
_PER_LAYER = {"layer_idx", "layer_type", "attention_type", "sliding_window", "is_sliding"}
"""What may differ from layer to layer; windows are read from the model's masks."""

_POSITIONS = 2048  # rows by which the table of rotations grows


@dataclass(frozen=True, slots=True)
class _LayerParts:
    """The weights of one layer; `qkv` and `gate_up` are one merged module or the parts in order."""

    qkv: list[nn.Linear]
    o: nn.Linear
    gate_up: list[nn.Linear]
    down: nn.Linear
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Parts:
    layers: list[_LayerParts]
    embedding: torch.Tensor
    head: nn.Linear
    norm: torch.Tensor
    epsilon: float
    rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _DoesNotFit(Exception):
    """Why a model is left as it is."""


class FusedDecoder:
    """A model's weights, packed, and its step as one native call. The model itself is empty afterwards.

    Args:
        parts: The model's modules; their linear weights are dropped one after the other.
        probed: Its attention layers.
        library: The native code.
        int8: Round all linear layers to int8, the head included.
    """

    def __init__(self, parts: _Parts, probed: list[ProbedLayer], library: ctypes.CDLL, int8: bool = False) -> None:
        self._library, self._rotary, self._int8 = library, parts.rotary, int8
        self._attention = [(layer.spec, layer.geometry) for layer in probed]  # not their modules: those hold the file
        self._held: list[Any] = []  # what the structures point to
        self._rotations = (torch.empty(0, 0), torch.empty(0, 0))
        self._layers = (LayerStruct * len(parts.layers))()
        for struct, layer in zip(self._layers, parts.layers, strict=True):
            struct.qkv, struct.o = self._pack(layer.qkv), self._pack([layer.o])
            struct.gate_up, struct.down = self._pack(layer.gate_up), self._pack([layer.down])
            struct.input_norm, struct.post_norm = self._floats(layer.input_norm), self._floats(layer.post_norm)
            struct.q_norm, struct.k_norm = self._floats(layer.q_norm), self._floats(layer.k_norm)
        embedding = parts.embedding.detach().clone()  # the weights' file, which it may be mapped from, is let go
        self._held.append(embedding)
        self.vocab_size = parts.head.out_features
        head = self._pack([parts.head], keep=parts.head.weight is parts.embedding)
        self._decoder = DecoderStruct(
            layers=self._layers,
            num_layers=len(parts.layers),
            hidden=embedding.shape[1],
            intermediate=self._layers[0].down.inputs,
            epsilon=parts.epsilon,
            embedding=embedding.data_ptr(),
            embedding_is_bf16=embedding.dtype == torch.bfloat16,
            norm=self._floats(parts.norm),
            head=head,
        )

    def _pack(self, modules: list[nn.Linear], keep: bool = False) -> Any:
        """The merged weight as one packed matrix; the modules' own is dropped."""
        weight = modules[0].weight if len(modules) == 1 else torch.cat([module.weight for module in modules])
        biases = [torch.zeros(one.out_features) if one.bias is None else one.bias.float() for one in modules]
        bias = torch.cat(biases) if any(module.bias is not None for module in modules) else None
        packed = PackedLinear(self._library, weight, bias, self._int8)
        self._held.append(packed)
        if not keep:
            for module in modules:
                module.weight.data = torch.empty(0, dtype=module.weight.dtype)
        return packed.matrix

    def _floats(self, values: torch.Tensor | None) -> int | None:
        if values is None:
            return None
        self._held.append(values.detach().to(torch.float32, copy=True).contiguous())
        return int(self._held[-1].data_ptr())

    def bind(self, storage: KVStorage) -> None:
        """Read and write this storage from now on."""
        self._storage = storage  # the structures point into it
        for struct, (spec, geometry) in zip(self._layers, self._attention, strict=True):
            heads = struct.qkv.outputs // geometry.head_dim - 2 * geometry.kv_heads
            struct.attention = describe_attention(storage.layer(spec.kv_group), heads, spec, None)

    @torch.inference_mode()
    def logits(self, batch: ForwardBatch) -> torch.Tensor:
        """One step: float32 [L, vocab], one row for each of `batch.logits_rows`."""
        highest = int(batch.context_lens.max())
        if highest > len(self._rotations[0]):
            self._grow_rotations(highest)
        out = torch.empty(len(batch.logits_rows), self.vocab_size)
        self._library.decode(self._decoder, Step.of(batch), out.data_ptr(), torch.get_num_threads())
        return out

    def _grow_rotations(self, length: int) -> None:
        """The model's own cosines and sines for every position below `length`, and some more."""
        positions = torch.arange(-(-length // _POSITIONS) * _POSITIONS)[None]
        cosines, sines = (table[0].float().contiguous() for table in self._rotary(torch.zeros(1), positions))
        self._rotations = (cosines, sines)
        self._decoder.rotary_dim = cosines.shape[1]
        self._decoder.cosines, self._decoder.sines = cosines.data_ptr(), sines.data_ptr()


def fuse(
    model: nn.Module, hf_config: Any, probed: list[ProbedLayer], library: ctypes.CDLL, int8: bool = False
) -> FusedDecoder | None:
    """The model as a fused decoder where it is one; its weights are then gone.

    Args:
        model: A probed causal LM on a CPU.
        hf_config: Its configuration.
        probed: Its attention layers.
        library: The native code.
        int8: Round its linear layers to int8.

    Returns:
        None, and the model as it was, where it does not fit.

    Raises:
        UnsupportedModelError: It seemed to fit, and with its own weights it did not.
    """
    try:
        parts = _find(model, probed)
        _try_small(model, hf_config, library)
    except _DoesNotFit as reason:
        logger.info("%s is not fused: %s", type(model).__name__, reason)
        return None
    made: list[FusedDecoder] = []

    def fused(storage: KVStorage) -> StepFunction:
        made.append(FusedDecoder(parts, probed, library, int8))
        made[0].bind(storage)
        return made[0].logits

    with torch.inference_mode():
        distances = distances_to_own(model, probed, probe_tokens(hf_config), fused)
    if distances is None:
        return FusedDecoder(parts, probed, library, int8)
    exact = probed[0].geometry.dtype == torch.float32 and not int8
    if float(distances.median()) > (0.01 if exact else 0.2):  # the small model was no fair sample of it
        raise unsupported(
            hf_config,
            f"its fused form has other logits than its own (relative difference {float(distances.median()):.2g}); "
            + ("leave quantization out" if int8 else "PAGEDLLM_NATIVE=none runs it unfused"),
        )
    return made[0]


def _try_small(model: nn.Module, hf_config: Any, library: ctypes.CDLL) -> None:
    """Compare a small random model of the same kind with its fused form, in float32."""
    config = copy.deepcopy(hf_config)
    for name, value in _SMALL.items():
        setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[: _SMALL["num_hidden_layers"]])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    config._attn_implementation = PAGED
    random_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        small: Any = type(model)(config).float().eval()
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        probed = probe_layers(small, config, TorchPagedAttention)
        parts = _find(small, probed)

        def fused(storage: KVStorage) -> StepFunction:
            decoder = FusedDecoder(parts, probed, library)
            decoder.bind(storage)
            return decoder.logits

        with torch.inference_mode():
            distances = distances_to_own(small, probed, probe_tokens(config), fused)
    except _DoesNotFit:
        raise
    except Exception as error:  # whatever a model's code does with a configuration that is not its own
        raise _DoesNotFit(f"a small model of its kind cannot be tried ({type(error).__name__}: {error})") from error
    finally:
        torch.random.set_rng_state(random_state)
    if distances is None or not bool((distances < 1e-3).all()):
        raise _DoesNotFit(f"something between its modules is its own (relative differences {distances})")


def _find(model: Any, probed: list[ProbedLayer]) -> _Parts:
    """The modules of a decoder of the common shape."""
    names = {module: name for name, module in model.named_modules()}
    layers = [_find_layer(model, names[layer.module].rpartition(".")[0], layer) for layer in probed]
    decoder = model.get_submodule(names[probed[0].module].rpartition(".layers.")[0])
    _children(decoder, {"embed_tokens", "layers", "norm", "rotary_emb"})
    _check_alike([model.get_submodule(names[layer.module].rpartition(".")[0]) for layer in probed])
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise _DoesNotFit("its embedding or its head is of its own kind")
    _check_dtype(embedding.weight)
    norms = [decoder.norm]
    for layer in probed:
        parent = model.get_submodule(names[layer.module].rpartition(".")[0])
        norms += [parent.input_layernorm, parent.post_attention_layernorm]
        norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(layer.module, name, None)) is not None]
    epsilons = {_epsilon(norm) for norm in norms}
    if len(epsilons) != 1:
        raise _DoesNotFit(f"its norms differ in their epsilon ({sorted(epsilons)})")
    return _Parts(layers, embedding.weight, head, decoder.norm.weight, epsilons.pop(), decoder.rotary_emb)


def _find_layer(model: Any, name: str, probed: ProbedLayer) -> _LayerParts:
    layer, attention, spec = model.get_submodule(name), probed.module, probed.spec
    _children(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    if layer.self_attn is not attention or spec.sinks is not None or probed.geometry.head_dim > MOST_DIM:
        raise _DoesNotFit("its attention is of its own kind")
    if probed.geometry.dtype not in DTYPES:
        raise _DoesNotFit(f"its keys and values are {probed.geometry.dtype}")
    norms = [getattr(attention, norm, None) for norm in ("q_norm", "k_norm")]
    expected = {"o_proj"} | {norm for norm, there in zip(("q_norm", "k_norm"), norms, strict=True) if there is not None}
    merged = hasattr(attention, "qkv_proj")
    _children(attention, expected | ({"qkv_proj"} if merged else {"q_proj", "k_proj", "v_proj"}))
    qkv = [attention.get_submodule(one) for one in (["qkv_proj"] if merged else ["q_proj", "k_proj", "v_proj"])]
    mlp, merged = layer.mlp, hasattr(layer.mlp, "gate_up_proj")
    activation = "act_fn" if hasattr(mlp, "act_fn") else "activation_fn"
    _children(mlp, {"down_proj", activation} | ({"gate_up_proj"} if merged else {"gate_proj", "up_proj"}))
    gate_up = [mlp.get_submodule(one) for one in (["gate_up_proj"] if merged else ["gate_proj", "up_proj"])]
    if not _is_silu(getattr(mlp, activation)):
        raise _DoesNotFit("its activation is not SiLU")
    for linear in [*qkv, attention.o_proj, *gate_up, mlp.down_proj]:
        if type(linear) is not nn.Linear:
            raise _DoesNotFit(f"it has a linear layer that is a {type(linear).__name__}")
        _check_dtype(linear.weight)
    if any(norm is not None and norm.weight.shape != (probed.geometry.head_dim,) for norm in norms):
        raise _DoesNotFit("its norms of q and k are of their own shape")
    return _LayerParts(
        qkv, attention.o_proj, gate_up, mlp.down_proj, layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight, *(None if norm is None else norm.weight for norm in norms),
    )  # fmt: skip


def _check_alike(layers: list[nn.Module]) -> None:
    """Fails where the layers' settings differ, as only the first two are tried."""

    def settings(layer: nn.Module) -> dict[str, Any]:
        return {
            f"{path}.{name}": value
            for path, module in layer.named_modules()
            for name, value in vars(module).items()
            if name not in _PER_LAYER and (value is None or isinstance(value, bool | int | float | str))
        }

    first = settings(layers[0])
    for layer in layers[1:]:
        different = sorted(name for name, _ in settings(layer).items() ^ first.items())
        if different:
            raise _DoesNotFit(f"its layers differ in {different[0]}")


def _children(module: nn.Module, expected: set[str]) -> None:
    """Fails where the module has other parts than these; parts that do nothing may be there."""
    found = {
        name
        for name, child in module.named_children()
        if not isinstance(child, nn.Dropout | nn.Identity)
        and (next(child.parameters(), None) is not None or name in expected)
    }
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if found != expected or own:
        raise _DoesNotFit(f"{type(module).__name__} holds {', '.join(sorted(found ^ expected) + own)} differently")


def _check_dtype(weight: torch.Tensor) -> None:
    if weight.dtype not in DTYPES:
        raise _DoesNotFit(f"its weights are {weight.dtype}")


def _is_silu(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    x = torch.linspace(-8, 8, 65)
    return bool(torch.allclose(activation(x), nn.functional.silu(x), atol=1e-6))


def _epsilon(norm: nn.Module) -> float:
    value = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    parameters = [name for name, _ in norm.named_parameters()]
    if "RMSNorm" not in type(norm).__name__ or not isinstance(value, float) or parameters != ["weight"]:
        raise _DoesNotFit(f"its norm is a {type(norm).__name__}")
    return value
