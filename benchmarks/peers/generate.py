"""transformers' `generate`, behind the protocol of `benchmarks/peers/protocol.py`.

    PYTHON benchmarks/peers/generate.py FOLDER --threads N --dtype bfloat16|float32 [--alone] [--device cuda]

Whenever it is free it takes all requests that have come, as one padded batch; with --alone it takes one.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Progress, arguments, run
from transformers import AutoModelForCausalLM


class Generate:
    """A `Peer` that hands out everything at the end of a batch."""

    def __init__(self, folder: str, threads: int, dtype: str, alone: bool, device: str) -> None:
        torch.set_num_threads(threads)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model = model.to(device).eval()
        self._alone = alone
        self._waiting: list[tuple[int, list[int], int, int]] = []
        kind = "one at a time" if alone else "padded batch"
        self.system = f"transformers {transformers.__version__}, {kind}"

    def add(self, number: int, prompt: list[int], length: int, beams: int) -> None:
        """Takes a request."""
        self._waiting.append((number, prompt, length, beams))

    def step(self) -> list[Progress]:
        """Serves one batch to its end."""
        chosen = self._waiting[:1] if self._alone else self._waiting
        self._waiting = self._waiting[len(chosen) :]
        width = max(len(prompt) for _, prompt, _, _ in chosen)
        padded = [[0] * (width - len(prompt)) + prompt for _, prompt, _, _ in chosen]
        masked = [[0] * (width - len(prompt)) + [1] * len(prompt) for _, prompt, _, _ in chosen]
        ids, mask = (torch.tensor(rows, device=self._model.device) for rows in (padded, masked))
        longest = max(length for _, _, length, _ in chosen)
        output = self._model.generate(
            ids, attention_mask=mask, max_new_tokens=longest, num_beams=chosen[0][3], do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        rows = output[:, width:].tolist()
        return [
            Progress(number, row[:length], finished=True)
            for (number, _, length, _), row in zip(chosen, rows, strict=True)
        ]


def main() -> None:
    """Command line."""
    options = arguments(__doc__, "alone")
    run(lambda: Generate(str(options.folder), options.threads, options.dtype, options.alone, options.device))


if __name__ == "__main__":
    main()
