"""Held-out test dialogues: other facts, phrasings, names, tools and prose than the training generator has."""

# ruff: noqa: SIM905

from __future__ import annotations

import random
from collections.abc import Callable

from . import values as v
from .bank import Block, instantiate, load
from .chatml import Message
from .context_tasks import ContextTasks, Dialogue
from .frames import UNKNOWN
from .grammar import stems
from .heldout_prose import PROSE
from .json_tasks import Field, extraction
from .tool_tasks import ToolMaker

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


_SKILLS = "I answer questions about a text, extract JSON, call tools and remember what you tell me."
_UNRELATED = [
    "How tall is the lighthouse?", "Which language does the captain speak?", "Who painted the ceiling?",
    "When was the harbour dug?", "How many strings has a lute?", "What do hedgehogs eat?",
]  # fmt: skip


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


_HERE = (
    "Written in the box for the {k}: {}.",
    "With {} as {k}.",
    "What concerns the {k}, that would be {}.",
    "{k} = {}.",
    "On the form the {k} reads {}.",
)
_FIELDS = [
    Field("owner", "string", _SLOTS["name"], ()),
    Field("name", "string", _SLOTS["name"], ("This letter is from {}.", "Sincerely, {}.", "Here speaks {}.")),
    Field("village", "string", _SLOTS["city"], ()),
    Field("city", "string", _SLOTS["city"], ("All of it took place at {}.", "He moved to {} last year.")),
    Field("date", "string", v.date, ("The last day is {}.", "We settled on {}.")),
    Field("due", "string", v.date, ()),
    Field("price", "string", v.price, ("They charge {}.", "You will be billed {}.")),
    Field("fee", "string", v.price, ()),
    Field("email", "string", v.email, ("Use {} if you want to reply.", "Answers are read at {}.")),
    Field("serial", "string", v.code, ()),
    Field("weight", "integer", lambda r: r.randint(1, 400), ("The weight is {} grams.", "{} grams in weight.")),
    Field("age", "integer", lambda r: r.randint(5, 95), ("He is {} now.", "At {} she still works.")),
    Field("guides", "array", lambda r: r.sample(_PEOPLE, r.randint(2, 3)), ()),
]


def json_task(rng: Rng) -> Dialogue:
    """Extraction with other schemas, people, towns and wordings; half of the keys are unseen, too."""
    return extraction(rng, _FIELDS, ["Answer with a JSON object that has {keys}.", "As JSON, give {keys}."], _HERE)


_FOREIGN = """
王小明 李雪梅 深圳科技 北京大学 佐藤健一 鈴木花子 株式会社青空 東京タワー 김민준 서울은행 Дмитрий Ольга Νίκος Ελένη محمد فاطمة
דוד Łukasz Børge Çelik Zoë Ngũgĩ Đặng Møller 田中商店 上海花园 渡辺美咲 이수진 Александр Šimůnek
""".split()


def unicode(rng: Rng) -> Dialogue:
    """A call whose argument has to be copied in the letters of another script."""
    words = rng.sample(_FOREIGN, rng.choice([1, 1, 2]))
    value = " ".join(words)
    topic, action = rng.choice(_Tools.topics), rng.choice(_Tools.actions)
    key = rng.choice(["client", "brand", "label", "title"])
    function = {
        "name": f"{action}_{topic}",
        "description": f"{action.capitalize()} a {topic}.",
        "parameters": {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]},
    }
    ask = rng.choice(
        [
            f"{action.capitalize()} the {topic} for '{value}'.",
            f'Would you {action} a {topic}? The {key} is "{value}".',
            f"I would like to {action} a {topic} with the {key} {value}.",
        ]
    )
    call = {"type": "function", "function": {"name": function["name"], "arguments": {key: value}}}
    messages: list[Message] = [
        {"role": "user", "content": ask},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    return Dialogue("unicode", messages, [{"type": "function", "function": function}])


def conversation(rng: Rng) -> Dialogue:
    """Ten turns: a name told in the first, other talk, and the question for it in the last."""
    person = rng.choice([v.pseudo(rng, 2).capitalize(), rng.choice(_PEOPLE).split()[-1]])
    told = rng.choice([f"Good day, my name is {person}.", f"Hey, I am {person}!", f"Hi, this is {person}."])
    turns = [(told, f"Nice to meet you, {person}.")]
    remember = "I will remember that."
    others = [
        ("Hello there!", "Hello! How can I help you?"),
        ("How are you today?", "I am fine, thank you. How can I help you?"),
        ("Thanks so much!", "You are welcome."),
        ("And what are you?", "I am tiny, the small model that is bundled with PagedLLM."),
        ("Is a server needed for PagedLLM?", "No, the engine runs in your own Python process and needs no server."),
        (f"These days I live in {v.pseudo(rng, 3).capitalize()}.", remember),
        (f"My favourite number is {rng.randint(2, 99)}.", remember),
        (f"I bought a {v.adjective(rng)} {v.noun(rng)} yesterday.", remember),
        ("Please say what you can do.", _SKILLS),
        (f"Repeat: {v.noun(rng)} {v.noun(rng)}", ""),
    ]
    for question, reply in rng.sample(others, 8):
        turns.append((question, reply or question.removeprefix("Repeat: ")))
    turns.append((rng.choice(["So what is my name again?", "Tell me my name.", "Who is talking to you?"]), ""))
    turns[-1] = (turns[-1][0], f"Your name is {person}.")
    messages: list[Message] = []
    for question, reply in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return Dialogue("conversation", messages)


def _page(rng: Rng) -> tuple[str, list[tuple[str, str]]]:
    """A titled page of held-out facts, with a question for each."""
    shared: dict[str, str] = {}
    facts = [instantiate(block, shared, rng, _SLOTS) for block in rng.sample(_BLOCKS, rng.randint(3, 5))]
    return " ".join(fact.sentence for fact in facts), [(rng.choice(f.questions), f.sentence) for f in facts]


def leaflets(rng: Rng) -> Dialogue:
    """Twelve leaflets in context, most of them of other facts, and a question that one of them answers."""
    text, pairs = _page(rng)
    others = ContextTasks()
    pages = [text]
    while len(pages) < 12:
        facts = others.facts(rng, 4)
        pages.append(" ".join(fact.sentence for fact in facts))
    rng.shuffle(pages)
    question, answer = rng.choice(pairs)
    body = "\n\n".join(f"Leaflet {number}\n{page}" for number, page in enumerate(pages, 1))
    return Dialogue("leaflets", _frame(body, question, answer, rng))


def unknown(rng: Rng) -> Dialogue:
    """A question which the text does not answer."""
    blocks = rng.sample(_BLOCKS, 8)
    facts = [instantiate(block, {}, rng, _SLOTS) for block in blocks]
    present = set().union(*(stems(fact.sentence) for fact in facts[:6]))
    asked = next((q for fact in facts[6:] for q in fact.questions if len(stems(q) & present) == 0), None)
    asked = asked or rng.choice(_UNRELATED)
    text = " ".join(fact.sentence for fact in facts[:6])
    return Dialogue("unknown", _frame(text, asked, UNKNOWN, rng))


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
    keys = list(dict.fromkeys(v.pseudo(rng, 3) for _ in range(8)))
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
            ("Please say what you can do.", _SKILLS),
            ("How are you today?", "I am fine, thank you. How can I help you?"),
        ]
    )
    return Dialogue("talk", [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


TASKS: dict[str, Callable[[Rng], Dialogue]] = {
    "context": context,
    "prose": prose,
    "tools": tools,
    "json": json_task,
    "unicode": unicode,
    "memory": memory,
    "conversation": conversation,
    "leaflets": leaflets,
    "unknown": unknown,
    "lookup": lookup,
    "talk": talk,
}
