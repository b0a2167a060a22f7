"""A random grammar of declarative sentences with questions, and generic questions for any sentence."""

# ruff: noqa: SIM905

from __future__ import annotations

import random
import re
from collections.abc import Callable

from . import values as v
from . import words as w
from .bank import Fact, capital

Rng = random.Random
STOP = set(
    "a an the of to in on at by for from with and or but if is are was be been has have had do does did not no can may "
    "must will should you your we our us it its they their this that these those i my me he she his her who which what "
    "when where how all any each every there here than then so as please also only up out into over per until before "
    "after during while about between".split()
)


def words_of(text: str) -> list[str]:
    """The words of a text without punctuation."""
    return re.findall(r"[^\W_]+(?:[-'.:@][^\W_]+)*", text)


def stem(word: str) -> str:
    """A crude stem, enough to compare opens, opened and opening."""
    word = word.lower()
    for suffix in ("ings", "ing", "ies", "ied", "es", "ed", "s", "y", "e"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: -len(suffix)]
    return word


def content_words(text: str) -> list[str]:
    """The words of a text that carry meaning, without numbers."""
    return [x for x in words_of(text) if x.lower() not in STOP and not any(c.isdigit() for c in x) and len(x) > 2]


def stems(text: str) -> set[str]:
    """The stems of the content words of a text."""
    return {stem(x) for x in content_words(text)}


def _phrase(rng: Rng) -> str:
    adjective = f"{v.adjective(rng)} " if rng.random() < 0.55 else ""
    return f"{adjective}{v.noun(rng)}"


def _verb(rng: Rng) -> tuple[str, ...]:
    return rng.choice(w.VERBS)


def _where(rng: Rng) -> str:
    preposition = rng.choice(["in", "near", "behind", "at", "next to", "opposite", "under", "beside", "inside"])
    return f"{preposition} {v.place(rng) if rng.random() < 0.5 else 'the ' + _phrase(rng)}"


def _when(rng: Rng) -> str:
    options = [f"at {v.time(rng)}", v.days(rng), f"on {v.date(rng)}", f"after {v.duration(rng)}"]
    return rng.choice([*options, f"before {v.time(rng)}", f"until {v.date(rng)}"])


def _actor(rng: Rng) -> str:
    return v.name(rng) if rng.random() < 0.5 else f"the {_phrase(rng)}"


def _active(rng: Rng) -> Fact:
    who, (base, third, past, _), what = _actor(rng), _verb(rng), _phrase(rng)
    place, when = _where(rng), _when(rng)
    is_past = rng.random() < 0.5
    tail = rng.choice([f" {place} {when}", f" {place}", f" {when}"])
    front = rng.random() < 0.2
    core = f"{who} {past if is_past else third} the {what}"
    sentence = f"{capital(tail.strip())}, {core}." if front else f"{capital(core)}{tail}."
    aux = "did" if is_past else "does"
    questions = [f"What {aux} {who} {base}?", f"Who {past if is_past else third} the {what}?"]
    if place in tail:
        questions.append(f"Where {aux} {who} {base} the {what}?")
    if when in tail:
        questions.append(f"When {aux} {who} {base} the {what}?")
    return Fact(sentence, questions)


def _passive(rng: Rng) -> Fact:
    what, (_, _, _, participle), place, when = _phrase(rng), _verb(rng), _where(rng), _when(rng)
    by = f" by {_actor(rng)}" if rng.random() < 0.5 else ""
    modal = rng.choice(
        ["is", "was", "must be", "can be", "will be", "may not be", "has been", "should be", "cannot be"]
    )
    tail = rng.choice([f" {place}", f" {when}", f" {place} {when}"])
    questions = [f"What happens to the {what}?", f"What about the {what}?"]
    aux, _, rest = modal.partition(" ")
    aux = {"cannot": "can", "may": "may"}.get(aux, aux)
    rest = rest.replace("not ", "") + (" " if rest else "")
    if by:
        questions.append(
            f"Who {participle} the {what}?" if modal == "was" else f"By whom {aux} the {what} {rest}{participle}?"
        )
    if place in tail:
        questions.append(f"Where {aux} the {what} {rest}{participle}?")
    if when in tail:
        questions.append(f"When {aux} the {what} {rest}{participle}?")
    return Fact(f"The {what} {modal} {participle}{by}{tail}.", questions)


def _condition(rng: Rng) -> Fact:
    what, (base, third, _past, participle) = _phrase(rng), _verb(rng)
    other, (do, _, _, done) = _phrase(rng), _verb(rng)
    if_part = rng.choice(
        [
            f"the {what} is {participle}",
            f"you {base} the {what}",
            f"you have {participle} a {what}",
            f"the {what} is {v.adjective(rng)}",
            f"you want to {base} the {what}",
            f"nobody {third} the {what}",
        ]
    )
    then = rng.choice(
        [
            f"please {do} the {other}",
            f"do not {do} the {other}",
            f"you must {do} the {other}",
            f"you can {do} the {other}",
            f"the {other} is {done} {_when(rng)}",
            f"call {v.phone(rng)}",
            f"tell {_actor(rng)}",
            f"you pay {v.price(rng)}",
            f"go to {v.place(rng)}",
            f"write to {v.email(rng)}",
            f"wait {v.duration(rng)}",
        ]
    )
    conjunction = rng.choice(["If", "If", "When", "As soon as", "In case"])
    sentence = (
        f"{conjunction} {if_part}, {then}."
        if rng.random() < 0.7
        else f"{capital(then)} {conjunction.lower()} {if_part}."
    )
    questions = [
        f"What should I do if {if_part}?",
        f"What happens when {if_part}?",
        f"{capital(if_part)}. What do I have to do?",
    ]
    return Fact(sentence, [question.replace("you ", "I ") for question in questions])


def _order(rng: Rng) -> Fact:
    (base, _, _, participle), what = _verb(rng), _phrase(rng)
    anchor, anchor_verb = _phrase(rng), _verb(rng)
    relation = rng.choice(["Before", "After"])
    negated = rng.random() < 0.35
    anchor_text = f"you {anchor_verb[0]} the {anchor}" if rng.random() < 0.5 else f"the {anchor}"
    action = (
        f"do not {base} the {what}"
        if negated
        else rng.choice([f"{base} the {what}", f"please {base} the {what}", f"you have to {base} the {what}"])
    )
    sentence = (
        f"{relation} {anchor_text}, {action}."
        if rng.random() < 0.6
        else f"{capital(action)} {relation.lower()} {anchor_text}."
    )
    mine = anchor_text.replace("you ", "I ")
    questions = [f"What must I do {relation.lower()} {mine}?", f"Can I {base} the {what} {relation.lower()} {mine}?"]
    questions += [f"Should the {what} be {participle} {relation.lower()} {mine}?", f"When should I {base} the {what}?"]
    return Fact(sentence, questions)


def _list(rng: Rng) -> Fact:
    items = [f"{rng.choice(['a', 'your', 'the', 'two'])} {_phrase(rng)}" for _ in range(rng.randint(2, 4))]
    listing = ", ".join(items[:-1]) + " and " + items[-1]
    goal = rng.choice(["for the ", "to the ", "before the "]) + _phrase(rng)
    sentence, question = rng.choice(
        [
            (f"Bring {listing} {goal}.", f"What should I bring {goal}?"),
            (f"Please take along {listing} {goal}.", f"What do I have to take with me {goal}?"),
            (f"You will need {listing} {goal}.", f"What do I need {goal}?"),
            (f"{capital(goal)}, have {listing} ready.", f"What must I have ready {goal}?"),
            (f"{capital(goal)}, please bring {listing}.", f"What do you want me to bring {goal}?"),
        ]
    )
    return Fact(sentence, [question, question.replace("What", "Which things"), f"Do I need {items[0]} {goal}?"])


def _quantity(rng: Rng) -> Fact:
    what, unit = _phrase(rng), rng.choice(w.UNITS)
    count = v.number(rng)
    sentence, questions = rng.choice(
        [
            (f"The {what} has {count} {unit}.", [f"How many {unit} does the {what} have?"]),
            (
                f"There are {count} {unit} in the {what}.",
                [f"How many {unit} are there in the {what}?", f"How many {unit} are in the {what}?"],
            ),
            (
                f"The {what} costs {(_p := v.price(rng))}.",
                [f"How much does the {what} cost?", f"What is the price for the {what}?"],
            ),
            (
                f"The price of the {what} is {v.price(rng)}.",
                [f"How much is the {what}?", f"What do I pay for the {what}?"],
            ),
            (f"The {what} lasts {v.duration(rng)}.", [f"How long does the {what} last?", f"How long is the {what}?"]),
            (
                f"Using the {what} costs {v.price(rng)} per hour.",
                [f"What does the {what} cost per hour?", f"How much is it to use the {what}?"],
            ),
            (
                f"The {what} can hold {count} {unit}.",
                [f"How much can the {what} hold?", f"How many {unit} fit in the {what}?"],
            ),
            (f"The {what} is {count} {unit} from the {(o := _phrase(rng))}.", [f"How far is the {what} from the {o}?"]),
            (
                f"The code for the {what} is {v.code(rng)}.",
                [f"What is the code for the {what}?", f"Which code opens the {what}?"],
            ),
            (f"The {what} belongs to {v.name(rng)}.", [f"Who owns the {what}?", f"To whom does the {what} belong?"]),
            (f"The {what} is {_where(rng)}.", [f"Where is the {what}?", f"Where can I find the {what}?"]),
            (f"You will find the {what} {_where(rng)}.", [f"Where is the {what}?", f"Where do I find the {what}?"]),
            (
                f"The colour of the {what} is {v.SLOTS['colour'](rng)}.",
                [f"What colour is the {what}?", f"Which colour does the {what} have?"],
            ),
            (
                f"The telephone number of the {what} is {v.phone(rng)}.",
                [f"What is the phone number of the {what}?", f"How do I call the {what}?"],
            ),
            (
                f"Questions about the {what} are answered by {v.name(rng)}.",
                [f"Who answers questions about the {what}?", f"Who knows about the {what}?"],
            ),
        ]
    )
    return Fact(sentence, questions)


def _permission(rng: Rng) -> Fact:
    (base, _, _, participle), what, where = _verb(rng), _phrase(rng), _where(rng)
    group = rng.choice(
        ["Visitors", "Guests", "Members", "Children", "Students", "Drivers", "You", "Customers", "Dogs", "Adults"]
    )
    sentence = rng.choice(
        [
            f"{group} may {base} the {what} {where}.",
            f"{group} may not {base} the {what} {where}.",
            f"It is forbidden to {base} the {what} {where}.",
            f"It is possible to {base} the {what} {where}.",
            f"Nobody is allowed to {base} the {what} {where}.",
            f"Only {group.lower() if group != 'You' else 'staff'} can {base} the {what} {where}.",
            f"The {what} must not be {participle} {where}.",
        ]
    )
    questions = [
        f"May I {base} the {what}?",
        f"Am I allowed to {base} the {what} {where}?",
        f"Can I {base} the {what} {where}?",
    ]
    questions += [
        f"Is it permitted to {base} the {what}?",
        f"Who can {base} the {what}?",
        f"Is it ok to {base} a {what}?",
    ]
    return Fact(sentence, questions)


_KINDS: list[Callable[[Rng], Fact]] = [_active, _passive, _condition, _order, _list, _quantity, _quantity, _permission]


def random_fact(rng: Rng) -> Fact:
    """A random sentence of varied build with its questions."""
    fact = rng.choice(_KINDS)(rng)
    return Fact(fact.sentence.replace("..", "."), [capital(question) for question in fact.questions])


def _wh_words(sentence: str) -> list[str]:
    found: list[str] = []
    if re.search(r"\d:\d\d|[ap]\.?m\.?\b|o'clock|day\b|days\b|noon|midnight|past |weekend", sentence):
        found += ["When", "At what time", "On which day", "Until when", "From when"]
    if re.search(r"euro|franc|dollar|pound|crown|CHF|EUR|USD|[$€£]", sentence):
        found += ["How much", "What price", "What does it cost", "What is the fee"]
    if re.search(r"minute|hour|week|month|year|days", sentence):
        found += ["How long", "How many hours or days"]
    if re.search(r"floor|room|building|desk|wing|Street|Road|Lane|Avenue|Square|behind|next to|opposite", sentence):
        found += ["Where", "In which place", "Which way"]
    if re.search(r"\b(Mr|Mrs|Ms|Dr|Professor)\b", sentence):
        found += ["Who", "Which person"]
    if "@" in sentence or re.search(r"\d{2,}[ -]\d{2,}", sentence):
        found += ["How can I reach", "Which contact"]
    return found or ["What about", "What is said about"]


_ABOUT = [
    "What does the text say about {}?",
    "What about {}?",
    "Is there anything about {}?",
    "Tell me about {}.",
    "{}?",
    "What do I need to know about {}?",
    "Which sentence mentions {}?",
    "Please quote the sentence about {}.",
    "I have a question about {}.",
    "What should I know about {}?",
    "What is written about {}?",
    "Can you find {} in the text?",
]


def _inflect(word: str, rng: Rng) -> str:
    if rng.random() < 0.6 or not word.islower():
        return word
    if word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return rng.choice([word + "s", word + "s", word + "ing", word + "ed"]) if word[-1] not in "aeiouysd" else word + "s"


def generic_question(sentence: str, others: list[str], rng: Rng) -> str | None:
    """A question built from a few content words of a sentence that no other sentence shares all of."""
    own = list(dict.fromkeys(content_words(sentence)))
    if len(own) < 2:
        return None
    for count in (2, 2, 3, 3, 4):
        chosen = rng.sample(own, min(count, len(own)))
        wanted = {stem(x) for x in chosen}
        if all(len(wanted & stems(other)) < len(wanted) for other in others):
            break
    else:
        return None
    if rng.random() < 0.5:
        chosen.sort(key=own.index)
    shown = [_inflect(x, rng) for x in chosen]
    if rng.random() < 0.45:
        return f"{rng.choice(_wh_words(sentence))} {' '.join(shown)}?"
    joined = rng.choice([" ", ", ", " and "]).join(shown)
    return capital(rng.choice(_ABOUT).format(joined))
