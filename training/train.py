"""Trains the model `tiny` on a processor, one process per core; the schedule follows the wall clock.

torchrun --nproc-per-node 2 -m training.train --minutes 85 --folder training/runs/main [--resume]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from .attention import Kind, Target, Watcher
from .build import BUNDLED, SEED, configuration, export_weights
from .chatml import END, END_OF_TEXT, segments, token_id
from .evaluate import evaluate, overall
from .generator import Generator, rare_words
from .muon import BFLOAT16, Muon
from .targets import Texts, copies, find_source, find_starts, find_values, find_words

log = logging.getLogger("training")
TOKENS_PER_STEP = 3584
POOL_STEPS = 20  # batches that are cut from one pool of dialogues
LONGEST_STEP = 10  # seconds that a step counts at most: a run that was stopped goes on where it was
OTHER_WEIGHT = 0.03
OTHER_SHARE = 0.2  # part of the other tokens on which the loss is computed


Encoded = tuple[list[int], list[float], list[Target]]


class Batches:
    """Batches of dialogues of similar length, one dialogue a row, padded on the right."""

    def __init__(self, seed: int, tokenizer: Tokenizer, share: int = 1) -> None:
        self.tokens = TOKENS_PER_STEP // share
        self.generator = Generator(seed, rare_words(tokenizer))
        self.tokenizer = tokenizer
        self.end = token_id(tokenizer, END_OF_TEXT)
        self.ready: list[list[Encoded]] = []

    def encode(self, progress: float) -> Encoded:
        """One dialogue as tokens, loss weights and the places from which its answers are copied."""
        dialogue = self.generator.dialogue(progress)
        ids: list[int] = []
        weights: list[float] = []
        targets: list[Target] = []
        texts: Texts = []
        questions = list(dialogue.questions)
        for text, learnt in segments(dialogue.messages, dialogue.tools):
            part = self.tokenizer.encode(text)
            if learnt:
                answer = text.removesuffix(END)
                place = find_source(texts, answer)
                places = []
                if place is not None:
                    places = [(-1, *place)]
                    targets += [(Kind.POINT, len(ids) + step, *place) for step in range(min(5, len(part.ids) - 1))]
                elif text.startswith(("{", "<tool_call>")):
                    places, links = find_values(texts, text, part, len(ids))
                    targets += links
                targets += [(Kind.POINT, len(ids) + query, a, b) for query, a, b in places]
                for query, a, b in places:
                    targets += copies(ids + part.ids, len(ids) + query, a, b)
                if questions and questions[0][1] == answer:
                    targets += self.question_targets(texts, *questions.pop(0), len(ids) - 1)
            else:
                if not texts or len(part.ids) > 60:
                    targets += find_starts(text, part, len(ids), self.generator.rng)
                texts.append((len(ids), text, part))
            targets += [
                (Kind.PREVIOUS, len(ids) + i, len(ids) + i - 1, len(ids) + i) for i in range(1, len(part.ids), 9)
            ]
            ids += part.ids
            weights += [1.0 if learnt else OTHER_WEIGHT] * len(part.ids)
        return ids, weights, targets

    def question_targets(self, texts: Texts, question: str, answer: str, position: int) -> list[Target]:
        """What the words of a question and the beginning of its answer, at `position`, should look at."""
        targets = find_words(texts, question, answer)
        place = find_source(texts, question)
        return targets if place is None else [*targets, (Kind.GATHER, position, *place)]

    def fill(self, progress: float) -> None:
        """Draws a pool of dialogues and cuts it, sorted by length, into batches."""
        longest = 512 if progress < 0.2 else 1024 if progress < 0.4 else 2048
        pool: list[Encoded] = []
        while sum(len(ids) for ids, _, _ in pool) < POOL_STEPS * self.tokens:
            item = self.encode(progress)
            if len(item[0]) <= longest:
                pool.append(item)
        pool.sort(key=lambda item: len(item[0]))
        batch: list[Encoded] = []
        for item in pool:
            if batch and len(item[0]) * (len(batch) + 1) > self.tokens:
                self.ready.append(batch)
                batch = []
            batch.append(item)
        self.ready.append(batch)
        self.generator.rng.shuffle(self.ready)

    def batch(self, progress: float) -> tuple[Tensor, Tensor, list[tuple[int, Target]]]:
        """Tokens, weights and, with their rows, the targets of attention of one step."""
        if not self.ready:
            self.fill(progress)
        rows = self.ready.pop()
        length = max(len(row[0]) for row in rows)
        ids = [row[0] + [self.end] * (length - len(row[0])) for row in rows]
        weights = [row[1] + [0.0] * (length - len(row[1])) for row in rows]
        targets = [(index, target) for index, row in enumerate(rows) for target in row[2]]
        return torch.tensor(ids), torch.tensor(weights), targets


def loss_of(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """The weighted loss of a batch and the plain loss on assistant tokens."""
    target, weight = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    chosen = (weight == 1.0) | ((weight > 0) & (torch.rand_like(weight) < OTHER_SHARE))
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)[chosen]
    losses = functional.cross_entropy(model.lm_head(hidden), target[chosen], reduction="none")
    weight = weight[chosen]
    weight = torch.where(weight == 1.0, weight, weight / OTHER_SHARE)
    learnt = losses.detach()[weight == 1.0].mean().item()
    return (losses * weight).sum() / weight.sum(), learnt


class Trainer:
    """Model, optimisers and the state of one run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.run = Path(arguments.folder)
        self.run.mkdir(parents=True, exist_ok=True)
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(arguments.seed)
        self.model = LlamaForCausalLM(configuration())
        self.model.set_attn_implementation("training")
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        rest = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=arguments.lr, weight_decay=0.1),
            torch.optim.AdamW(rest, lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.watcher = Watcher(self.model)
        self.attention = dict.fromkeys(self.watcher.heads, 3.0)
        self.tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
        self.elapsed, self.tokens, self.step, self.best = 0.0, 0, 0, -1.0
        if arguments.resume and (self.run / "checkpoint.pt").exists():
            self.load()
        elif arguments.weights:
            given = LlamaForCausalLM.from_pretrained(arguments.weights, dtype=torch.float32)
            self.model.load_state_dict(given.state_dict())
        if arguments.elapsed is not None:
            self.elapsed = arguments.elapsed * 60
        self.renew_batches()

    def renew_batches(self) -> None:
        """A new seeded stream of dialogues for this process."""
        seed = (self.arguments.seed + 1 + self.step) * 64 + self.rank
        self.batches = Batches(seed, self.tokenizer, self.size)

    def sum_gradients(self) -> None:
        """Averages the gradients of all processes."""
        if self.size == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient) / self.size)

    def clock(self, elapsed: float) -> float:
        """The time of the first process, so that all follow one schedule."""
        if self.size == 1:
            return elapsed
        shared = torch.tensor([elapsed], dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared.item())

    def load(self) -> None:
        """Continues from the checkpoint of the run."""
        state = torch.load(self.run / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.elapsed, self.tokens, self.step, self.best = (state[k] for k in ("elapsed", "tokens", "step", "best"))

    def save(self) -> None:
        """Writes the checkpoint atomically."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "elapsed": self.elapsed,
            "tokens": self.tokens,
            "step": self.step,
            "best": self.best,
        }
        torch.save(state, self.run / "checkpoint.tmp")
        os.replace(self.run / "checkpoint.tmp", self.run / "checkpoint.pt")

    def update(self, progress: float) -> float:
        """One optimiser step."""
        factor = min(1.0, (self.step + 1) / 100) * min(1.0, (1.02 - progress) / 0.7)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.arguments.lr * factor
        ids, weights, targets = self.batches.batch(progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            loss, learnt = loss_of(self.model, ids, weights)
        for head, part in self.watcher.losses(targets).items():
            self.attention[head] = 0.97 * self.attention[head] + 0.03 * part.item()
            loss = loss + head.weight * (1 - progress) * part
        loss.backward()
        self.sum_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids.numel() * self.size
        return learnt

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record to the training curve."""
        with (self.run / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        log.info("%s", record)

    def check(self, per_task: int) -> None:
        """Evaluates, keeps a checkpoint and exports the model when it is the best so far."""
        if self.rank == 0:
            self.check_here(per_task)
        self.renew_batches()

    def check_here(self, per_task: int) -> None:
        """The work of the first process at a check."""
        self.model.train(False)
        self.model.set_attn_implementation("sdpa")  # the training's own knows no cache
        result = evaluate(self.model, self.tokenizer, per_task)
        self.model.set_attn_implementation("training")
        self.model.train()
        score = overall(result)
        self.write({"step": self.step, "minutes": round(self.elapsed / 60, 1), "score": score, "exact": result})
        if score >= self.best - 0.02:
            self.best = max(self.best, score)
            if self.arguments.export:
                export_weights(self.model)
        self.save()

    def train(self) -> None:
        """Runs until the time is over."""
        total = self.arguments.minutes * 60
        last, next_check, mean = time.monotonic(), self.elapsed + self.arguments.every * 60, 0.0
        begin, first = last, self.tokens
        self.model.train()
        while self.elapsed < total:
            learnt = self.update(self.elapsed / total)
            mean = learnt if mean == 0 else 0.97 * mean + 0.03 * learnt
            now = time.monotonic()
            self.elapsed, last = self.clock(self.elapsed + min(now - last, LONGEST_STEP)), now
            if self.step % 25 == 0 and self.rank == 0:
                speed = (self.tokens - first) / (now - begin)
                record = {"step": self.step, "minutes": round(self.elapsed / 60, 2), "loss": round(mean, 4)}
                attention = {head.name: round(value, 3) for head, value in self.attention.items()}
                self.write({**record, **attention, "tokens": self.tokens, "tokens_per_second": round(speed)})
            if self.step % 100 == 0 and self.rank == 0:
                self.save()
            if self.elapsed >= next_check:
                self.check(self.arguments.per_task)
                now = time.monotonic()
                self.elapsed, last = self.clock(self.elapsed + now - last), now
                next_check = self.elapsed + self.arguments.every * 60
        self.check(self.arguments.per_task)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=85)
    parser.add_argument("--folder", default="training/runs/main")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--every", type=float, default=6, help="minutes between evaluations")
    parser.add_argument("--per-task", type=int, default=16)
    parser.add_argument("--elapsed", type=float, help="count this many minutes as already used")
    parser.add_argument("--weights", help="a model folder whose weights a new run starts from")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--export", action="store_true", help="write the best model into pagedllm_core/bundled/tiny")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    random.seed(arguments.seed)
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    Trainer(arguments).train()


if __name__ == "__main__":
    main()
