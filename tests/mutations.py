"""Seeds known bugs, one at a time, into a copy of the core, and shows which test catches each.

    python -m tests.mutations             # all; exits with 1 if a bug survives

A test that cannot fail proves nothing. Each entry is a mistake somebody could make in the pool, the tables, the
scheduler or the sampling.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/unit/test_engine.py", "tests/property", "tests/unit/test_sampling.py", "tests/unit/test_detokenize.py"]
log = logging.getLogger("mutations")


class Mutation(NamedTuple):
    """One seeded bug: in `path`, `old` (which occurs once) becomes `new`."""

    name: str
    path: str
    old: str
    new: str


POOL, TABLE, SCHEDULER = "pagedllm_core/kv/pool.py", "pagedllm_core/kv/table.py", "pagedllm_core/scheduler.py"
MUTATIONS = [
    Mutation(
        "a hit does not pin", POOL, "            self._ref[block] += 1\n        return block", "        return block"
    ),
    Mutation("a reference is not dropped", POOL, "        self._ref[block] -= 1\n", "        self._ref[block] -= 0\n"),
    Mutation(
        "evicted blocks can still be found",
        POOL,
        "            self._forget(block)\n        else:\n            raise",
        "        else:\n            raise",
    ),
    Mutation(
        "most recently used goes first",
        POOL,
        "block, _ = self._cached.popitem(last=False)",
        "block, _ = self._cached.popitem()",
    ),
    Mutation(
        "a failed step's blocks stay",
        POOL,
        "            self._forget(block, keep_pending=True)\n",
        "            pass\n",
    ),
    Mutation("blocks stay although caching is off", POOL, "if indexed and self._retain and", "if indexed and"),
    Mutation(
        "sealed blocks are writable",
        POOL,
        "return self._ref[block] == 1 and self._hash[block] is None",
        "return self._ref[block] >= 1",
    ),
    Mutation(
        "no copy on write",
        TABLE,
        "        if source is not None:\n            index",
        "        if source is None and False:\n            index",
    ),
    Mutation("a copied block keeps its reader", TABLE, "            self._pool.release(source)\n", ""),
    Mutation("a fork takes no reference", TABLE, "            self._pool.share(block)\n", "            pass\n"),
    Mutation("heads are evicted before tails", TABLE, "for block in reversed(blocks):", "for block in blocks:"),
    Mutation(
        "a hit covers the last token",
        SCHEDULER,
        "last = (min(target, sequence.num_tokens - 1)) // size",
        "last = sequence.num_tokens // size",
    ),
    Mutation("sealed one block too early", SCHEDULER, "end // self.block_size):", "-(-end // self.block_size)):"),
    Mutation("the oldest is preempted", SCHEDULER, "self.preempt(self.running[-1])", "self.preempt(self.running[0])"),
    Mutation(
        "copies are not counted",
        SCHEDULER,
        "return needed + sum(min(count, self.pool.ref(block) - 1) for block, count in writers.items())",
        "return needed",
    ),
    Mutation(
        "resuming forks lose a token",
        SCHEDULER,
        "held_back = 1 if len(active) > 1 else 0",
        "held_back = 2 if len(active) > 1 else 0",
    ),
    Mutation("seats are not counted", SCHEDULER, "            seats -= request.seats\n", ""),
    Mutation(
        "a preempted request starts over",
        "pagedllm_core/request.py",
        "        self.table.release()\n        self.num_computed = 0",
        "        self.table.release()\n        del self.token_ids[self.prompt_length :]\n        self.num_computed = 0",
    ),
    Mutation("the salt is ignored", "pagedllm_core/intake.py", "params.cache_salt, private)", "None, private)"),
    Mutation(
        "a draw depends on the batch slot",
        "pagedllm_core/decode/sample.py",
        "np.array([draw.index for draw in draws], dtype=np.uint64)",
        "np.arange(len(draws), dtype=np.uint64)",
    ),
    Mutation(
        "the best of many are the worst",
        "pagedllm_core/delivery.py",
        "-sequence.cumulative_logprob",
        "sequence.cumulative_logprob",
    ),
    Mutation(
        "a failed step takes everybody with it",
        "pagedllm_core/engine.py",
        "        if suspect is not None:\n            logger",
        "        for culprit in culprits:\n            self._fail(culprit, _as_failure(culprit, error))\n        if suspect is not None:\n            logger",
    ),
    Mutation(
        "half a character is handed out",
        "pagedllm_core/decode/detokenize.py",
        "stable = new[: len(new) - open_end]",
        "stable = new",
    ),
    Mutation(
        "stop strings are found too late",
        "pagedllm_core/decode/detokenize.py",
        "max(0, self._search_from + 1 - len(stop))",
        "self._search_from",
    ),
]


def survives(mutation: Mutation, folder: Path) -> bool:
    """True where no test fails with the bug in place."""
    target = folder / mutation.path
    text = target.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: the text to replace occurs {text.count(mutation.old)} times in {mutation.path}"
        )
    target.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", "60", *TESTS]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    finally:
        target.write_text(text, encoding="utf-8")
    caught = next((line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    log.info("%-45s %s", mutation.name, f"caught by {caught[7:100]}" if run.returncode else "SURVIVES")
    return run.returncode == 0


def main() -> int:
    """Run the mutations whose name holds the first argument (all without one); exit status 1 if any survives."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutation for mutation in MUTATIONS if wanted in mutation.name]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("pagedllm_core", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        survivors = [mutation.name for mutation in chosen if survives(mutation, folder)]
    log.info("%d of %d caught", len(chosen) - len(survivors), len(chosen))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
