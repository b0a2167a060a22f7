"""Seeds known bugs, one at a time, into a copy of the core, and shows which test catches each.

    python -m tests.mutations             # all; exits with 1 if a bug survives
    python -m tests.mutations swap        # those whose name holds "swap"

A test that cannot fail proves nothing. Each entry is a mistake somebody could make in the pool, the tables, the
scheduler, swapping, the sampling or the overlap of steps.
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
UNIT = ("engine", "policies", "swapping", "swapping_faults", "prefix_cache", "sampling", "detokenize", "guided")
UNIT += ("overlap", "device_sampler", "beam_rule", "beam")
PROPERTY = ("pool", "simulator", "state_machines", "guided", "company")
TESTS = [*(f"tests/unit/test_{name}.py" for name in UNIT), *(f"tests/property/test_{name}.py" for name in PROPERTY)]
log = logging.getLogger("mutations")


class Mutation(NamedTuple):
    """One seeded bug: in `path`, `old` (which occurs once) becomes `new`."""

    name: str
    path: str
    old: str
    new: str


POOL, TABLE, SCHEDULER = "pagedllm_core/kv/pool.py", "pagedllm_core/kv/table.py", "pagedllm_core/scheduler.py"
GUIDED, ADVANCE, FINISH = (
    "pagedllm_core/decode/guided.py",
    "pagedllm_core/decode/advance.py",
    "pagedllm_core/decode/finish.py",
)
QUEUE, BEAM = "pagedllm_core/queue.py", "pagedllm_core/decode/beam.py"
HASHING, OFFLOAD, ENGINE = "pagedllm_core/kv/hashing.py", "pagedllm_core/kv/offload.py", "pagedllm_core/engine.py"
MOVES, OVERLAP, REQUEST = "pagedllm_core/moves.py", "pagedllm_core/overlap.py", "pagedllm_core/request.py"
DEVICE, LAUNCH = "pagedllm_core/decode/device.py", "pagedllm_core/decode/launch.py"
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
        "            self._forget(block)\n        self._pending",
        "            pass\n        self._pending",
    ),
    Mutation("blocks stay although caching is off", POOL, " or not self._retain", ""),
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
    Mutation(
        "sealed one block too early",
        SCHEDULER,
        "range(start // self.block_size, min(",
        "range(start // self.block_size, 1 + min(",
    ),
    Mutation(
        "the oldest is preempted",
        SCHEDULER,
        "self.preempt(self.running[-1], batch)",
        "self.preempt(self.running[0], batch)",
    ),
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
        "            self.swapped = None\n        self.num_computed = 0",
        "            self.swapped = None\n        del self.token_ids[self.prompt_length :]\n        self.num_computed = 0",
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
        ENGINE,
        "        if suspect is not None:\n            logger",
        "        for culprit in culprits:\n            self._fail(culprit, as_failure(culprit.request_id, error))\n        if suspect is not None:\n            logger",
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
    Mutation(
        "a block in use stays among the cached",
        POOL,
        "                del self._cached[block]\n",
        "                self._cached[block]\n",
    ),
    Mutation("beams: any candidate may finish", BEAM, "elif rank < rule.width and not closed:", "elif not closed:"),
    Mutation(
        "beams: the end token does not count",
        BEAM,
        "finished_score(candidate.score, length)",
        "finished_score(candidate.score, length - 1)",
    ),
    Mutation(
        "beams: no stop test",
        BEAM,
        "        return rule.finished_score(self.scores[0], assumed) > self.finished[-1][0]",
        "        return True",
    ),
    Mutation("beams: never is False", BEAM, "rule.max_tokens if rule.early_stopping", "length if rule.early_stopping"),
    Mutation("beams: never whatever the penalty", BEAM, " and rule.length_penalty > 0", ""),
    Mutation("beams: one end token less", BEAM, "max(2, 1 + self.num_end_tokens)", "max(2, self.num_end_tokens)"),
    Mutation(
        "beams: True goes on",
        BEAM,
        " or (rule.early_stopping is True and self.full)\n        return",
        "\n        return",
    ),
    Mutation("a new key starts below whoever waits", QUEUE, "self._level += cost / self._sharers", "pass"),
    Mutation("an idle key saves up", QUEUE, "max(self._counters.get(key, 0.0), self._level)", "0.0"),
    Mutation("what is recomputed is charged again", SCHEDULER, "max(start, sequence.num_charged)", "start"),
    Mutation(
        "a group is admitted without room to fork", SCHEDULER, "needed += request.width", "needed += 0 * request.width"
    ),
    Mutation("a block that is not computed is kept", POOL, " or self._is_pending(block)", ""),
    Mutation(
        "the second block of one content is kept",
        POOL,
        "return self._index.setdefault(block_hash, block) == block",
        "return True",
    ),
    Mutation(
        "the second block of one content is lost with the first",
        POOL,
        "self._index.setdefault(block_hash, block) == block",
        "self._index.get(block_hash) == block",
    ),
    Mutation(
        "the second block of one content is found",
        POOL,
        "        self._index.setdefault(block_hash, block)\n",
        "        self._index[block_hash] = block\n",
    ),
    Mutation(
        "forgetting a block forgets its twin",
        POOL,
        "            if self._index.get(block_hash) == block:\n",
        "            if block_hash in self._index:\n",
    ),
    Mutation(
        "a successful step's blocks stay in doubt",
        POOL,
        "        self._pending.popleft()\n        if not self._pending:\n            self._pending.append(set())\n",
        "        pass\n",
    ),
    Mutation(
        "a step commits what the next one sealed",
        POOL,
        "        self._pending.popleft()\n        if not self._pending:\n            self._pending.append(set())\n",
        "        self._pending = deque([set()])\n",
    ),
    Mutation("an evicted block keeps its hash", POOL, "            self._hash[block] = None\n", "            pass\n"),
    Mutation(
        "neighbours are not preferred",
        POOL,
        "if after is not None and after + 1 in self._free:",
        "if after is not None and after - 1 in self._free and after + 1 in self._free:",
    ),
    Mutation("two forks have one list of blocks", TABLE, "other._ids = self._ids.copy()", "other._ids = self._ids"),
    Mutation(
        "released from the table, not from the pool",
        TABLE,
        "            self._pool.release(block)\n",
        "            pass\n",
    ),
    Mutation("a block's address forgets what came before", HASHING, "hashlib.sha256(parent + np", "hashlib.sha256(np"),
    Mutation(
        "parts of the root run together",
        HASHING,
        'digest.update(len(data).to_bytes(8, "little") + data)',
        "digest.update(data)",
    ),
    Mutation(
        "nothing is reused",
        SCHEDULER,
        "                return\n            sequence.num_computed += size",
        "                return\n            return\n            sequence.num_computed += size",
    ),
    Mutation(
        "sealed one block too late",
        SCHEDULER,
        "min(end, len(sequence.token_ids)) // self.block_size):",
        "(min(end, len(sequence.token_ids)) - 1) // self.block_size):",
    ),
    Mutation(
        "cached blocks are admitted twice",
        SCHEDULER,
        "if block is None or self.pool.ref(block) == 0:",
        "if block is None:",
    ),
    Mutation(
        "a preempted request goes to the end",
        SCHEDULER,
        "bisect.insort(self.running, request, key=self.waiting.order)",
        "self.running.append(request)",
    ),
    Mutation(
        "after a failed step all go on as if it had run",
        ENGINE,
        "        for request in running:\n            self.scheduler.preempt(request)\n",
        "",
    ),
    Mutation(
        "copy on write before swapping out",
        MOVES,
        "        for copy, moves in (",
        "        if batch.copies:\n            self._runner.copy_blocks(batch.copies)\n        for copy, moves in (",
    ),
    Mutation("swapped out, but not copied", SCHEDULER, "            batch.swap_out += moves\n", "            pass\n"),
    Mutation(
        "swapped in, but not copied",
        SCHEDULER,
        "batch.swap_in += self.swap.swap_in(request, self.pool)",
        "self.swap.swap_in(request, self.pool)",
    ),
    Mutation(
        "swapped in without the room",
        SCHEDULER,
        "rows, needed = len(request.active), blocks + len(request.active)",
        "rows, needed = len(request.active), len(request.active)",
    ),
    Mutation(
        "swapped in without room for the next step",
        SCHEDULER,
        "rows, needed = len(request.active), blocks + len(request.active)",
        "rows, needed = len(request.active), blocks",
    ),
    Mutation(
        "swapped in beyond the token budget",
        SCHEDULER,
        "batch.num_tokens + rows <= self.max_num_batched_tokens",
        "True",
    ),
    Mutation(
        "swapped out and too large to come back",
        SCHEDULER,
        "        return not self.running\n",
        "        return False\n",
    ),
    Mutation(
        "swapped out is admitted as if it were new",
        SCHEDULER,
        "        if not request.swapped:\n",
        "        if True:\n",
    ),
    Mutation("a failed step's swapping out is believed", SCHEDULER, "        self.swap.withdraw()\n", ""),
    Mutation("a successful step's swapping out stays in doubt", SCHEDULER, "        self.swap.commit()\n", ""),
    Mutation(
        "a swapped request that ends keeps its host blocks",
        "pagedllm_core/request.py",
        "            self.swapped.release()\n",
        "",
    ),
    Mutation(
        "a failed step's swapping out is withdrawn for one sequence",
        OFFLOAD,
        "            for sequence in request.sequences:\n                sequence.rewind()\n",
        "            request.sequences[0].rewind()\n",
    ),
    Mutation(
        "what forks share is swapped out twice",
        OFFLOAD,
        "                if block in host:\n",
        "                if block in host and False:\n",
    ),
    Mutation(
        "what forks share is swapped out with one reference",
        OFFLOAD,
        "                    self.pool.share(host[block])\n",
        "                    pass\n",
    ),
    Mutation(
        "what forks share is swapped in twice",
        OFFLOAD,
        "                if block in device:\n",
        "                if block in device and False:\n",
    ),
    Mutation(
        "what forks share is swapped in with one reference",
        OFFLOAD,
        "                    pool.share(device[block])\n",
        "",
    ),
    Mutation("swapping out keeps the device blocks", OFFLOAD, "            sequence.table.release()\n", ""),
    Mutation("swapping in keeps the host blocks", OFFLOAD, "            swapped.release()\n", ""),
    Mutation(
        "swapping out more than there is room for",
        OFFLOAD,
        "0 < len(blocks) <= self.pool.num_available",
        "0 < len(blocks)",
    ),
    Mutation(
        "a swapped-in partial block is sealed",
        OFFLOAD,
        "                    if full:\n",
        "                    if True:\n",
    ),
    Mutation(
        "a swapped-in partial block is looked up",
        OFFLOAD,
        "elif not full or not sequence.table",
        "elif not sequence.table",
    ),
    Mutation(
        "a swapped-in full block is always copied",
        OFFLOAD,
        "elif not full or not sequence.table.append_cached(sequence.block_hash(index)):",
        "elif True:",
    ),
    Mutation(
        "a swapped-in full block is not sealed",
        OFFLOAD,
        "                        sequence.table.seal(index, sequence.block_hash(index))\n",
        "                        pass\n",
    ),
    Mutation(
        "swapping moves host blocks to the wrong place",
        OFFLOAD,
        "moves.append((block, int(sequence.table.ids[index])))",
        "moves.append((block, int(sequence.table.ids[0])))",
    ),
    Mutation("swapping is thought to cost one copy", OFFLOAD, "return 2 * (", "return 1 * ("),
    Mutation(
        "without caching others' blocks are found while they run",
        "pagedllm_core/intake.py",
        'private = None if self._config.enable_prefix_caching else f"request {number}"',
        "private = None",
    ),
    Mutation("a chunk exceeds the token budget", SCHEDULER, "wanted = min(missing, budget, ", "wanted = min(missing, "),
    Mutation(
        "what a resumed request finds counts as a hit",
        SCHEDULER,
        "if request.metrics.preemptions == 0 and sequence.num_generated == 0:",
        "if sequence.num_generated == 0:",
    ),
    Mutation(
        "a decoding sequence is thought to need no block",
        SCHEDULER,
        "            if sequence.num_computed == sequence.table.room():\n                needed += 1\n",
        "            if sequence.num_computed == sequence.table.room():\n",
    ),
    Mutation("copied the wrong way", TABLE, "copy = (source, destination)", "copy = (destination, source)"),
    Mutation(
        "a parent writes before its forks are made",
        "pagedllm_core/decode/advance.py",
        "choices.sort(key=lambda choice: choice.child == choice.sequence.index)",
        "choices.sort(key=lambda choice: choice.child != choice.sequence.index)",
    ),
    Mutation(
        "a beam that is dropped keeps its blocks",
        "pagedllm_core/decode/beam_step.py",
        "        if parent not in children:\n            parent.rewind()\n",
        "        pass\n",
    ),
    Mutation(
        "beams share one parent's list of tokens",
        "pagedllm_core/request.py",
        "other = Sequence(index, self.token_ids.copy(), ",
        "other = Sequence(index, self.token_ids, ",
    ),
    Mutation(
        "requests time out before their time", ENGINE, "self._deadlines.passed(now)", "self._deadlines.passed(1e9)"
    ),
    Mutation(
        "a request tried alone is not alone",
        ENGINE,
        "self.scheduler.schedule(only=suspect)",
        "self.scheduler.schedule()",
    ),
    Mutation("guided: any closing fits", GUIDED, "len(closing) <= room", "len(closing) <= room + 1"),
    Mutation(
        "guided: known closings are kept too long",
        GUIDED,
        "        self._known, self._failures = {}, 0\n",
        "        self._failures = 0\n",
    ),
    Mutation("guided: a fork shares its matcher", GUIDED, "else self.matcher.deep_copy()", "else self.matcher"),
    Mutation(
        "guided: the budget is off by one",
        ADVANCE,
        "choice.sequence.num_generated - 1 for",
        "choice.sequence.num_generated for",
    ),
    Mutation(
        "guided: what is rejected is not chosen again", ADVANCE, "        tokens[rows] = sample(", "        _ = sample("
    ),
    Mutation(
        "guided: forced text is added where scores are asked for", ADVANCE, "and num_logprobs(request) is None", ""
    ),
    Mutation("guided: a stop string cuts what has a form", FINISH, "may_stop = may_stop and guide.accepting", "pass"),
    Mutation(
        "guided: a finished grammar goes on",
        FINISH,
        "complete = guide is not None and guide.finished",
        "complete = False",
    ),
    Mutation(
        "guided: the pool's room is not looked at",
        "pagedllm_core/intake.py",
        "min(limit, self._pool_room(prompt_tokens, params.width))",
        "limit",
    ),
    Mutation(
        "guided: the smallest output is not looked at",
        "pagedllm_core/intake.py",
        "needed = len(grammar.closing)",
        "needed = 0",
    ),
    Mutation(
        "guided: objects stay open", "pagedllm_core/decode/schema.py", 'done["additionalProperties"] = False', "pass"
    ),
    Mutation(
        "overlap: blocks are sealed before they are full",
        OVERLAP,
        "known % size == 0 and sequence.num_computed >= known",
        "known % size == 0",
    ),
    Mutation(
        "overlap: nothing is sealed",
        OVERLAP,
        "        if known % size == 0 and",
        "        if False and",
    ),
    Mutation(
        "overlap: the newest step is committed",
        POOL,
        "        self._pending.popleft()\n",
        "        self._pending.pop()\n",
    ),
    Mutation(
        "overlap: a second step shares what is pending",
        POOL,
        "        self._pending.append(set())\n\n    def commit",
        "        pass\n\n    def commit",
    ),
    Mutation(
        "overlap: a second step shares what is swapped",
        OFFLOAD,
        "        self._pending.append([])\n\n    def commit",
        "        pass\n\n    def commit",
    ),
    Mutation(
        "overlap: only the newest step is withdrawn",
        POOL,
        "set().union(*self._pending)",
        "list(self._pending[-1])",
    ),
    Mutation(
        "overlap: a step that fails stays ahead",
        ENGINE,
        "        except Exception:\n            forget(flight)\n            raise",
        "        except Exception:\n            raise",
    ),
    Mutation(
        "overlap: the step after it stays ahead",
        ENGINE,
        "                forget(self._flight)\n",
        "                pass\n",
    ),
    Mutation(
        "overlap: the step after it is read",
        ENGINE,
        "            self._flight = None\n            self._recover(flight.batch",
        "            self._recover(flight.batch",
    ),
    Mutation(
        "overlap: a short pool is not looked at",
        SCHEDULER,
        "if sum(map(self._decode_blocks, decoding)) > self.pool.num_available:",
        "if False:",
    ),
    Mutation(
        "overlap: scored prompts are not asked",
        OVERLAP,
        "if row.samples or wants_prompt_logprobs(row.request)))",
        "if row.samples))",
    ),
    Mutation(
        "overlap: a suspect has company",
        ENGINE,
        "if flight.allows_another and suspect is None:",
        "if flight.allows_another:",
    ),
    Mutation(
        "overlap: a finished sequence takes its token",
        OVERLAP,
        "if choice.sequence.finished or choice.request in failures:",
        "if choice.request in failures:",
    ),
    Mutation(
        "overlap: a failed request takes its token",
        OVERLAP,
        "if choice.sequence.finished or choice.request in failures:",
        "if choice.sequence.finished:",
    ),
    Mutation(
        "overlap: an ended request chooses",
        ADVANCE,
        "if sequence.finished or request.state is RequestState.FINISHED:",
        "if sequence.finished:",
    ),
    Mutation(
        "overlap: a buffer is written while it is read",
        LAUNCH,
        "            earlier.settle()",
        "            pass",
    ),
    Mutation(
        "overlap: a waiting copy is measured",
        MOVES,
        "                if alone:\n",
        "                if True:\n",
    ),
    Mutation(
        "overlap: an interrupted step stays ahead",
        REQUEST,
        "            sequence.ahead = 0\n\n",
        "            pass\n\n",
    ),
    Mutation(
        "overlap: an interrupted fork is made twice",
        REQUEST,
        "            del self.sequences[1:]\n",
        "            pass\n",
    ),
    Mutation(
        "overlap: closing keeps the step under way",
        ENGINE,
        "self._closed, self._flight = True, None",
        "self._closed = True",
    ),
]


def run_tests(folder: Path) -> subprocess.CompletedProcess[str]:
    """The tests that are to catch bugs, up to the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", "120", *TESTS]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


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
        run = run_tests(folder)
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
        if (run := run_tests(folder)).returncode:
            raise RuntimeError(f"the tests fail without any bug:\n{run.stdout[-2000:]}")
        survivors = [mutation.name for mutation in chosen if survives(mutation, folder)]
    log.info("%d of %d caught", len(chosen) - len(survivors), len(chosen))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
