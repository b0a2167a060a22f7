"""Dialogues with tools: calls, their results and the texts that follow, and turns in which none is needed."""

# ruff: noqa: SIM905

from __future__ import annotations

import random
from typing import Any

from . import values as v
from . import words as w
from .bank import capital
from .chatml import Message, dumps
from .context_tasks import Dialogue
from .grammar import random_fact
from .talk_tasks import SYSTEMS, TALK

Rng = random.Random

TOPICS = """
horoscope recipe distance tide timetable inventory balance translation route reminder invoice temperature humidity
score ranking booking shipment stock rate tax area volume average total password document picture song alarm light
heater door calendar contact meeting note task parcel seat table menu exam grade loan tariff sensor fuel altitude
""".split()
ACTIONS = """
find fetch lookup compute calculate create delete send update list search count convert set start stop add remove
check read write plan estimate compare open close reserve cancel rename print
""".split()
_Param = tuple[str, str, Any, list[str]]


def _parameters() -> list[tuple[str, str, Any, list[str]]]:
    text = "string"
    return [
        ("city", text, v.city, ["in {}", "for {}", "of {}"]),
        ("location", text, lambda r: v.region(r) if r.random() < 0.4 else v.city(r), ["in {}", "at {}", "for {}"]),
        ("name", text, v.name, ["for {}", "named {}", "with the name {}"]),
        ("person", text, v.name, ["for {}", "of {}", "named '{}'", "called {}"]),
        ("date", text, v.date, ["on {}", "for {}"]),
        ("time", text, v.time, ["at {}"]),
        ("day", text, lambda r: r.choice(w.WEEKDAYS), ["on {}", "for {}"]),
        ("code", text, v.code, ["with code {}", "for code {}", "{}"]),
        ("id", text, v.code, ["with id {}", "number {}"]),
        ("email", text, v.email, ["to {}", "with the address {}"]),
        ("phone", text, v.phone, ["with phone {}", "to {}"]),
        ("colour", text, lambda r: r.choice(w.COLOURS), ["in {}", "with colour {}"]),
        ("title", text, lambda r: capital(v.noun(r)), ["called {}", 'with the title "{}"', "called '{}'"]),
        ("label", text, lambda r: v.foreign(r) if r.random() < 0.5 else v.name(r), ["named '{}'", "for '{}'", "{}"]),
        ("query", text, lambda r: f"{v.adjective(r)} {v.noun(r)}", ["for {}", 'for "{}"', "about {}"]),
        ("item", text, v.noun, ["for the {}", "of the {}"]),
        ("x", "integer", lambda r: r.randint(-20, 999), ["for {}", "of {}", "with x = {}"]),
        ("a", "integer", lambda r: r.randint(0, 500), ["with a = {}", "of {}"]),
        ("b", "number", lambda r: round(r.uniform(0, 90), 1), ["and b = {}", "and {}"]),
        ("count", "integer", lambda r: r.randint(1, 60), ["{} times", "with count {}"]),
        ("amount", "number", lambda r: round(r.uniform(1, 900), 2), ["for {}", "with amount {}"]),
        ("number", "integer", lambda r: r.randint(0, 9999), ["for number {}", "of {}"]),
        ("limit", "integer", lambda r: r.randint(1, 30), ["at most {}", "with limit {}"]),
        ("length", "number", lambda r: r.randint(1, 99), ["of length {}"]),
    ]


PARAMETERS = _parameters()


def gloss(rng: Rng) -> str:
    """What stands behind a name to explain it, and is no part of it."""
    words = f"{v.adjective(rng).capitalize()} {v.noun(rng).capitalize()}"
    return rng.choice([f" ({words})", f" ({words}) - a {v.adjective(rng)} {v.noun(rng)}", f" (in English: {words})"])


APART = 0.25
"""Share of the requests whose arguments stand in sentences of their own: that makes no second request."""
_TOLD = [
    "{k}: {v}.", "Take {v} as {k}.", "Use {v} for the {k}.", "{v} is its {k}.", 'Let the {k} be "{v}".', "It has the {k} {v}.",
    "For the {k} I want '{v}'.", "As {k}, write {v}!",
]  # fmt: skip


class ToolMaker:
    """Makes random tools, requests for them and results; subclasses may change the words."""

    topics: list[str] = TOPICS
    actions: list[str] = ACTIONS
    parameters = PARAMETERS

    def tool(self, rng: Rng) -> dict[str, Any]:
        """A random tool: name, action, topic and parameters."""
        made = rng.random() < 0.4
        topic = v.pseudo(rng, 2) if made else rng.choice(self.topics)
        action = rng.choice(self.actions) if rng.random() < 0.85 else v.pseudo(rng, 2)
        name = rng.choice([f"{action}_{topic}", f"{action}_{topic}", topic, f"{topic}_{rng.choice(w.NOUNS)}"])
        params = rng.sample(self.parameters, rng.choice([0, 1, 1, 1, 2, 2, 3]) if rng.random() < 0.95 else 1)
        if rng.random() < 0.3:
            params = [(v.pseudo(rng, 2), kind, make, ["with {key} {}"]) for _, kind, make, _ in params]
        return {"name": name, "action": action, "topic": topic, "params": params}

    def schema(self, tool: dict[str, Any], style: int, rng: Rng) -> dict[str, Any]:
        """The JSON schema of a tool in one of the usual layouts."""
        described = rng.random() < 0.5
        properties: dict[str, Any] = {}
        for key, kind, _, _ in tool["params"]:
            properties[key] = {"type": kind}
            if described:
                properties[key]["description"] = f"The {key}"
        required = [key for key, *_ in tool["params"]]
        parts: dict[str, Any] = {"type": "object", "properties": properties}
        if required and rng.random() < 0.85:
            parts["required"] = required
        if style == 1:
            parts = {key: parts[key] for key in ("properties", "required", "type") if key in parts}
        description = rng.choice(["{a} the {t}.", "{a} a {t}", "{a} the {t} for the user.", "Can {b} the {t}."])
        text = capital(description.format(a=capital(tool["action"]), b=tool["action"], t=tool["topic"]))
        function = {"name": tool["name"], "description": text, "parameters": parts}
        return function if style == 2 else {"type": "function", "function": function}

    def arguments(self, tool: dict[str, Any], rng: Rng) -> dict[str, Any]:
        """Random arguments for a tool; texts are now and then in letters of another script."""
        return {
            key: v.foreign(rng) if kind == "string" and rng.random() < 0.35 else make(rng)
            for key, kind, make, _ in tool["params"]
        }

    def request(self, tool: dict[str, Any], arguments: dict[str, Any], rng: Rng) -> str:
        """A user request that names all the arguments."""
        roll = rng.random()
        if roll < 0.2:
            listing = " and ".join(f"{key} {value}" for key, value in arguments.items())
            tail = f" with {listing}" if listing else ""
            return rng.choice(["Call {n}{t}.", "Use {n}{t}.", "Please run {n}{t}."]).format(n=tool["name"], t=tail)
        if roll < 0.27:
            listing = ", ".join(str(value) for value in arguments.values())
            ask = ["What is {n}({l})?", "Compute {n}({l}).", "What does {n}({l}) give? Use the function.", "{n}({l})"]
            return rng.choice(ask).format(n=tool["name"], l=listing)
        groups = [self.group(key, kind) for key, kind, *_ in tool["params"]]
        parts = [
            rng.choice(ways if groups.count(group) == 1 else ["with {key} {}", "and {key} {}"]).format(
                arguments[key], key=key
            )
            + (gloss(rng) if kind == "string" and rng.random() < 0.15 else "")
            for group, (key, kind, _, ways) in zip(groups, tool["params"], strict=True)
        ]
        rng.shuffle(parts)
        start = rng.choice(
            [
                "{a} the {t}",
                "Please {a} the {t}",
                "Can you {a} the {t}",
                "I need to {a} the {t}",
                "{a} a {t}",
                "What is the {t}",
                "Tell me the {t}",
                "I want the {t}",
                "Show me the {t}",
                "What's the {t}",
                "{a} one {t}",
                "How is the {t}",
                "Could you {a} a new {t}",
                "Let us {a} the {t}",
            ]
        )
        asked = start.format(a=tool["action"], t=tool["topic"])
        ending = "?" if start.startswith(("What", "Can", "How", "Could")) else rng.choice([".", "", " please."])
        if parts and rng.random() < APART:
            told = [rng.choice(_TOLD).format(k=key, v=arguments[key]) for key, *_ in tool["params"]]
            return " ".join(
                [capital(asked) + (ending if ending.strip() else "."), *map(capital, rng.sample(told, len(told)))]
            )
        return capital(" ".join([asked, *parts])) + ending

    @staticmethod
    def group(key: str, kind: str) -> str:
        """Parameters of one group can be confused, so a request has to name them."""
        groups = {"location": "city", "person": "name", "id": "code", "title": "item", "query": "item", "day": "date"}
        return "number" if kind != "string" else groups.get(key, key)

    def result(self, tool: dict[str, Any], rng: Rng) -> tuple[str, str]:
        """A tool result and the answer that reports it."""
        roll = rng.random()
        if roll < 0.35:
            kind = rng.choice(["num", "num", "price", "time", "place", "code", "colour", "dur", "date"])
            value = v.SLOTS[kind](rng)
            return value, f"The result is {value}."
        if roll < 0.75:
            sentence = random_fact(rng).sentence
            return sentence, sentence
        keys = rng.sample(
            ["status", "value", "total", "name", "price", "time", "colour", "unit", tool["topic"]], rng.randint(1, 3)
        )
        data = {
            key: (v.SLOTS[key](rng) if key in v.SLOTS else rng.choice([rng.randint(1, 900), v.adjective(rng)]))
            for key in keys
        }
        listing = ", ".join(f"{key}: {value}" for key, value in data.items())
        return dumps(data), capital(listing) + "."

    def exchange(self, tools: list[dict[str, Any]], rng: Rng) -> list[Message]:
        """A request for some calls, the calls in one turn, their results and the answer."""
        arguments = [self.arguments(tool, rng) for tool in tools]
        requests = [self.request(tool, one, rng) for tool, one in zip(tools, arguments, strict=True)]
        calls = [
            {"type": "function", "function": {"name": tool["name"], "arguments": one}}
            for tool, one in zip(tools, arguments, strict=True)
        ]
        results = [self.result(tool, rng) for tool in tools]
        return [
            {"role": "user", "content": rng.choice([" ", " And ", "\n", " Then: "]).join(requests)},
            {"role": "assistant", "content": "", "tool_calls": calls},
            *({"role": "tool", "content": content} for content, _ in results),
            {"role": "assistant", "content": " ".join(answer for _, answer in results)},
        ]

    def calls(self, rng: Rng) -> Dialogue:
        """Tools, a request, the call, its result and the answer; sometimes a second request or plain talk."""
        tools = [self.tool(rng) for _ in range(rng.choice([1, 1, 2, 2, 3, 4]))]
        style = rng.randint(0, 2)
        messages: list[Message] = []
        if rng.random() < 0.5:
            messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
        for _ in range(rng.choice([1, 1, 2, 3])):
            if rng.random() < 0.12:
                question, answer = rng.choice(TALK)
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                continue
            messages += self.exchange([rng.choice(tools) for _ in range(rng.choice([1, 1, 1, 1, 2]))], rng)
        schemas: list[Message] = [self.schema(tool, style, rng) for tool in tools]
        return Dialogue("tools", messages, schemas)
