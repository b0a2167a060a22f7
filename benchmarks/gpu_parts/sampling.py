"""The sampling kernels against one read of the logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from gpu_parts.kernels import COLUMNS as KERNEL_COLUMNS
from gpu_parts.kernels import VOCABULARY, Case, Launch, measure_all
from gpu_parts.machine import Context
from pagedllm_core.decode.staging import ROW, Staged, Staging
from pagedllm_core.kernels.rules import apply_rules
from pagedllm_core.kernels.sampling import Workspace, sample_rows, score_rows

COLUMNS = {"sampling": KERNEL_COLUMNS["kernels"]}
FILTERS: dict[str, Any] = {"top_k": 50, "top_p": 0.9, "reach": -np.log(0.05), "temperature": 0.8}
PENALTIES: dict[str, Any] = {"repetition": 1.1, "presence": 0.1, "frequency": 0.1}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {},
    "top-p": {"top_p": 0.9},
    "top-k, top-p, min-p": FILTERS,
    "top-k, top-p, min-p, penalties": FILTERS | PENALTIES,
    "log-probabilities": {"scored": 1},
}


def sampling(context: Context) -> None:
    """One token for each row. The bytes are those of the logits, read once, whatever else a kind of sampling reads.

    Penalties alone read and write each row once more. "log-probabilities" scores tokens that are chosen already.
    """
    vocabulary = 331 if context.smoke else VOCABULARY
    cases = [
        Case(kind, f"{rows} x {vocabulary:,}", partial(launch_of, context, rows, vocabulary, kind))
        for rows in ((2,) if context.smoke else (64, 256))
        for kind in KINDS
    ]
    measure_all(context, cases, {})


def launch_of(context: Context, rows: int, vocabulary: int, kind: str) -> Launch:
    """A step's rows, sampled in one way."""
    fields = KINDS[kind]
    device = context.device
    logits = 3 * torch.randn(rows, vocabulary, device=device)
    step = stage(context, rows, vocabulary, fields)
    work = Workspace.allocate(rows, vocabulary, device)
    tokens = torch.full((rows,), 0 if "scored" in fields else -1, device=device)
    summary = torch.zeros(rows, 4, dtype=torch.int32, device=device)
    filtered = rows if {"top_k", "top_p"} & fields.keys() else 0

    def run() -> None:
        if "scored" in fields:
            score_rows(logits, step, work, tokens, summary)
        else:
            changed = apply_rules(logits, step, rows, tokens) if "repetition" in fields else None
            sample_rows(logits, changed, filtered, step, work, tokens, summary)

    def is_done() -> bool:
        written = summary[:, 1 if "scored" in fields else 0]  # the rank, or whether a token was possible
        return bool((tokens >= 0).all() and (written > 0).all())

    return Launch(logits.nbytes, run, is_done)


def stage(context: Context, rows: int, vocabulary: int, fields: dict[str, Any]) -> Staged:
    """The rows' records, with 500 tokens of the past each where they are penalised."""
    records = np.zeros(rows, dtype=ROW)
    number = np.arange(rows)
    records["source"] = number
    for name, value in {"place": -1, "filtered": -1, "carried": -1, "reach": np.inf}.items():
        records[name] = value
    for name in ("temperature", "top_p", "repetition"):
        records[name] = 1
    for name, value in fields.items():
        records[name] = value
    if {"top_k", "top_p"} & fields.keys():
        records["filtered"] = number
    random = np.random.default_rng(0)
    lists = [np.empty(0, dtype=np.int32)] * 4
    if "repetition" in fields:
        length = min(500, vocabulary // 2)
        records["place"], records["past"], records["past_end"] = number, length * number, length * (number + 1)
        past = [random.permutation(vocabulary)[:length] for _ in range(rows)]
        lists[2] = np.concatenate(past).astype(np.int32)
        lists[3] = np.ones(length * rows, dtype=np.int32)
    return Staging(context.device, rows).put(random.random(rows), records, lists)
