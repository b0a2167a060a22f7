"""The twin of `ask.py` with LangChain and `langchain-qdrant`.

    pip install -r examples/clinic_assistant/requirements.txt
    python examples/clinic_assistant/ask_langchain.py

The leaflets, the questions and the figures are the same; the passages are cut by another splitter.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from langchain_assistant import LangChainClinicAssistant
from langchain_pagedllm import ChatPagedLLM
from material import MAX_TOKENS, QUESTIONS, READ, read_questions
from report import ask_all, show, summarize

from pagedllm_core import shutdown


async def run(assistant: LangChainClinicAssistant, path: Path) -> None:
    """Ask a file of questions and print how it went."""
    questions = read_questions(path)
    await assistant.chat.ainvoke("Hello")  # the model is loaded outside the measured time
    replies, seconds = await ask_all(assistant.ask, questions)
    show(questions, replies)
    print(f"\n{summarize(questions, replies, seconds)}")


def main() -> None:
    """Read the command line, index the leaflets and ask."""
    parser = argparse.ArgumentParser(description="Ask the clinic's leaflets, with LangChain.")
    parser.add_argument("--questions", type=Path, metavar="FILE", default=QUESTIONS, help="default %(default)s")
    parser.add_argument("--model", default="tiny", help="any causal language model (default: the bundled one)")
    parser.add_argument("--embedding", metavar="NAME", help="any sentence-transformer (default: one from a package)")
    parser.add_argument("--qdrant", metavar="URL", help="a Qdrant server instead of the embedded one")
    parser.add_argument("--read", type=int, default=READ, help="passages that the model reads (default %(default)s)")
    arguments = parser.parse_args()
    chat = ChatPagedLLM(model=arguments.model, temperature=0, max_tokens=MAX_TOKENS)
    assistant = LangChainClinicAssistant(
        url=arguments.qdrant, chat=chat, read=arguments.read, embedding=arguments.embedding
    )
    asyncio.run(run(assistant, arguments.questions))
    shutdown()


if __name__ == "__main__":
    main()
