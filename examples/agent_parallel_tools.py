"""Six agents, each of which asks two tools in parallel: twelve tools, and the model within them, at the same time.

    python examples/agent_parallel_tools.py

A small model calls one tool at a time. The middleware below asks it for a call of each tool instead, in two requests
that share a batch, and makes one turn of them. Each tool then has the model read a report. Everything runs in this
process, offline, on the bundled model.
"""

from __future__ import annotations

import asyncio
import textwrap
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import BaseTool, tool
from langchain_pagedllm import ChatPagedLLM
from tqdm.auto import tqdm

from pagedllm_core import list_engines, shutdown

City = Literal["Oslo", "Lima", "Rome", "Cairo", "Delhi", "Quito"]
WEATHER = {
    "Oslo": "It snows in the morning. The temperature is 4 degrees. The wind comes from the north.",
    "Lima": "The sky is grey. The temperature is 17 degrees. There is fog at the coast.",
    "Rome": "The sun shines all day. The temperature is 26 degrees. There is hardly any wind.",
    "Cairo": "There is dust in the air. The temperature is 35 degrees. Drink enough water.",
    "Delhi": "The rain begins at noon. The temperature is 31 degrees. Some roads are closed.",
    "Quito": "Clouds hang over the hills. The temperature is 14 degrees. The evening is dry.",
}
TRAINS = {
    "Oslo": "The train leaves at 7:05 from platform 3. The restaurant car is closed.",
    "Lima": "The train leaves at 9:40 from platform 1. Bicycles cannot be taken.",
    "Rome": "The train leaves at 12:15 from platform 8. Seats have to be booked.",
    "Cairo": "The train leaves at 14:30 from platform 2. The journey takes all night.",
    "Delhi": "The train leaves at 16:55 from platform 11. There are two sleeping cars.",
    "Quito": "The train leaves at 20:10 from platform 5. Children travel free.",
}


class Progress(BaseCallbackHandler):
    """One step of a progress bar for each tool that has answered; counts how many run at once."""

    def __init__(self, total: int) -> None:
        self.bar = tqdm(total=total, desc="tools", unit="tool")
        self.running = self.most = 0

    def on_tool_start(self, *args: Any, **kwargs: Any) -> None:
        self.running += 1
        self.most = max(self.most, self.running)

    def on_tool_end(self, *args: Any, **kwargs: Any) -> None:
        self.running -= 1
        self.bar.update()


class CallEachTool(AgentMiddleware[Any, Any]):
    """Has an agent's first turn call every tool once, and its second answer."""

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[Any], Awaitable[ModelResponse[Any]]]
    ) -> Any:
        if isinstance(request.messages[-1], ToolMessage):
            return await handler(request.override(tool_choice="none"))
        names = [one.name for one in request.tools if isinstance(one, BaseTool)]
        responses = await asyncio.gather(*(handler(request.override(tool_choice=name)) for name in names))
        replies = [reply for response in responses for reply in response.result if isinstance(reply, AIMessage)]
        return AIMessage("", tool_calls=[call for reply in replies for call in reply.tool_calls])


def make_agent(chat: ChatPagedLLM) -> Any:
    """An agent with two tools; each of them has the model read a report."""

    async def read(report: str, question: str) -> str:
        messages = [
            SystemMessage("Answer the question from the report."),
            HumanMessage(f"Report:\n{report}\n\nQuestion: {question}"),
        ]
        return (await chat.ainvoke(messages)).text

    @tool
    async def get_weather(city: City) -> str:
        """Get the temperature in a city."""
        return await read(WEATHER[city], "What is the temperature?")

    @tool
    async def get_train(city: City) -> str:
        """Get the time when the train to a city leaves."""
        return await read(TRAINS[city], "When does the train leave?")

    return create_agent(chat, [get_weather, get_train], middleware=[CallEachTool()])


def show(city: str, messages: list[Any]) -> int:
    """Print what an agent did; returns how many of its calls named the right city."""
    _, turn, *results, answer = messages
    print(f"\n{messages[0].text}")
    right = 0
    for call, result in zip(turn.tool_calls, results, strict=True):
        correct = call["args"]["city"] == city
        right += correct
        print(f"  {call['name']}({call['args']['city']}) {'' if correct else '(the wrong city) '}-> {result.text}")
    print(textwrap.fill(" ".join(answer.text.split()), 100, initial_indent="  ", subsequent_indent="  "))
    return right


def main() -> None:
    """Run all agents at once and print what they did."""
    chat = ChatPagedLLM(model="tiny", temperature=0, max_tokens=60)
    chat.invoke("Hello!", max_tokens=1)  # loads the model outside the measured time
    questions = [f"What is the weather in {city}, and when does the train to {city} leave?" for city in WEATHER]
    progress = Progress(2 * len(questions))
    started = time.perf_counter()
    inputs = [{"messages": [HumanMessage(question)]} for question in questions]
    runs = asyncio.run(make_agent(chat).abatch(inputs, {"callbacks": [progress]}))
    seconds = time.perf_counter() - started
    progress.bar.close()
    right = sum(show(city, run["messages"]) for city, run in zip(WEATHER, runs, strict=True))
    print(f"\ncalls with the right city  {right} of {2 * len(questions)}")
    print(f"most tools at once         {progress.most}")
    print(f"largest batch              {list_engines()[0].stats().max_batch_size} sequences in one step")
    print(f"time                       {seconds:.1f} s")
    shutdown()


if __name__ == "__main__":
    main()
