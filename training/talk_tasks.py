"""Dialogues without a document: memory, small talk and repetition."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from . import values as v
from . import words as w
from .chatml import Message
from .context_tasks import Dialogue
from .grammar import random_fact

Rng = random.Random

SYSTEMS = """
You are a helpful assistant.
You are a helpful assistant with tools.
Use the tools when they help.
You are an assistant. Call a function if needed.
Be brief.
Answer politely.
You can call functions.
Help the user.
""".strip().splitlines()

# parameter name, JSON type, value maker, how a request mentions it

_MEMORY: list[tuple[str, Any, list[str], list[str], str]] = [
    (
        "name",
        v.first_name,
        [
            "My name is {}.",
            "I am {}.",
            "Call me {}.",
            "Hello, I'm {}.",
            "Hi, {} here.",
            "Hello! My name is {}.",
            "You may call me {}.",
            "I'm called {}.",
            "Good morning, I am {}!",
            "It is {} speaking.",
            "Dear model, {} is my name.",
            "Hello, this is {}!",
        ],
        [
            "What is my name?",
            "Who am I?",
            "Do you remember my name?",
            "What was my name?",
            "Say my name.",
            "What am I called?",
            "Can you tell me my name?",
            "How do I call myself?",
            "Who is speaking with you?",
            "Who is it that writes to you?",
            "With whom are you chatting?",
            "Whom do you speak to?",
            "Do you still know who I am?",
            "Who is asking you all this?",
            "Tell me who I am.",
            "And how was I called?",
            "Write down my name.",
            "Who has been talking here with you?",
        ],
        "Your name is {}.",
    ),
    (
        "city",
        v.city,
        ["I live in {}.", "My home is in {}.", "I come from {}."],
        ["Where do I live?", "Which city do I live in?", "Where am I from?"],
        "You live in {}.",
    ),
    (
        "pet",
        v.first_name,
        ["My dog is called {}.", "I have a dog named {}."],
        ["What is my dog called?", "What is the name of my dog?"],
        "Your dog is called {}.",
    ),
    (
        "colour",
        lambda r: r.choice(w.COLOURS),
        ["My favourite colour is {}.", "I like {} best of all colours."],
        ["What is my favourite colour?", "Which colour do I like?"],
        "Your favourite colour is {}.",
    ),
    (
        "number",
        lambda r: str(r.randint(1, 999)),
        ["My lucky number is {}.", "Remember the number {}."],
        ["What is my number?", "Which number did I tell you?"],
        "Your number is {}.",
    ),
    (
        "code",
        v.code,
        ["The code word is {}.", "Please remember the code {}."],
        ["What is the code?", "Which code did I give you?"],
        "The code is {}.",
    ),
    (
        "job",
        lambda r: r.choice(w.NOUNS[-48:]),
        ["I work as a {}.", "My job is {}."],
        ["What is my job?", "What do I do for a living?"],
        "You work as a {}.",
    ),
]
_PLEASED = ["Nice to meet you, {}.", "Hello {}, nice to meet you."]


def memory(rng: Rng) -> Dialogue:
    """Facts about the user, small talk between (of many turns now and then), and questions that recall them."""
    chosen = rng.sample(_MEMORY, rng.randint(1, 4))
    long = rng.random() < 0.5
    if long:
        chosen = list({entry[0]: entry for entry in [_MEMORY[0], *chosen]}.values())[:3]
    values = {entry[0]: v.foreign(rng) if rng.random() < 0.1 else entry[1](rng) for entry in chosen}
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    for key, _, tell, _, _ in chosen:
        messages.append({"role": "user", "content": rng.choice(tell).format(values[key])})
        answer = "Nice to meet you, {}." if key == "name" else "I will remember that."
        messages.append({"role": "assistant", "content": answer.format(values[key])})
        for _ in range(rng.randint(1, 4) if long else rng.choice([0, 0, 0, 1, 1])):
            question, reply = rng.choice(TALK) if rng.random() < 0.6 else aside(rng)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    for key, _, _, asks, reply in rng.sample(chosen, len(chosen)):
        messages.append({"role": "user", "content": rng.choice(asks)})
        messages.append({"role": "assistant", "content": reply.format(values[key])})
    return Dialogue("memory", messages)


def aside(rng: Rng) -> tuple[str, str]:
    """Something else that a conversation turns to: a sentence to keep in mind, or words to repeat."""
    if rng.random() < 0.5:
        return random_fact(rng).sentence, "I will remember that."
    text = " ".join(v.noun(rng) for _ in range(rng.randint(1, 4)))
    return f"{rng.choice(['Repeat: ', 'Say exactly: ', 'Echo: '])}{text}", text


_TALK_TEXT = """
Hello|Hi|Hi there|Good morning|Hey|Good evening => Hello! How can I help you?
How are you?|How do you do?|How is it going? => I am fine, thank you. How can I help you?
Thank you|Thanks a lot|Many thanks|Thank you very much => You are welcome.
Goodbye|Bye|See you later => Goodbye!
Who are you?|What are you?|What is your name?|Introduce yourself. => I am tiny, the small model that is bundled with PagedLLM.
What can you do?|How can you help me?|What are you good at? => I answer questions about a text, extract JSON, call tools and remember what you tell me.
What is PagedLLM?|Tell me about PagedLLM.|What does PagedLLM do?|Explain PagedLLM. => PagedLLM is an inference engine that runs language models inside your own Python process.
What is paged in PagedLLM?|What are KV blocks?|How does PagedLLM store keys and values? => PagedLLM keeps keys and values in fixed-size KV blocks that sequences share.
How does PagedLLM serve many requests?|What is continuous batching?|What happens when several threads ask at once? => All requests run together in one shared batch, and new ones join at every step.
Does PagedLLM need a server?|Do I have to start a server?|Is there a separate process? => No, the engine runs in your own Python process and needs no server.
What is prefix caching?|What happens with a shared prompt? => Prompts with the same beginning share their KV blocks, so the work is done once.
How big are you?|How many parameters do you have?|Are you a large model? => I am a very small model with about four million parameters.
Who made you?|Who trained you?|Where do you come from? => I was trained on a laptop-sized CPU with text generated for the PagedLLM project.
Can you do maths?|Are you good at arithmetic? => No, I am too small for that. I am good at finding facts in a text.
Do you know everything?|Do you have general knowledge? => No, I know very little. Give me a text and I will answer from it.
Tell me a joke|Make me laugh. => A tiny model walks into a cache and finds every seat already paged.
What is the meaning of life?|What will happen tomorrow?|Who will win the election? => I don't know.
How do I ask you a question?|How should I use you? => Give me a text and a question, and I will quote the sentence that answers it.
Can I use my own model?|Which models can PagedLLM run? => PagedLLM loads Llama-type models from a local folder.
Say hello.|Greet me. => Hello!
Are you a human?|Are you a robot? => No, I am a small language model.
Ok|Okay, good|Fine => Good. What else can I do for you?
"""


def _read_talk() -> list[tuple[str, str]]:
    pairs = []
    for line in filter(None, _TALK_TEXT.splitlines()):
        questions, answer = line.split(" => ")
        pairs += [(question, answer) for question in questions.split("|")]
    return pairs


TALK = _read_talk()


def talk(rng: Rng) -> Dialogue:
    """Small talk about the model and about PagedLLM."""
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    for question, answer in rng.sample(TALK, rng.randint(1, 5)):
        if rng.random() < 0.15:
            question = rng.choice(
                [question.lower(), question.rstrip("?."), "Hello! " + question, "Please tell me: " + question]
            )
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Dialogue("talk", messages)


def repeat(rng: Rng, rare: Sequence[str] = ()) -> Dialogue:
    """Repeats given text word for word: made-up words, `rare` ones, sentences or values."""
    messages: list[Message] = []
    for _ in range(rng.randint(1, 4)):
        roll = rng.random()
        if rare and rng.random() < 0.6:
            words = [rng.choice(rare) for _ in range(rng.randint(2, 16))]
            text = " ".join(word.capitalize() if rng.random() < 0.3 else word for word in words)
        elif roll < 0.5:
            text = " ".join(v.foreign(rng) for _ in range(rng.randint(1, 6)))
        elif roll < 0.6:
            text = " ".join(random_fact(rng).sentence for _ in range(rng.choice([1, 1, 2, 3])))
        elif roll < 0.8:
            text = " ".join(rng.choice([v.pseudo(rng), v.noun(rng), v.name(rng)]) for _ in range(rng.randint(2, 16)))
        else:
            text = ", ".join(rng.choice(list(v.SLOTS.values()))(rng) for _ in range(rng.randint(1, 7)))
        ask = rng.choice(
            ["Repeat: {}", "Say exactly: {}", "Repeat after me: {}", "Please repeat this text: {}", "Echo: {}"]
        )
        messages += [{"role": "user", "content": ask.format(text)}, {"role": "assistant", "content": text}]
    return Dialogue("repeat", messages)
