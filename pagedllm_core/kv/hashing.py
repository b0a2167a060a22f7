"""Content addresses of full KV blocks: a SHA-256 chain over everything their keys and values depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def root_hash(*parts: str | None) -> bytes:
    """The chain's start: what, beside the tokens, decides a block's content (model identity, cache salt).

    Each part is length-prefixed, so that no two lists of parts collide.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = b"" if part is None else b"=" + part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Address of the block that holds `token_ids` right after the block addressed by `parent`."""
    return hashlib.sha256(parent + np.asarray(token_ids, dtype=np.int64).tobytes()).digest()
