"""A decode step of a whole model against what it has to read, and how busy the GPU is while an engine runs."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peers.protocol import Progress, serve
from torch.profiler import ProfilerActivity, profile

from gpu_parts.attention import BLOCK, ragged_batch
from gpu_parts.machine import Context, median_seconds
from gpu_parts.serving import workload
from gpu_parts.shapes import CONFIGS, random_model, read_each_step
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.model import loader
from pagedllm_core.model.runner import ModelRunner
from pagedllm_core.params import SamplingParams

COLUMNS = {"steps": ["shape", "batch", "graphs", "milliseconds", "read limit", "of the limit", "bar"]}
KEYS = 1024
GOALS = {("8b", 1), ("8b", 64)}


def make_runner(context: Context, name: str, tokens: int) -> ModelRunner:
    """A runner over random weights, with a pool for so many tokens, full of random keys and values."""
    config = CONFIGS[name]()
    _, cached = read_each_step(config, context.dtype)
    # Private, as there is no other way to weights that never were on the host.
    loader._random_model = lambda hf_config, dtype, engine: random_model(  # type: ignore[assignment]
        hf_config, dtype, context.device, attn_implementation=loader.PAGED
    )
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
        config.save_pretrained(folder)
        settings: dict[str, Any] = {"device": str(context.device), "dtype": str(context.dtype)[6:], "swap_space": 0}
        runner = ModelRunner(
            EngineConfig(
                model=folder, load_format="dummy", kv_cache_memory=tokens * cached, block_size=BLOCK, max_num_seqs=256,
                **settings,
            )
        )  # fmt: skip
    for pool in runner._storage._pools:
        pool.normal_()
    return runner


def steps(context: Context) -> None:
    """Every batch size with graphs and without, host work included, and then the engine's loop.

    The limit is the copy roof over the bytes of all weights but the embedding's, and of the cache.
    """
    name: str = context.options["shape"]
    batches = (1, 2) if context.smoke else (1, 4, 16, 64, 256)
    keys = 40 if context.smoke else KEYS
    config = CONFIGS[name]()
    weights, cached = read_each_step(config, context.dtype)
    runner = make_runner(context, name, max(batches) * -(-(keys + 1) // BLOCK) * BLOCK)
    code: Any = runner._steps
    graphs = getattr(code, "graphs", None)
    kinds = [True, False] if graphs is not None else [False]
    cases = [(batch, with_graphs) for with_graphs in kinds for batch in batches]
    for done, (batch, with_graphs) in enumerate(cases):
        if graphs is not None:
            code.graphs = graphs if with_graphs else None
        cells = {"shape": name, "batch": batch, "graphs": "on" if with_graphs else "off"}
        with context.case(**cells):
            step = ragged_batch([keys - 1] * batch, 1, runner.num_blocks)
            for _ in range(3):  # the first one captures, the second is the first replay
                runner.run(step)
            if with_graphs and not graphs.buckets:
                raise RuntimeError("no graph was captured")
            limit = (weights + batch * keys * cached) / context.roofs["copy"]
            time_each = context.left() / (len(cases) - done + 2) / 2
            seconds = median_seconds(lambda: runner.run(step), context.device, min(3.0, time_each))  # noqa: B023
            share = limit / seconds
            goal = with_graphs and (name, batch) in GOALS
            context.row(
                **cells, milliseconds=f"{seconds * 1e3:.2f}",
                point=(f"{name}{'' if with_graphs else ', eager'}", batch, share),
                bar=context.bar(f"decode step, {name}, batch {batch}", 85, 100 * share) if goal else None,
                **{"read limit": f"{limit * 1e3:.2f}", "of the limit": f"{share:.0%}"},
            )  # fmt: skip
    if graphs is not None:
        code.graphs = graphs
    if name == context.options["served"] or context.smoke:
        with context.case(shape=name, batch="W1", graphs="on"):
            loop(context, runner, name)
    runner.close()


class InProcess:
    """A `Peer` over an engine here."""

    system = "PagedLLM"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, number: int, prompt: list[int], length: int, beams: int) -> None:
        """Takes a request."""
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        self._engine.add(prompt, params, request_id=str(number))

    def step(self) -> list[Progress]:
        """Advances all requests."""
        return [Progress(int(one.request_id), one.outputs[0].token_ids, one.finished) for one in self._engine.step()]


def loop(context: Context, runner: ModelRunner, name: str) -> None:
    """W1 twice through the engine, the second time profiled: the share of time in which the GPU runs something."""
    vocabulary = CONFIGS[name]().vocab_size
    peer = InProcess(Engine(EngineConfig(model="any", block_size=BLOCK, swap_space=0), runner=runner))
    serve(peer, workload("W1", vocabulary, 1, context.smoke))
    plain = serve(peer, workload("W1", vocabulary, 2, context.smoke))
    gpu = context.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiled:
        serve(peer, workload("W1", vocabulary, 3, context.smoke))
    share = busy_share(profiled)
    rate = sum(plain["tokens"]) / plain["total"]
    context.row(
        shape=name, batch=f"W1, {rate:,.0f} tokens/s", graphs="on", milliseconds="–",
        bar=context.bar("GPU busy in W1", 97, 100 * share),
        **{"read limit": "–", "of the limit": f"busy {share:.1%} (profiled)"},
    )  # fmt: skip


def busy_share(profiled: Any) -> float:
    """The time in which at least one kernel or copy runs, over the time from the first to the last."""
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiled.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        return 0.0
    busy, reached = 0, spans[0][0]
    for begin, end in spans:
        busy += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return busy / max(1, reached - spans[0][0])
