"""What the peers' scripts share: the line protocol on stdin and stdout, and the loop that serves a workload.

    PYTHON benchmarks/peers/openvino.py FOLDER --threads N --dtype bfloat16|float32

Each script runs in its peer's own environment, so only the standard library is used here. A script first prints
`{"ready": true, "system": ..., "seconds_to_load": ...}`; each line on stdin is then a workload, and is answered by one
line: `{"total", "latencies", "first", "tokens"}` or `{"unsupported": why}`. `"ids": true` in a workload adds the
tokens themselves, to compare them with another system's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

# A script's own folder comes first on sys.path, where `vllm.py` and `openvino.py` would hide the packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]


@dataclass
class Work:
    """One workload: prompts, output lengths, when each request comes (seconds), and the beams of each."""

    prompts: list[list[int]]
    lengths: list[int]
    arrivals: list[float]
    beams: int = 1
    ids: bool = False


@dataclass
class Progress:
    """What a step gave to one request: its new tokens, and whether they were the last."""

    number: int
    tokens: list[int]
    finished: bool


class Unsupported(Exception):
    """The peer has no way to do this work."""


class Peer(Protocol):
    """An engine that takes requests at any time and advances all of them by a step."""

    system: str

    def add(self, number: int, prompt: list[int], length: int, beams: int) -> None:
        """Takes a request: greedy (or a beam search), exactly `length` new tokens."""
        ...

    def step(self) -> list[Progress]:
        """Advances what is running; requests that got nothing may be left out."""
        ...


def serve(peer: Peer, work: Work) -> dict[str, Any]:
    """Serves one workload, each request handed over when it comes, and returns the answer's fields."""
    count = len(work.prompts)
    waiting = sorted(range(count), key=lambda number: work.arrivals[number])
    running: set[int] = set()
    latencies, first = [0.0] * count, [0.0] * count
    tokens: list[list[int]] = [[] for _ in range(count)]
    started = time.perf_counter()
    while waiting or running:
        now = time.perf_counter() - started
        while waiting and work.arrivals[waiting[0]] <= now:
            number = waiting.pop(0)
            peer.add(number, work.prompts[number], work.lengths[number], work.beams)
            running.add(number)
        if not running:
            time.sleep(max(0.0, work.arrivals[waiting[0]] - (time.perf_counter() - started)))
            continue
        for progress in peer.step():
            number, now = progress.number, time.perf_counter() - started
            if progress.tokens and not tokens[number]:
                first[number] = now - work.arrivals[number]
            tokens[number] += progress.tokens
            if progress.finished:
                latencies[number] = now - work.arrivals[number]
                running.remove(number)
    total = time.perf_counter() - started
    answer: dict[str, Any] = {"total": total, "latencies": latencies, "first": first, "tokens": list(map(len, tokens))}
    return answer | ({"ids": tokens} if work.ids else {})


def arguments(description: str | None, *flags: str) -> argparse.Namespace:
    """The command line that all scripts have: folder, threads, dtype and device, and a script's own flags.

    Only transformers and PagedLLM run on another device than a CPU.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a Hugging Face model: config.json and safetensors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true")
    return parser.parse_args()


def apart(function: Callable[..., None], *values: Any) -> None:
    """Calls it in a child process: the memory that a conversion takes is not the peer's."""
    child = multiprocessing.get_context("fork").Process(target=function, args=values)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"{function.__name__} ended with status {child.exitcode}")


def run(load: Callable[[], Peer]) -> None:
    """Loads the peer and answers workloads until the input ends.

    Peers log and print from C++ as well, so the real stdout is kept aside and file descriptor 1 becomes stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(fields: dict[str, Any]) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    started = time.perf_counter()
    peer = load()
    answer({"ready": True, "system": peer.system, "seconds_to_load": time.perf_counter() - started})
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            answer(serve(peer, Work(**json.loads(line))))
        except Unsupported as error:
            answer({"unsupported": str(error)})
