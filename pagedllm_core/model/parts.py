"""What a decoder of the common shape is made of, and the proof that a fused form of it gives its logits.

What fits is found by the shape of the modules, not by a model's name: RMS norms around attention with rotary positions
and around a gated SiLU, in the order of Llama, with or without biases, norms of q and k, windows and merged weights.
Whether what lies between the modules (scales, multipliers, soft-caps) is the common one too is not read from code but
tried: a small random model of the same class and configuration must give the same logits. Everything else is left as it
is.

`fuse.py` (CPUs) and `gpu.py` (GPUs) make a fused form of these parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.attention.torch_paged import TorchPagedAttention
from pagedllm_core.kv.storage import KVStorage
from pagedllm_core.model.hf import PAGED
from pagedllm_core.model.probe import ProbedLayer, StepFunction, distances_to_own, probe_layers, probe_tokens

_SMALL = {"num_hidden_layers": 2, "vocab_size": 96, "intermediate_size": 80}
_PER_LAYER = {"layer_idx", "layer_type", "attention_type", "sliding_window", "is_sliding"}
"""What may differ from layer to layer; windows are read from the model's masks."""


@dataclass(frozen=True, slots=True)
class LayerParts:
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
class DecoderParts:
    """The modules and weights of a whole decoder; `rotary` gives cosines and sines [1, T, rotary_dim] of positions."""

    layers: list[LayerParts]
    embedding: torch.Tensor
    head: nn.Linear
    norm: torch.Tensor
    epsilon: float
    rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Limits(NamedTuple):
    """What a fused form can take: the types of weights and caches, and the widest head."""

    dtypes: tuple[torch.dtype, ...]
    head_dim: int


class Fused(Protocol):
    """A fused form of a decoder."""

    def bind(self, storage: KVStorage) -> None:
        """Read and write this storage from now on."""

    def logits(self, batch: ForwardBatch) -> torch.Tensor:
        """One step: float32 [L, vocab]."""


class DoesNotFit(Exception):
    """Why a model is left as it is."""


F = TypeVar("F", bound=Fused)


def prove_fused(
    model: nn.Module, hf_config: Any, probed: list[ProbedLayer], make: Callable[[], F]
) -> tuple[F, float | None]:
    """Make the fused form of a model and compare its logits with the model's own.

    Args:
        model: A probed causal LM.
        hf_config: Its configuration.
        probed: Its attention layers.
        make: Makes the fused form; called once, after the model's own logits, as it may take the model's weights.

    Returns:
        The fused form, and the median of its rows' relative distances; None where the model's own are not finite.
    """
    made: list[F] = []

    def fused(storage: KVStorage) -> StepFunction:
        made.append(make())
        made[0].bind(storage)
        return made[0].logits

    tokens = probe_tokens(hf_config).to(next(model.parameters()).device)
    with torch.inference_mode():
        distances = distances_to_own(model, probed, tokens, fused)
    if distances is None:
        return make(), None
    return made[0], float(distances.median())


FARTHEST = 0.2
"""Relative distance of logits up to which rounding to 16 or 8 bits may have moved them."""


def is_near(distance: float, exact: bool) -> bool:
    """Whether a fused form's logits are the model's own, but for rounding; `exact` in float32. NaN is not near."""
    return distance <= (0.01 if exact else FARTHEST)


def try_small(
    model: nn.Module, hf_config: Any, limits: Limits, make: Callable[[DecoderParts, list[ProbedLayer]], Fused]
) -> None:
    """Compare a small random model of the same kind with its fused form, in float32, on the model's device.

    Args:
        model: The model whose kind is tried; it is not touched.
        hf_config: Its configuration.
        limits: What the fused form can take.
        make: Makes the fused form of the small model.

    Raises:
        DoesNotFit: The logits differ, or a small model of this kind cannot be made.
    """
    config = _small_config(hf_config)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            torch.default_generator.manual_seed(0)
            if device.type == "cuda":
                torch.cuda.manual_seed(0)
            with torch.device(device):
                small: Any = type(model)(config).float().eval()
            with torch.no_grad():
                for parameter in small.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            probed = probe_layers(small, config, TorchPagedAttention)
            parts = find_parts(small, probed, limits)

            def fused(storage: KVStorage) -> StepFunction:
                decoder = make(parts, probed)
                decoder.bind(storage)
                return decoder.logits

            with torch.inference_mode():
                distances = distances_to_own(small, probed, probe_tokens(config).to(device), fused)
        except DoesNotFit:
            raise
        except Exception as error:  # whatever a model's code does with a configuration that is not its own
            raise DoesNotFit(f"a small model of its kind cannot be tried ({type(error).__name__}: {error})") from error
    if distances is None or not bool((distances < 1e-3).all()):
        raise DoesNotFit(f"something between its modules is its own (relative differences {distances})")


def _small_config(hf_config: Any) -> Any:
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
    return config


def find_parts(model: Any, probed: list[ProbedLayer], limits: Limits) -> DecoderParts:
    """The modules of a decoder of the common shape.

    Args:
        model: A causal LM.
        probed: Its attention layers.
        limits: What the fused form can take.

    Raises:
        DoesNotFit: The model has another shape.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = [_find_layer(model, names[layer.module].rpartition(".")[0], layer, limits) for layer in probed]
    decoder = model.get_submodule(names[probed[0].module].rpartition(".layers.")[0])
    _children(decoder, {"embed_tokens", "layers", "norm", "rotary_emb"})
    _check_alike([model.get_submodule(names[layer.module].rpartition(".")[0]) for layer in probed])
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise DoesNotFit("its embedding or its head is of its own kind")
    _check_dtype(embedding.weight, limits)
    norms = [decoder.norm]
    for layer in probed:
        parent = model.get_submodule(names[layer.module].rpartition(".")[0])
        norms += [parent.input_layernorm, parent.post_attention_layernorm]
        norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(layer.module, name, None)) is not None]
    epsilons = {_epsilon(norm) for norm in norms}
    if len(epsilons) != 1:
        raise DoesNotFit(f"its norms differ in their epsilon ({sorted(epsilons)})")
    return DecoderParts(layers, embedding.weight, head, decoder.norm.weight, epsilons.pop(), decoder.rotary_emb)


def _find_layer(model: Any, name: str, probed: ProbedLayer, limits: Limits) -> LayerParts:
    layer, attention, spec = model.get_submodule(name), probed.module, probed.spec
    _children(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    if layer.self_attn is not attention or spec.sinks is not None or probed.geometry.head_dim > limits.head_dim:
        raise DoesNotFit("its attention is of its own kind")
    if probed.geometry.dtype not in limits.dtypes:
        raise DoesNotFit(f"its keys and values are {probed.geometry.dtype}")
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
        raise DoesNotFit("its activation is not SiLU")
    for linear in [*qkv, attention.o_proj, *gate_up, mlp.down_proj]:
        if type(linear) is not nn.Linear:
            raise DoesNotFit(f"it has a linear layer that is a {type(linear).__name__}")
        _check_dtype(linear.weight, limits)
    if any(norm is not None and norm.weight.shape != (probed.geometry.head_dim,) for norm in norms):
        raise DoesNotFit("its norms of q and k are of their own shape")
    return LayerParts(
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
            raise DoesNotFit(f"its layers differ in {different[0]}")


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
        raise DoesNotFit(f"{type(module).__name__} holds {', '.join(sorted(found ^ expected) + own)} differently")


def _check_dtype(weight: torch.Tensor, limits: Limits) -> None:
    if weight.dtype not in limits.dtypes:
        raise DoesNotFit(f"its weights are {weight.dtype}")


def _is_silu(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    x = torch.linspace(-8, 8, 65)
    return bool(torch.allclose(activation(x), nn.functional.silu(x), atol=1e-6))


def _epsilon(norm: nn.Module) -> float:
    value = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    parameters = [name for name, _ in norm.named_parameters()]
    if "RMSNorm" not in type(norm).__name__ or not isinstance(value, float) or parameters != ["weight"]:
        raise DoesNotFit(f"its norm is a {type(norm).__name__}")
    return value
