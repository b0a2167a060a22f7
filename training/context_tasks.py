"""Dialogues that ask about a text: documents, layouts, instructions and questions."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from . import values as v
from . import words as w
from .bank import Block, Fact, capital, instantiate, load
from .chatml import Message
from .frames import ASIDES, FILLERS, INSTRUCTIONS, LABELS, QUESTION_LABELS, TITLES, UNKNOWN
from .grammar import generic_question, random_fact, stems
from .paraphrase import merge, paraphrase, share_beginning

Rng = random.Random
FACT_FILES = ("facts_a.txt", "facts_b.txt", "facts_c.txt", "facts_d.txt", "facts_e.txt")


@dataclass
class Dialogue:
    """One training or test conversation; every assistant turn is learnt.

    `questions` holds, in their order, the questions that a sentence of the text answers, with that sentence.
    """

    task: str
    messages: list[Message]
    tools: list[Message] | None = None
    questions: list[tuple[str, str]] = field(default_factory=list)


class ContextTasks:
    """Builds question dialogues over documents of the fact bank and of the random grammar."""

    unknown_share = 0.11

    def __init__(self, files: tuple[str, ...] = FACT_FILES) -> None:
        self.domains: dict[str, list[Block]] = load(*files)
        self.names = list(self.domains)

    def words(self) -> list[str]:
        """The longer words of the facts and of the word banks, in lower case, each once."""
        blocks = [block for domain in self.domains.values() for block in domain]
        texts = [text for block in blocks for part in (block.sentences, *block.bindings.values()) for text in part]
        found = re.findall(r"\b[a-z]{4,}\b", " ".join([*texts, *w.NOUNS, *w.ADJECTIVES]))
        return sorted(set(found))

    def facts(self, rng: Rng, count: int) -> list[Fact]:
        """Facts for one document, some of them near-duplicates about another subject."""
        style = rng.random()
        if style < 0.25:
            return [random_fact(rng) for _ in range(count)]
        domain = self.domains[rng.choice(self.names)]
        blocks = rng.sample(domain, min(count, len(domain)))
        while len(blocks) < count:
            blocks.append(rng.choice(domain if style < 0.6 else self.domains[rng.choice(self.names)]))
        rng.shuffle(blocks)
        shared: dict[str, str] = {}
        facts: dict[str, Fact] = {}
        for block in blocks:
            fact = instantiate(block, shared, rng)
            facts.setdefault(fact.key, fact)
        result = list(facts.values())
        if style > 0.85:
            result += [random_fact(rng) for _ in range(rng.randint(1, 4))]
            rng.shuffle(result)
        return result

    def document(self, rng: Rng, count: int) -> tuple[list[Fact], str]:
        """Facts with the text that states them."""
        facts = merge(self.facts(rng, count), rng, rng.choice([0.0, 0.0, 0.1, 0.2]))
        if rng.random() < 0.3:
            facts = share_beginning(facts, rng)
        fillers = rng.sample(FILLERS, rng.choice([0, 0, 1, 1, 2, 3])) if rng.random() < 0.7 else []
        return facts, layout([fact.sentence for fact in facts], fillers, rng)

    def question(self, facts: list[Fact], index: int, rng: Rng) -> str:
        """A question that the fact answers: its own, or one built from its words."""
        fact = facts[index]
        if rng.random() < 0.28:
            others = [other.sentence for i, other in enumerate(facts) if i != index]
            generic = generic_question(fact.sentence, others, rng)
            if generic:
                return generic
        question = rng.choice(fact.questions)
        return decorate(paraphrase(question, rng) if rng.random() < 0.4 else question, rng)

    def unknown(self, facts: list[Fact], rng: Rng) -> str:
        """A question that the document does not answer."""
        present = [stems(fact.sentence) for fact in facts]
        keys = {fact.key for fact in facts}
        near = rng.random() < 0.4  # a word in common with a sentence, though not enough to be answered by it
        for _ in range(20):
            block = rng.choice(self.domains[rng.choice(self.names)])
            fact = random_fact(rng) if rng.random() < 0.3 else instantiate(block, {}, rng)
            question = rng.choice(fact.questions)
            asked = stems(question)
            shared = max(len(asked & words) for words in present)
            if len(asked) > 1 and fact.key not in keys and (shared == 1 and len(asked) > 2 if near else shared == 0):
                return decorate(question, rng)
        return "Who invented the telescope?"

    def leaflets(self, rng: Rng, most: int = 12) -> Dialogue:
        """Several titled leaflets in one context, and questions each of which one of them answers."""
        count = rng.randint(3, most)
        label = rng.choice(["Leaflet", "Document", "Page", "Source", "Sheet", "Text"])
        parts, facts = [], []
        for number in range(1, count + 1):
            own, text = self.document(rng, rng.randint(2, 4))
            facts += own
            head = rng.choice(
                [f"{label} {number}", f"[{number}]", f"{label} {number}: {title(rng)}", f"## {title(rng)}"]
            )
            parts.append(f"{head}\n{text}")
        pairs: list[tuple[str, str]] = []
        for index in rng.sample(range(len(facts)), min(len(facts), 9)):
            sentence = facts[index].sentence
            if sum(sentence in part for part in parts) != 1:
                continue
            if rng.random() < 0.12:
                pairs.append((self.unknown(facts, rng), UNKNOWN))
            question = self.question(facts, index, rng)
            if all(question != asked for asked, _ in pairs):
                pairs.append((question, sentence))
        if not pairs:
            return self.leaflets(rng, most)
        messages = frame("\n\n".join(parts), pairs, rng)
        return Dialogue("leaflets", messages, questions=[pair for pair in pairs if pair[1] != UNKNOWN])

    def qa(self, rng: Rng, size: float = 1.0) -> Dialogue:
        """A document followed by questions in successive turns, or with the question first."""
        count = max(2, int(rng.choice([4, 5, 6, 7, 8, 9, 10, 12]) * size))
        facts, text = self.document(rng, count)
        label = rng.choice(LABELS)
        block = f"{label.format(text=text)}"
        turns = rng.choice([2, 4, 5, 6, 7, 8, 9])
        order = [index for _ in range(3) for index in rng.sample(range(len(facts)), len(facts))][:turns]
        pairs: list[tuple[str, str]] = []
        for index in order:
            if rng.random() < self.unknown_share:
                pairs.append((self.unknown(facts, rng), UNKNOWN))
                continue
            question = self.question(facts, index, rng)
            if all(question != asked for asked, _ in pairs):
                pairs.append((question, facts[index].sentence))
        return Dialogue("context", frame(block, pairs, rng), questions=[pair for pair in pairs if pair[1] != UNKNOWN])


def decorate(question: str, rng: Rng) -> str:
    """Small changes of a question: politeness, lower case, a missing question mark."""
    roll = rng.random()
    if roll < 0.08:
        return rng.choice(ASIDES).format(question[0].lower() + question[1:] if question[0] != "I" else question)
    if roll < 0.12:
        return question.lower()
    if roll < 0.16:
        return question.rstrip("?.")
    return question


def layout(sentences: list[str], fillers: list[str], rng: Rng) -> str:
    """A text of sentences: one paragraph, several, one per line, bullets or sections with headings."""
    lines = list(sentences)
    for filler in fillers:
        lines.insert(rng.randint(0, len(lines)), filler)
    style = rng.random()
    if style < 0.45:
        text = " ".join(lines)
    elif style < 0.65:
        size = rng.randint(2, 4)
        joiner = rng.choice(["\n", "\n\n", "\n\n"])
        text = joiner.join(" ".join(lines[i : i + size]) for i in range(0, len(lines), size))
    elif style < 0.75:
        text = "\n".join(lines)
    elif style < 0.87:
        mark = rng.choice(["- ", "* ", "• ", "– "])
        text = "\n".join(mark + line for line in lines)
    elif style < 0.91:
        text = "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))
    else:
        size = rng.randint(2, 4)
        parts = [" ".join(lines[i : i + size]) for i in range(0, len(lines), size)]
        text = "\n\n".join(f"{heading(rng)}\n{part}" for part in parts)
    if rng.random() < 0.4:
        text = f"{rng.choice(['', '', '# ', '## '])}{title(rng)}{rng.choice([chr(10), chr(10) * 2])}{text}"
    return text


def heading(rng: Rng) -> str:
    """A section heading."""
    return capital(rng.choice([v.noun(rng), f"{v.adjective(rng)} {v.noun(rng)}", f"{v.noun(rng)} and {v.noun(rng)}"]))


def title(rng: Rng) -> str:
    """A title line of a document."""
    return rng.choice(TITLES).format(
        noun=capital(v.noun(rng)),
        other=v.noun(rng),
        adj=capital(v.adjective(rng)),
        org=v.pseudo(rng, 2).capitalize(),
        city=v.city(rng),
    )


def frame(block: str, pairs: list[tuple[str, str]], rng: Rng) -> list[Message]:
    """The messages around a text block: where instruction, text and question stand."""
    instruction = rng.choice(INSTRUCTIONS)
    label = rng.choice(QUESTION_LABELS)
    style = rng.random()
    first, answer = pairs[0]
    messages: list[Message] = []
    if style < 0.4:
        gap = rng.choice(["\n\n", "\n\n", "\n"])
        if rng.random() < 0.85:
            messages.append({"role": "system", "content": instruction})
            messages.append({"role": "user", "content": f"{block}{gap}{label.format(first)}"})
        else:
            messages.append({"role": "user", "content": f"{instruction}{gap}{block}{gap}{label.format(first)}"})
    elif style < 0.6:
        gap = rng.choice(["\n\n", "\n", " "])
        messages.append({"role": "system", "content": f"{instruction}{gap}{block}"})
        messages.append({"role": "user", "content": label.format(first) if rng.random() < 0.3 else first})
    elif style < 0.72:
        if rng.random() < 0.6:
            messages.append({"role": "system", "content": instruction})
        messages.append({"role": "user", "content": f"{label.format(first)}\n\n{block}"})
    elif style < 0.9:
        messages.append({"role": "user", "content": f"{block}\n\n{label.format(first)}"})
    else:
        if rng.random() < 0.5:
            messages.append({"role": "system", "content": instruction})
        messages.append(
            {"role": "user", "content": f"{rng.choice(['Please read this.', 'Here is a text.', 'Read:'])}\n\n{block}"}
        )
        messages.append({"role": "assistant", "content": "I have read the text."})
        messages.append({"role": "user", "content": first})
    messages.append({"role": "assistant", "content": answer})
    again = label if rng.random() < 0.4 else "{}"
    for question, reply in pairs[1:]:
        messages.append({"role": "user", "content": again.format(question)})
        messages.append({"role": "assistant", "content": reply})
    return messages


def lookup(rng: Rng) -> Dialogue:
    """Key and value lists: the simplest task of matching and copying."""
    made = rng.random() < 0.5
    keys = list(dict.fromkeys(v.pseudo(rng, 2) if made else rng.choice(w.NOUNS) for _ in range(rng.randint(4, 14))))
    kinds = ["code", "num", "name", "time", "price", "place", "phone", "made", "colour", "date", "email", "url"]
    kind = rng.choice(kinds)
    values = [v.SLOTS[kind if rng.random() < 0.8 else rng.choice(kinds)](rng) for _ in keys]
    mark = rng.choice([": ", " = ", " -> ", ": "])
    lines = [
        f"{capital(key) if rng.random() < 0.2 else key}{mark}{value}" for key, value in zip(keys, values, strict=True)
    ]
    text = rng.choice(["\n", "\n", "; "]).join(lines)
    order = rng.sample(range(len(keys)), min(len(keys), rng.randint(2, 6)))
    value_only = rng.random() < 0.35
    ask = rng.choice(
        ["What is the value of {}?", "Give only the value of {}.", "Value of {}?"]
        if value_only
        else [
            "Which line mentions {}?",
            "Repeat the line about {}.",
            "{}?",
            "Find the entry for {}.",
            "What is listed for {}?",
        ]
    )
    intro = rng.choice(["List:\n", "Entries:\n", "", "Here is a list:\n", "Data: ", "Table:\n"])
    messages: list[Message] = []
    questions = []
    for turn, index in enumerate(order):
        question = ask.format(keys[index])
        messages.append({"role": "user", "content": f"{intro}{text}\n\n{question}" if turn == 0 else question})
        messages.append({"role": "assistant", "content": values[index] if value_only else lines[index]})
        questions.append((question, str(messages[-1]["content"])))
    return Dialogue("lookup", messages, questions=questions)


def recite(rng: Rng) -> Dialogue:
    """Repeats the sentence that mentions given words."""
    facts = [random_fact(rng) for _ in range(rng.choice([2, 3, 3, 4, 5, 6, 8]))]
    text = rng.choice([" ", "\n"]).join(fact.sentence for fact in facts)
    messages: list[Message] = []
    questions = []
    order = [index for _ in range(3) for index in rng.sample(range(len(facts)), len(facts))]
    for index in order[: rng.randint(3, 8)]:
        others = [fact.sentence for i, fact in enumerate(facts) if i != index]
        question = generic_question(facts[index].sentence, others, rng)
        if question is None:
            continue
        messages.append({"role": "user", "content": f"{text}\n\n{question}" if not messages else question})
        messages.append({"role": "assistant", "content": facts[index].sentence})
        questions.append((question, facts[index].sentence))
    return Dialogue("recite", messages, questions=questions) if messages else lookup(rng)
