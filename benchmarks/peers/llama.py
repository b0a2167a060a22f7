"""llama.cpp, behind the protocol of `benchmarks/peers/protocol.py`.

    PYTHON benchmarks/peers/llama.py FOLDER --threads N --dtype bfloat16|float32

PYTHON's environment has `llama-cpp-python`, compiled for this processor, and `gguf`. Requests share each call of
`llama_decode`, as in llama.cpp's server: a token of every running sequence, then as much of new prompts as fits.
Nothing is shared between sequences, and llama.cpp has no beam search.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from protocol import Peer, Progress, Unsupported, apart, arguments, run

CONTEXT, SEQUENCES, BATCH = 4096, 8, 2048


@dataclass
class Sequence:
    """A running request: its tokens, how many of them are in the cache, how many are still to come."""

    number: int
    tokens: list[int]
    left: int
    cached: int = 0


@dataclass
class Queue:
    """Requests that run, by their place in llama.cpp's cache, and those that wait for a place."""

    running: dict[int, Sequence] = field(default_factory=dict)
    waiting: list[Sequence] = field(default_factory=list)

    def admit(self) -> None:
        """Gives free places to those who wait."""
        for place in range(SEQUENCES):
            if self.waiting and place not in self.running:
                self.running[place] = self.waiting.pop(0)


class Llama:
    """A `Peer` over llama.cpp's C interface.

    Args:
        path: A GGUF file.
        threads: Threads to compute with.
        dtype: Of the weights; the KV cache is as wide.
    """

    def __init__(self, path: Path, threads: int, dtype: str) -> None:
        self.system = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = CONTEXT * SEQUENCES, SEQUENCES
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = threads
        if dtype == "float32":  # otherwise 16 bits, which is the default
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._queue = Queue()

    def add(self, number: int, prompt: list[int], length: int, beams: int) -> None:
        """Takes a request."""
        if beams > 1:
            raise Unsupported("llama.cpp has no beam search")
        self._queue.waiting.append(Sequence(number, list(prompt), length))

    def step(self) -> list[Progress]:
        """One call of `llama_decode`."""
        self._queue.admit()
        rows = self._fill()
        if llama_cpp.llama_decode(self._context, self._batch) != 0:
            raise RuntimeError("llama_decode failed")
        given = []
        for place, row in rows.items():
            sequence = self._queue.running[place]
            logits = llama_cpp.llama_get_logits_ith(self._context, row)
            token = int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())
            sequence.tokens.append(token)
            sequence.left -= 1
            given.append(Progress(sequence.number, [token], sequence.left == 0))
            if sequence.left == 0:
                llama_cpp.llama_memory_seq_rm(self._memory, place, -1, -1)
                del self._queue.running[place]
        return given

    def _fill(self) -> dict[int, int]:
        """Fills the batch; returns the row of each place whose next token it will give."""
        batch, rows, row = self._batch, {}, 0
        # Those that decode have one token to compute and go first.
        for place, sequence in sorted(
            self._queue.running.items(), key=lambda item: len(item[1].tokens) - item[1].cached
        ):
            for token in sequence.tokens[sequence.cached : sequence.cached + BATCH - row]:
                batch.token[row], batch.pos[row] = token, sequence.cached
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, place
                batch.logits[row] = False
                sequence.cached += 1
                row += 1
            if sequence.cached == len(sequence.tokens):
                batch.logits[row - 1] = True
                rows[place] = row - 1
            if row == BATCH:
                break
        batch.n_tokens = row
        return rows


def tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All weights of a model folder, as float32."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            raw = data[8 + size + start : 8 + size + end]
            if entry["dtype"] == "BF16":  # the upper half of a float32
                values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = raw.view({"F32": np.float32, "F16": np.float16}[entry["dtype"]]).astype(np.float32)
            found[name] = values.reshape(entry["shape"])
    return found


def convert(folder: Path, path: Path, dtype: str) -> None:
    """Writes a Llama or Qwen2 model as GGUF, without a vocabulary."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[config["model_type"]]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']!r}; only 'default' is converted")
    kind = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(
        gguf.LlamaFileType.ALL_F32 if dtype == "float32" else gguf.LlamaFileType.MOSTLY_BF16,
    )
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, values in tensors(folder).items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        stem, _, suffix = name.rpartition(".")
        if config["model_type"] == "llama" and stem.endswith(("q_proj", "k_proj")):
            # For this architecture llama.cpp turns neighbouring pairs, not the two halves of a head.
            count = heads if stem.endswith("q_proj") else kv_heads
            values = values.reshape(count, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(values.shape)
        new_name = f"{names.get_name(stem)}.{suffix}"
        if values.ndim == 1:  # norms and biases are always kept wide
            writer.add_tensor(new_name, np.ascontiguousarray(values))
        else:
            writer.add_tensor(new_name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Command line."""
    options = arguments(__doc__)

    def load() -> Peer:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            apart(convert, options.folder, path, options.dtype)
            return Llama(path, options.threads, options.dtype)

    run(load)


if __name__ == "__main__":
    main()
