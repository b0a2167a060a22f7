"""Loads a causal LM into a `LoadedModel`: with transformers' own machinery, attention replaced, or directly.

transformers' modelling code takes seconds to import, so only what needs it does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pagedllm_core.config import EngineConfig
from pagedllm_core.errors import InvalidRequestError, ModelLoadError, PagedLLMError, UnsupportedModelError
from pagedllm_core.model.direct import DirectDecoder, plain_config, read_decoder
from pagedllm_core.model.hf import PAGED, register_attention
from pagedllm_core.model.limits import context_limit
from pagedllm_core.model.resolve import check_weights, find_model, find_tokenizer, read_json, refuse_code
from pagedllm_core.model.rope import fix_rotary_frequencies
from pagedllm_core.model.support import refuse_unsupported, unsupported
from pagedllm_core.native.library import DTYPES

logger = logging.getLogger("pagedllm.model")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_MARKS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)

# Loading sets torch's default type and random state for a while, which are the process's.
_loading = threading.Lock()


@dataclass(slots=True)
class LoadedModel:
    """A model on its device and everything that its folder says about it.

    Attributes:
        model: The transformers module in eval mode, whose attention works only inside an engine; or a decoder that was
            read directly.
        hf_config: Its configuration.
        tokenizer: Its tokenizer, or None where the folder has none.
        generation_config: The values of generation_config.json that are set.
        dtype: Type of weights and KV cache.
        device: Where the weights are.
        max_model_len: Context limit in tokens.
        eos_token_ids: Ids that end a sequence.
        name: What the user called it.
    """

    model: nn.Module | DirectDecoder
    hf_config: Any
    tokenizer: Any
    generation_config: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    name: str


def load_model(config: EngineConfig, direct: bool = False) -> LoadedModel:
    """Load the model that a configuration names.

    Args:
        config: The configuration.
        direct: Read a decoder for native code directly where that is possible.

    Raises:
        ModelLoadError: Files are missing, damaged or of a kind that is not loaded.
        UnsupportedModelError: The architecture cannot be served exactly.
        InvalidRequestError: A configuration field does not fit the model or the machine.
    """
    device = pick_device(config.device)
    folder = find_model(config.model, config.revision, config.trust_remote_code)
    refuse_code(folder, config.trust_remote_code)
    plain = plain_config(folder) if direct and config.load_format != "dummy" else None
    if plain is not None and _pick_dtype(config.dtype, plain, device) not in DTYPES:
        plain = None
    hf_config = plain or _read_config(folder, config.trust_remote_code)
    refuse_unsupported(hf_config)
    max_model_len = context_limit(hf_config, config.max_model_len)
    generation_config = _generation_config(config.generation_config, folder)
    tokenizer = _tokenizer(config, folder, plain)
    dtype = _pick_dtype(config.dtype, hf_config, device)
    if config.load_format != "dummy":
        check_weights(folder)
    model: nn.Module | DirectDecoder | None
    if plain is not None:
        model = read_decoder(folder, plain, dtype)
        if model is None:  # its weights are not the usual ones
            return load_model(config)
    else:
        model = _transformers_model(folder, hf_config, dtype, config).to(device).eval().requires_grad_(False)
        hf_config = model.config
        fix_rotary_frequencies(model, max_model_len)
    own_generation = generation_config or _generation_config("auto", folder)
    return LoadedModel(
        model=model,
        hf_config=hf_config,
        tokenizer=tokenizer,
        generation_config=generation_config,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        eos_token_ids=_eos_token_ids(own_generation, hf_config, tokenizer),
        name=config.model,
    )


def pick_device(asked: str) -> torch.device:
    """The device a configuration means: for "auto" CUDA, else MPS, else the CPU.

    Raises:
        InvalidRequestError: The device is unknown or not present.
    """
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise InvalidRequestError(f'device="{asked}": use "auto", "cpu", "cuda", "cuda:1" or "mps"') from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InvalidRequestError(f'device="{asked}": this machine shows {count} CUDA devices; use "auto" or "cpu"')
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InvalidRequestError('device="mps": this machine has no MPS device; use "auto" or "cpu"')
    if device.type not in ("cpu", "mps"):
        raise InvalidRequestError(f'device="{asked}": use "auto", "cpu", "cuda", "cuda:1" or "mps"')
    return torch.device(device.type)


def _read_config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    path = folder / "config.json"
    content = read_json(path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except KeyError as error:
        raise UnsupportedModelError(
            f"{path}: names an architecture that transformers does not know ({error})"
        ) from error
    except Exception as error:  # transformers checks configurations with errors of many kinds
        if "model_type" not in content:
            raise ModelLoadError(
                f"{path}: has no model_type, so the architecture is unknown; fetch the file again"
            ) from error
        if "does not recognize this architecture" in str(error):
            raise UnsupportedModelError(
                f"{path}: model_type={content['model_type']!r} is not known to the installed transformers; update it, "
                "or choose another model"
            ) from error
        raise ModelLoadError(f"{path}: transformers cannot read it ({type(error).__name__}: {error})") from error


def _pick_dtype(asked: str, hf_config: Any, device: torch.device) -> torch.dtype:
    """The type asked for; for "auto" the checkpoint's, except that a CPU computes float16 checkpoints in float32."""
    if asked != "auto":
        return _DTYPES[asked]
    stated: Any = getattr(hf_config, "dtype", None) or getattr(hf_config.get_text_config(decoder=True), "dtype", None)
    if isinstance(stated, str):
        stated = _DTYPES.get(stated.removeprefix("torch."))
    if stated not in _DTYPES.values():
        return torch.float32
    if stated == torch.float16 and device.type == "cpu":
        return torch.float32
    checked: torch.dtype = stated
    return checked


def _build(hf_config: Any, make: Callable[[], Any]) -> Any:
    """Call into transformers' model classes, with their many errors turned into ours."""
    name = (getattr(hf_config, "architectures", None) or [hf_config.model_type])[0]
    try:
        return make()
    except PagedLLMError:
        raise
    except KeyError as error:
        if error.args != (PAGED,):
            raise ModelLoadError(f"model: {name} could not be built (KeyError: {error})") from error
        raise unsupported(
            hf_config, "its attention cannot be replaced"
        ) from error  # it chooses from a table of its own
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelLoadError(
            f"model: {name} does not fit into memory ({error}); choose a smaller dtype or model"
        ) from error
    except Exception as error:  # whatever a model's constructor or the weights' reader raises
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(f"model: {name} is not a causal language model in transformers") from error
        raise ModelLoadError(f"model: {name} could not be built ({type(error).__name__}: {error})") from error


def _transformers_model(folder: Path, hf_config: Any, dtype: torch.dtype, config: EngineConfig) -> nn.Module:
    """A model of transformers' own code, with its weights or random ones."""
    hf_config.return_dict = True
    with _loading:
        register_attention()
        if config.load_format == "dummy":
            return _random_model(hf_config, dtype, config)
        return _pretrained_model(folder, hf_config, dtype, config)


def _pretrained_model(folder: Path, hf_config: Any, dtype: torch.dtype, config: EngineConfig) -> nn.Module:
    """Read the weights; transformers shows its progress bar."""
    from transformers import AutoModelForCausalLM

    model, info = _build(
        hf_config,
        lambda: AutoModelForCausalLM.from_pretrained(
            folder,
            config=hf_config,
            dtype=dtype,
            attn_implementation=PAGED,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=config.trust_remote_code,
            ignore_mismatched_sizes=True,  # so that they are listed and can be named below
            output_loading_info=True,
        ),
    )
    wrong = [
        f"{name} has shape {tuple(found)} instead of {tuple(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    problems = {
        "wrong shapes": wrong,
        "missing weights": sorted(info["missing_keys"]),
        "unexpected weights": sorted(info["unexpected_keys"]),
        "errors": [str(error) for error in info.get("error_msgs") or []],
    }
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ModelLoadError(
                f"{folder}: {kind}: {', '.join(names[:5])}{more}; config.json and the weights do not belong together, "
                "fetch both again"
            )
    loaded: nn.Module = model
    return loaded


def _random_model(hf_config: Any, dtype: torch.dtype, config: EngineConfig) -> nn.Module:
    """Random weights from `config.seed`, the same for every dtype.

    Matrices are normal with variance 1 / columns, so that activations keep their scale through any depth and logits
    spread by about 1; with the usual `initializer_range` they would be almost flat in a small model.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: nn.Module = _build(
            hf_config,
            lambda: AutoModelForCausalLM.from_config(
                hf_config,
                dtype=torch.float32,
                attn_implementation=PAGED,
                trust_remote_code=config.trust_remote_code,
            ),
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def _tokenizer(config: EngineConfig, folder: Path, plain: Any) -> Any:
    """The tokenizer, or None where the model's folder has none.

    It asks for the model's configuration; a plain one will do where the folder names the tokenizer's class.
    """
    from transformers import AutoTokenizer

    if config.tokenizer is not None:
        revision = config.revision if config.tokenizer == config.model else None
        folder = find_tokenizer(config.tokenizer, revision)
        refuse_code(folder, config.trust_remote_code)
    if not any((folder / name).is_file() for name in _TOKENIZER_MARKS):
        if config.tokenizer is not None:
            raise ModelLoadError(f"tokenizer={config.tokenizer!r}: {folder} holds no tokenizer files")
        return None
    names = folder / "tokenizer_config.json"
    own = config.tokenizer is None and names.is_file() and read_json(names).get("tokenizer_class")
    known = {"config": plain} if plain is not None and own else {}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code, local_files_only=True, **known
        )
        # What is too long is refused; transformers' own warning of it would speak of indexing errors.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        return tokenizer
    except Exception as error:  # tokenizers raise errors of many kinds, bare Exception among them
        raise ModelLoadError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error})") from error


def _generation_config(asked: str, folder: Path) -> dict[str, Any]:
    """The values set in generation_config.json: the model's ("auto"), nothing ("none"), or another folder's."""
    if asked == "none":
        return {}
    path = (folder if asked == "auto" else Path(asked).expanduser()) / "generation_config.json"
    if asked == "auto" and not path.is_file():
        return {}
    return {
        name: value for name, value in read_json(path).items() if value is not None and name != "transformers_version"
    }


def _eos_token_ids(generation_config: dict[str, Any], hf_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """End tokens: of the generation configuration, else of the model's, else of the tokenizer."""
    for value in (
        generation_config.get("eos_token_id"),
        getattr(hf_config.get_text_config(decoder=True), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if value is not None:
            return tuple(int(token) for token in (value if isinstance(value, list | tuple) else [value]))
    return ()
