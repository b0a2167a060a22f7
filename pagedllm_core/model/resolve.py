"""From a model's name to a folder of files that are safe to read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from pagedllm_core.errors import ModelLoadError

logger = logging.getLogger("pagedllm.model")

BUNDLED = {"tiny": Path(__file__).resolve().parent.parent / "bundled" / "tiny"}

_TOKENIZER_FILES = [
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
]  # fmt: skip
_MODEL_FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")


def find_model(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    """The folder of a bundled, local or Hub model.

    Raises:
        ModelLoadError: It does not exist or cannot be fetched.
    """
    if name in BUNDLED:
        return _existing(BUNDLED[name], f'model="{name}"')
    patterns = _MODEL_FILES + _TOKENIZER_FILES + (["*.py"] if trust_remote_code else [])
    return _local_or_hub("model", name, revision, patterns)


def find_tokenizer(name: str, revision: str | None) -> Path:
    """The folder of a tokenizer that is named apart from the model.

    Raises:
        ModelLoadError: It does not exist or cannot be fetched.
    """
    if name in BUNDLED:
        return _existing(BUNDLED[name], f'tokenizer="{name}"')
    return _local_or_hub("tokenizer", name, revision, ["config.json", *_TOKENIZER_FILES])


def _existing(folder: Path, field: str) -> Path:
    if not folder.is_dir():
        raise ModelLoadError(f"{field}: the folder {folder} does not exist; check the path or reinstall the package")
    return folder


def _local_or_hub(field: str, name: str, revision: str | None, patterns: list[str]) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelLoadError(f'{field}="{name}" is a file; name the folder that holds it')
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelLoadError(f'{field}="{name}": this folder does not exist; check the path')
    return _download(field, name, revision, patterns)


def _download(field: str, name: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch the files that are needed, into huggingface_hub's own cache. Offline: from that cache only."""
    where = f'{field}="{name}"' + (f', revision="{revision}"' if revision else "")
    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*", "model.*.safetensors"],  # originals, other formats, other precisions
            local_files_only=is_offline_mode(),
        )
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{where}: access to this repository is restricted; ask for it on its page and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{where}: neither a folder here nor a repository on the Hub; check the name (a private one needs "
            "`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"{where}: the repository has no such revision; name a branch, tag or commit") from error
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"{where}: not a folder here, not in the local cache, and the Hub cannot be reached (HF_HUB_OFFLINE="
            f"{int(is_offline_mode())}); download it once while online, or name a local folder"
        ) from error
    except HFValidationError as error:
        raise ModelLoadError(f"{where}: neither a folder here nor a valid repository id ({error})") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelLoadError(f"{where}: the download failed ({error}); try again or name a local folder") from error
    return Path(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelLoadError: The file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path}: the file is missing; the folder must hold a complete model") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"{path}: not readable as JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path}: holds a {type(content).__name__} where an object is expected")
    return content


def refuse_code(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a folder whose configuration names code to run.

    Raises:
        ModelLoadError: `auto_map` is present and `trust_remote_code` is not set.
    """
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if not trust_remote_code and path.is_file() and read_json(path).get("auto_map"):
            raise ModelLoadError(
                f"{path}: asks to run code from the model's folder (auto_map); if you trust it, set "
                "trust_remote_code=True, else remove the entry"
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights.

    Raises:
        ModelLoadError: There are none.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelLoadError(f"{index}: has no weight_map of tensors to files; fetch the file again")
        return [folder / name for name in sorted(set(weight_map.values()))]
    raise ModelLoadError(_no_weights(folder))


def check_weights(folder: Path) -> None:
    """Make sure that the weights are whole safetensors files, before anything large is allocated.

    Raises:
        ModelLoadError: They are missing, damaged or in a format that is not loaded; names the file.
    """
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            raise ModelLoadError(
                f"{path}: named by model.safetensors.index.json, but only .safetensors files are loaded"
            )
        try:
            with safe_open(path, framework="pt"):  # reads the header and compares it with the file's length
                pass
        except FileNotFoundError:
            raise ModelLoadError(f"{path}: the file is missing; fetch the model again") from None
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{path}: not a whole safetensors file ({error}); fetch the file again") from error


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder / pickles[0]}: weights of this kind can run code when they are read, so only safetensors are "
            "loaded; convert them once where you trust the file: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)"
        )
    return (
        f"{folder}: holds no model.safetensors and no model.safetensors.index.json; fetch the weights, or set "
        'load_format="dummy" for random ones'
    )
