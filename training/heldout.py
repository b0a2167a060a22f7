"""Held-out test dialogues: other facts, phrasings, names, tools and prose than the training generator has."""

# ruff: noqa: SIM905

from __future__ import annotations

import random
from collections.abc import Callable

from . import values as v
from .bank import Block, instantiate, load
from .chatml import Message
from .context_tasks import Dialogue
from .heldout_prose import PROSE
from .other_tasks import ToolMaker, extraction

Rng = random.Random
_BLOCKS: list[Block] = [block for blocks in load("heldout.txt").values() for block in blocks]
_FRAMES = [
    ("Answer what is asked, using this page.", "Page text:\n{t}\n\nThe question is: {q}"),
    ("Here you help people who read our notes.", "{t}\n\n{q}"),
    ("Reply with what the note says.", "Note from the house:\n\n{t}\n\nQuestion: {q}"),
    ("You reply from the given lines.", "Lines:\n{t}\nQuestion: {q}"),
]


_PEOPLE = (
    """
Ingrid Solberg|Mateo Ibarra|Dr. Okonkwo|Mrs. Featherstone|Tomasz Zielinski|Ms. Haruka|Professor Lindgren|Mr. Abebe|
Saoirse Byrne|Luca Ferrante|Dr. Vandenberg|Miriam Goldfarb|Mr. Castellano|Nurse Petronella|Sister Agathe|Gwen Pritchard
""".replace("\n", "")
    .strip()
    .split("|")
)
_TOWNS = "Ravensburg Aarhus Kumasi Salamanca Trondheim Winterthur Galway Utrecht Leiden Cluj Ostrava Nagano".split()
_SLOTS = {**v.SLOTS, "name": lambda rng: rng.choice(_PEOPLE), "city": lambda rng: rng.choice(_TOWNS)}


def _frame(text: str, question: str, answer: str, rng: Rng) -> list[Message]:
    system, user = rng.choice(_FRAMES)
    messages: list[Message] = [{"role": "system", "content": system}] if rng.random() < 0.7 else []
    messages.append({"role": "user", "content": user.format(t=text, q=question)})
    return [*messages, {"role": "assistant", "content": answer}]


def context(rng: Rng) -> Dialogue:
    """Questions about documents made of held-out facts."""
    shared: dict[str, str] = {}
    facts = [instantiate(block, shared, rng, _SLOTS) for block in rng.sample(_BLOCKS, rng.randint(5, 8))]
    chosen = rng.choice(facts)
    joiner = rng.choice([" ", "\n", "\n\n"])
    messages = _frame(joiner.join(fact.sentence for fact in facts), rng.choice(chosen.questions), chosen.sentence, rng)
    return Dialogue("context", messages)


def prose(rng: Rng) -> Dialogue:
    """A hand-written question about a hand-written page; the answer is one of its sentences."""
    text, pairs = rng.choice(PROSE)
    question, answer = rng.choice(pairs)
    return Dialogue("prose", _frame(text, question, answer, rng))


class _Tools(ToolMaker):
    topics = "glacier pollen harvest voltage mortgage playlist visa compost tram ferry quota".split()
    actions = "retrieve obtain generate measure register archive publish".split()


def tools(rng: Rng) -> Dialogue:
    """Calls of tools with unseen names."""
    return _Tools().calls(rng)


_FIELDS = [
    ("owner", _SLOTS["name"], ["{} is the owner.", "It belongs to {}."]),
    ("village", _SLOTS["city"], ["The house stands in {}.", "All of it took place at {}."]),
    ("due", v.date, ["It is due on {}.", "The last day is {}."]),
    ("fee", v.price, ["There is a fee of {}.", "They charge {}."]),
    ("serial", v.code, ["The serial is {}.", "On the back you read {}."]),
    ("weight", lambda r: r.randint(1, 400), ["The weight is {} grams.", "It weighs {} kilos."]),
    ("name", _SLOTS["name"], ["This letter is from {}.", "Sincerely, {}."]),
]


def json_task(rng: Rng) -> Dialogue:
    """Extraction with unseen keys and wordings."""
    return extraction(rng, _FIELDS, ["Answer with a JSON object that has {keys}.", "As JSON, give {keys}."])


def memory(rng: Rng) -> Dialogue:
    """A name told earlier, in other words than in training."""
    person, town = v.pseudo(rng, 2).capitalize(), v.pseudo(rng, 3).capitalize()
    messages: list[Message] = [
        {
            "role": "user",
            "content": rng.choice(
                [f"Good day, my name is {person}.", f"Hey, I am {person}!", f"Hi, this is {person}."]
            ),
        },
        {"role": "assistant", "content": f"Nice to meet you, {person}."},
        {"role": "user", "content": rng.choice([f"These days I live in {town}.", f"I live in {town} now."])},
        {"role": "assistant", "content": "I will remember that."},
    ]
    asks = [("So what is my name again?", f"Your name is {person}."), ("Tell me my name.", f"Your name is {person}.")]
    asks += [("In which city do I live?", f"You live in {town}."), ("And where do I live?", f"You live in {town}.")]
    question, answer = rng.choice(asks)
    return Dialogue(
        "memory", [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    )


def lookup(rng: Rng) -> Dialogue:
    """A table of made-up keys."""
    keys = list({v.pseudo(rng, 3) for _ in range(8)})
    lines = [f"{key}: {v.code(rng)} {v.noun(rng)}" for key in keys]
    index = rng.randrange(len(keys))
    text = "Inventory:\n" + "\n".join(lines) + f"\n\nPlease find the line about {keys[index]}."
    return Dialogue("lookup", [{"role": "user", "content": text}, {"role": "assistant", "content": lines[index]}])


def talk(rng: Rng) -> Dialogue:
    """Small talk in unseen words."""
    question, answer = rng.choice(
        [
            ("Hello there!", "Hello! How can I help you?"),
            ("And who are you?", "I am tiny, the small model that is bundled with PagedLLM."),
            (
                "What exactly is PagedLLM?",
                "PagedLLM is an inference engine that runs language models inside your own Python process.",
            ),
            ("Thanks so much!", "You are welcome."),
            ("Bye bye!", "Goodbye!"),
            ("Is a server needed for PagedLLM?", "No, the engine runs in your own Python process and needs no server."),
            (
                "Please say what you can do.",
                "I answer questions about a text, extract JSON, call tools and remember what you tell me.",
            ),
            ("How are you today?", "I am fine, thank you. How can I help you?"),
        ]
    )
    return Dialogue("talk", [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


TASKS: dict[str, Callable[[Rng], Dialogue]] = {
    "context": context,
    "prose": prose,
    "tools": tools,
    "json": json_task,
    "memory": memory,
    "lookup": lookup,
    "talk": talk,
}
