"""Sixty questions to forty leaflets of a clinic, all at once, with LlamaIndex, Qdrant and PagedLLM in one process.

    pip install -r examples/clinic_assistant/requirements.txt
    python examples/clinic_assistant/ask.py
    python examples/clinic_assistant/ask.py "Where is the night entrance?"

It runs offline: the embedding model comes from a package, and the vectors stay in this process.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from assistant import ClinicAssistant
from llama_index.llms.pagedllm import PagedLLM
from material import MAX_TOKENS, QUESTIONS, READ, Reply, read_questions
from report import ask_all, show, summarize

from pagedllm_core import shutdown


async def ask_one(assistant: ClinicAssistant, question: str) -> None:
    """Print one answer while it is written, and its source."""
    async for part in assistant.stream(question):
        if isinstance(part, Reply):
            print(f"\n  [{part.citation.leaflet.name}]" if part.citation else "")
        else:
            print(part, end="", flush=True)


async def ask_file(assistant: ClinicAssistant, path: Path) -> None:
    """Ask a file of questions and print how it went."""
    questions = read_questions(path)
    await assistant.llm.acomplete("Hello")  # the model is loaded outside the measured time
    replies, seconds = await ask_all(assistant.ask, questions)
    show(questions, replies)
    print(f"\n{summarize(questions, replies, seconds)}")


async def run(arguments: argparse.Namespace) -> None:
    """Index the leaflets and ask."""
    llm = PagedLLM(model=arguments.model, temperature=0, max_tokens=MAX_TOKENS)
    given = {"url": arguments.qdrant, "llm": llm, "read": arguments.read, "embedding": arguments.embedding}
    async with ClinicAssistant(**given) as assistant:
        if arguments.question:
            await ask_one(assistant, arguments.question)
        else:
            await ask_file(assistant, arguments.questions)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Ask the clinic's leaflets.")
    parser.add_argument("question", nargs="?", help="one question; without it, those of a file")
    parser.add_argument("--questions", type=Path, metavar="FILE", default=QUESTIONS, help="default %(default)s")
    parser.add_argument("--model", default="tiny", help="any causal language model (default: the bundled one)")
    parser.add_argument("--embedding", metavar="NAME", help="any sentence-transformer (default: one from a package)")
    parser.add_argument("--qdrant", metavar="URL", help="a Qdrant server instead of the embedded one")
    parser.add_argument("--read", type=int, default=READ, help="passages that the model reads (default %(default)s)")
    asyncio.run(run(parser.parse_args()))
    shutdown()


if __name__ == "__main__":
    main()
