"""Small rewritings: synonyms in questions, and longer sentences from short facts."""

from __future__ import annotations

import random
import re

from . import values as v
from . import words as w
from .bank import Fact, capital

Rng = random.Random

_SYNONYMS = """
how much does the (.+) cost => what is the price for the \\1|what do I pay for the \\1|how expensive is the \\1|what does the \\1 cost
how much is (a|an|the) (.+) => what does \\1 \\2 cost|what is the price for \\1 \\2|how expensive is \\1 \\2|what do I pay for \\1 \\2
when does the (.+) (?:begin|start) => what time does the \\1 start|at what time does the \\1 begin|what is the starting time of the \\1
when does the (.+) open => what are the opening times of the \\1|from what time is the \\1 open|when can I go to the \\1
when is the (.+) => what is the date of the \\1|on which day is the \\1|what time is the \\1
where is the (.+) => where can I find the \\1|where do I find the \\1|in which place is the \\1|how do I get to the \\1
where can I => where do I|where may I|at which place can I|in what place can I
where do I => where can I|where should I|where must I|where am I supposed to
how long does (.+) take => how much time does \\1 take|how many minutes does \\1 take|how long will \\1 take|what is the duration of \\1
what should I do => what do I have to do|what must I do|what can I do|what am I supposed to do|how should I react
what must I => what do I have to|what should I|what am I required to
what should I bring => what do I need to bring|what do I have to bring|what must I take with me|which things should I have with me
what do I have to => what must I|what should I|what do I need to
may I => can I|is it allowed to|is it possible to|could I
can I => may I|is it possible to|could I|am I permitted to
am I allowed to => may I|can I|is it ok to|is it permitted to
who is => give the name of|which person is
who => which person|what person
when do I have to => by when do I have to|by what time must I|when must I
when can I => at what time can I|from when can I|at which times may I|on which days can I
when => at what time|on which day|what time
until when => up to what time|until what time|how long
how many (.+) are there => what is the number of \\1|how many \\1 exist
which => what
telephone number => phone number|number to call|number
how do I contact => how can I reach|where can I reach|how do I get in touch with
children => kids|my child|a child|young children
dog => animal|pet
car => vehicle
doctor => physician
buy => get|purchase
begin => start
start => begin
finish => end
repair => fix
fee => price|cost|charge
ill => sick|unwell
bring => take along|carry with me
need => require|have to have
photos => pictures|photographs
lift => elevator
register => sign up|enrol
allowed => permitted|ok
forbidden => not allowed|prohibited
""".strip().splitlines()


def _rules() -> list[tuple[re.Pattern[str], list[str]]]:
    rules = []
    for line in _SYNONYMS:
        left, right = line.split(" => ")
        rules.append((re.compile(rf"\b{left}\b(?=\W|$)", re.IGNORECASE), right.split("|")))
    return rules


_RULES = _rules()
_OPENINGS = """
Please note that
As a rule,
In general,
For your information,
Remember that
Please be aware that
As always,
Usually
Note that
Normally,
From this year on,
It is important to know that
You should know that
We would like to point out that
To keep things simple,
For reasons of safety,
Unless stated otherwise,
On our side,
By the way,
""".strip().splitlines()
_ENDINGS = """
as usual
without exception
if possible
as in the past
thank you for understanding
so please plan ahead
which many people forget
unless something else was agreed
and this also applies to groups
because space is limited
so that nobody has to wait
since many people ask for it
as described above
for the time being
""".strip().splitlines()
_LOWER = {
    "The",
    "A",
    "An",
    "If",
    "You",
    "Please",
    "For",
    "At",
    "On",
    "In",
    "Before",
    "After",
    "There",
    "To",
    "We",
    "Our",
    "It",
}
_NOUNS = set(w.NOUNS)
_JOINERS = [", and ", "; ", " and ", ", but ", "; also, ", ", while ", " – "]


def paraphrase(question: str, rng: Rng) -> str:
    """The question with at most two of its expressions replaced."""
    rules = [rule for rule in _RULES if rule[0].search(question)]
    for pattern, options in rng.sample(rules, min(len(rules), rng.choice([1, 1, 2]))):
        question = pattern.sub(rng.choice(options), question, count=1)
    return capital(question)


def lower_start(sentence: str) -> str:
    """The sentence without its capital when it begins with a function word."""
    first = sentence.split(" ", 1)[0].rstrip(",")
    common = first in _LOWER or first.lower().removesuffix("s") in _NOUNS
    return sentence[0].lower() + sentence[1:] if common else sentence


def extend(fact: Fact, rng: Rng) -> Fact:
    """The same fact in a longer sentence."""
    sentence = fact.sentence
    if rng.random() < 0.5:
        sentence = f"{rng.choice(_OPENINGS)} {lower_start(sentence)}"
    elif sentence.endswith("."):
        sentence = f"{sentence[:-1]}, {rng.choice(_ENDINGS)}."
    return Fact(sentence, fact.questions, fact.key)


_PREPOSITIONS = ["In", "At", "On", "From", "For", "With", "By", "After", "Before", "Until", "During"]


def share_beginning(facts: list[Fact], rng: Rng) -> list[Fact]:
    """The facts, some of which now begin with the same preposition: the first word alone does not tell them apart."""
    preposition = rng.choice(_PREPOSITIONS)
    chosen = set(rng.sample(range(len(facts)), min(len(facts), rng.randint(2, 4))))
    result = []
    for index, fact in enumerate(facts):
        if index in chosen:
            place = rng.choice(
                [
                    f"the {v.adjective(rng)} {v.noun(rng)}",
                    f"the {v.noun(rng)}",
                    f"{v.adjective(rng)} {v.noun(rng)}",
                    v.time(rng),
                    v.place(rng),
                    v.city(rng),
                    v.number(rng),
                    v.price(rng),
                ]
            )
            comma = "," if rng.random() < 0.3 else ""
            fact = Fact(f"{preposition} {place}{comma} {lower_start(fact.sentence)}", fact.questions, fact.key)
        result.append(fact)
    return result


def merge(facts: list[Fact], rng: Rng, share: float) -> list[Fact]:
    """Joins some neighbouring facts into one sentence, and extends some."""
    result: list[Fact] = []
    index = 0
    while index < len(facts):
        fact = facts[index]
        index += 1
        roll = rng.random()
        if roll < share and index < len(facts) and fact.sentence.endswith("."):
            other = facts[index]
            index += 1
            text = f"{fact.sentence[:-1]}{rng.choice(_JOINERS)}{lower_start(other.sentence)}"
            result.append(Fact(text, fact.questions + other.questions, fact.key))
        elif roll < 2.2 * share:
            result.append(extend(fact, rng))
        else:
            result.append(fact)
    return result
