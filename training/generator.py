"""The seeded stream of training dialogues."""

from __future__ import annotations

import random
from collections.abc import Iterator

from .context_tasks import ContextTasks, Dialogue, lookup, recite
from .other_tasks import ToolMaker, extraction, memory, repeat, talk

# share of each task at the beginning and from a quarter of the training on
EARLY = {
    "context": 0.30,
    "lookup": 0.20,
    "recite": 0.17,
    "tools": 0.06,
    "json": 0.06,
    "memory": 0.03,
    "talk": 0.02,
    "repeat": 0.16,
}
LATE = {
    "context": 0.58,
    "lookup": 0.05,
    "recite": 0.10,
    "tools": 0.12,
    "json": 0.07,
    "memory": 0.04,
    "talk": 0.02,
    "repeat": 0.02,
}


def mixture(progress: float) -> dict[str, float]:
    """The shares of the tasks at a progress between 0 and 1."""
    part = min(1.0, max(0.0, progress - 0.05) / 0.2)
    return {task: EARLY[task] * (1 - part) + LATE[task] * part for task in LATE}


class Generator:
    """Draws dialogues of all tasks from one seeded random source."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.context = ContextTasks()
        self.tools = ToolMaker()

    def dialogue(self, progress: float = 1.0) -> Dialogue:
        """The next dialogue."""
        shares = mixture(progress)
        task = self.rng.choices(list(shares), list(shares.values()))[0]
        if task == "context":
            size = self.rng.choice(
                [0.4, 0.6, 0.8]
                if progress < 0.3
                else [0.6, 0.8, 1.0, 1.3]
                if progress < 0.6
                else [0.6, 0.8, 1.0, 1.3, 1.6]
            )
            return self.context.qa(self.rng, size)
        if task == "tools":
            return self.tools.calls(self.rng)
        simple = {"lookup": lookup, "recite": recite, "memory": memory, "talk": talk, "repeat": repeat}
        return extraction(self.rng) if task == "json" else simple[task](self.rng)

    def stream(self, progress: float = 1.0) -> Iterator[Dialogue]:
        """Dialogues without end."""
        while True:
            yield self.dialogue(progress)
