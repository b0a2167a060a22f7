"""Extraction: a text, the keys that are asked for, and the JSON object of their values."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import values as v
from . import words as w
from .bank import capital
from .chatml import Message, dumps
from .context_tasks import Dialogue

Rng = random.Random


@dataclass(frozen=True)
class Field:
    """A key with its JSON type, the maker of its values and the sentences that state one (`{}` is the value)."""

    key: str
    kind: str
    make: Callable[[Rng], Any]
    ways: tuple[str, ...]


NAMED = (
    "The {k} is {}.",
    "{} is the {k}.",
    "{k}: {}.",
    "As {k} they gave {}.",
    "The {k} of this one is {}.",
    "Its {k} is {}.",
    "Under {k} it says {}.",
    "We have {} as the {k}.",
    "{} ({k}).",
    "The {k} was {}, as always.",
    "Note that the {k} has changed to {}.",
    "For the {k}, write {}.",
    "About the {k}: it is {}.",
    "The sheet gives {} for the {k}.",
)
"""Sentences that name the key; they serve every field."""


def _amount(low: int, high: int) -> Callable[[Rng], int]:
    return lambda rng: rng.randint(low, high)


def _decimal(rng: Rng) -> float:
    return rng.choice([round(rng.uniform(0.5, 99), 1), round(rng.uniform(1, 900), 2)])


def _phrase(rng: Rng) -> str:
    return rng.choice([f"{v.adjective(rng)} {v.noun(rng)}", v.noun(rng), f"{v.noun(rng)} with {v.noun(rng)}"])


def _date(rng: Rng) -> str:
    """A date, more often one that begins as many other words of a sentence do."""
    return f"the {rng.randint(4, 20)}th of {rng.choice(w.MONTHS)}" if rng.random() < 0.2 else v.date(rng)


def _email(rng: Rng) -> str:
    """An address, often with a common word before the sign."""
    left, right = v.email(rng).split("@")
    return f"{rng.choice([left, left, rng.choice(w.NOUNS).split()[-1], rng.choice(_ACTIONS)])}@{right}"


def _list(make: Callable[[Rng], str]) -> Callable[[Rng], list[str]]:
    return lambda rng: list(dict.fromkeys(make(rng) for _ in range(rng.randint(2, 4))))


_TEXT = """
person | name person contact customer author patient teacher driver sender manager winner guest member buyer seller doctor client student artist | {} wrote to us. / {} called today. / It was ordered by {}. / My name is {}. / This is {} speaking. / Best regards, {} / {} asked for it. / I am {}.
city | city town place destination location | The person lives in {}. / I come from {}. / It happened in {}. / We are going to {}. / The office is in {}. / The parcel goes to {}.
street | address street | It has to be sent to {}. / They live at {}. / You find us at {}.
date | date deadline birthday arrival departure | The visit was on {}. / It took place on {}. / Delivery is planned for {}. / It ends on {}. / We arrived on {}.
time | time start opening | It starts at {}. / The call came at {}. / We meet at {}. / From {} on. / Doors open at {}.
price | price cost amount total budget | It costs {}. / We paid {} for it. / The amount of {} is due. / They want {}. / For {} it is yours. / It came to {}.
phone | phone telephone mobile | Call {} for details. / Reach me at {}. / You can ring {}.
email | email mail | Write to {}. / Send the answer to {}. / Mails go to {}.
url | website link page | See {} for more. / More under {}. / Look at {}.
code | code reference order ticket | Please quote {}. / It has the mark {}. / Your number is {}.
phrase | product item object topic subject | They want a {}. / The order is for a {}. / I bought a {}. / It is about a {}. / Please send me the {}.
colour | colour color | They want it in {}. / It must be {}. / Make it {}.
room | room | It is in room {}. / Room {} is booked. / Come to room {}.
org | company employer shop | I work for {}. / It is sold by {}. / The bill comes from {}.
day | day weekday | It is on a {}. / Come on {}. / Every {} they meet.
dur | duration period | It lasts {}. / Plan {} for it. / It took {}.
place | meeting_place spot | We wait at {}. / Leave it at {}.
adj | state condition quality | It looks {}. / I find it {}.
"""
_NUMBERS = """
quantity count pieces | 2 90 | There are {} of them. / {} pieces were sent. / I need {}. / We counted {}.
age | 5 95 | {} years old. / I am {} years old. / She turned {} this week.
guests people | 2 60 | A table for {}. / {} of us will come. / We are {}.
pages | 8 900 | The book has {} pages. / It is {} pages long.
floor | 1 30 | It is on floor {}. / Take the lift to floor {}.
height length width | 2 400 | It measures {} centimetres. / It is {} cm.
score points rating | 1 100 | They gave it {} points. / It got {} of 100.
year | 1900 2035 | It was built in {}. / That was in {}.
"""


def _read() -> list[Field]:
    makers: dict[str, Callable[[Rng], Any]] = {
        "person": v.name,
        "phrase": _phrase,
        "room": lambda rng: str(rng.randint(1, 400)),
        "org": lambda rng: v.pseudo(rng, 2).capitalize() + rng.choice([" Ltd", " AG", "", " and Sons"]),
        **v.SLOTS,
        "date": _date,
        "email": _email,
    }
    fields = []
    for line in _TEXT.strip().splitlines():
        slot, keys, ways = line.split(" | ")
        fields += [Field(key, "string", makers[slot], tuple(ways.split(" / "))) for key in keys.split()]
    for line in _NUMBERS.strip().splitlines():
        keys, limits, ways = line.split(" | ")
        low, high = map(int, limits.split())
        fields += [Field(key, "integer", _amount(low, high), tuple(ways.split(" / "))) for key in keys.split()]
    fields += [Field(key, "number", _decimal, ("It is {} in all.",)) for key in ("value", "measure", "rate")]
    lists = {"items": _phrase, "people": v.name, "cities": v.city, "tags": v.noun, "days": lambda r: v.SLOTS["day"](r)}
    ways = ("Here they are: {}.", "There are {}.", "I mean {}.")
    return [*fields, *(Field(key, "array", _list(make), ways) for key, make in lists.items())]


FIELDS = _read()
_TYPED = set(
    """
date deadline birthday arrival departure time start opening price cost amount total budget phone telephone mobile email
mail url website link page duration period
""".split()  # noqa: SIM905
)
"""Keys whose values are known by their looks, so that a sentence may leave the key out."""
_CUED = {
    "name person contact customer author patient teacher": "by from with for I'm called am yours, greetings,",
    "city town place destination location": "in to from near at through of around reached left",
    "age": "aged turned turns became becomes was reached be already only almost in by of with since before",
}
"""Words after which a sentence states the value of such a key without naming it."""
CUES = {key: tuple(cues.split()) for keys, cues in _CUED.items() for key in keys.split()}
_KNOWN = [field for field in FIELDS if field.key in _TYPED or field.key in CUES]
_KNOWN += 2 * [field for field in _KNOWN if "mail" in field.key]  # nothing before an address says what comes

ASKS = """
Extract {keys} as JSON.
Extract {keys}.
Give me {keys} as a JSON object.
Return JSON with the keys {keys}.
Which {keys}? Answer in JSON.
Write {keys} of this text as JSON.
JSON with {keys}, please.
Fill a JSON object with {keys}.
Read the text and return {keys} in JSON.
Find {keys} and write them as JSON.
I need {keys} from the message, in JSON.
Turn this into JSON ({keys}).
Take {keys} out of the text.
Keys: {keys}. Return an object.
""".strip().splitlines()
_SCHEMA_ASKS = [
    "Answer with JSON that fits this schema: {schema}",
    "Extract the data. Schema:\n{schema}",
    "Schema: {schema}\nReturn the object.",
    "Fill this JSON schema from the text.\n{schema}",
]
_SYSTEMS = [
    "You extract data.",
    "Answer in JSON.",
    "Return JSON only.",
    "Be exact.",
    "You read messages and fill forms.",
]


_JOINTS = """
the a this that these as for of with in on at from under by it is was be will would has have had and or to which there
here we you they he she our their its your my all each any only also then now just what who where given gives says said
reads called stands set put makes means shows holds about after before over into near along
""".split()  # noqa: SIM905
_ACTIONS = """
want need like know think see hear read write speak answer ask wait stay live work study move come go arrive leave bring
send pay buy sell open close begin end meet visit help try learn keep find lose wish hope plan choose change finish
""".split()  # noqa: SIM905
_BREAKS = [" ", " ", " ", " ", ": ", ", ", " = ", " - ", " (", ' "']
_WHO = ["he", "she", "they", "we", "you", "one"]
_CLOSING = {" (": ")", ' "': '"'}
_JSON_WORDS = ["JSON", "JSON", "json", "a JSON object", "an object", "JSON only", ""]
_REQUESTS = """
give write return extract find take answer reply read fill tell get pick want need please make show produce deliver
collect report copy out down back exactly only kindly now
""".split()  # noqa: SIM905


def _unknown_word(rng: Rng) -> str:
    """A word that is in no list: made up, or a known one with another ending."""
    if rng.random() < 0.4:
        return v.pseudo(rng)
    return rng.choice(rng.choice([_ACTIONS, w.NOUNS])).rstrip("e") + rng.choice(["s", "ed", "ed", "ing", "er"])


def _joints(rng: Rng, most: int) -> str:
    def word() -> str:
        return _unknown_word(rng) if rng.random() < 0.1 else rng.choice(_JOINTS if rng.random() < 0.85 else w.NOUNS)

    return " ".join(word() for _ in range(rng.randint(0, most)))


def composed_ask(keys: str, rng: Rng) -> str:
    """A request for keys in an order of words that nobody wrote down; JSON is mostly named in it."""
    before = [rng.choice(_REQUESTS) if rng.random() < 0.5 else rng.choice(_JOINTS) for _ in range(rng.randint(0, 5))]
    after = [rng.choice(_REQUESTS) if rng.random() < 0.4 else rng.choice(_JOINTS) for _ in range(rng.randint(0, 4))]
    rng.choice([before, before, after]).insert(rng.randint(0, 2), rng.choice(_JSON_WORDS))
    left, right = (" ".join(filter(None, words)) for words in (before, after))
    joint = rng.choice([" ", " ", " ", ": ", ", ", " ("])
    text = f"{left}{joint}{keys}{_CLOSING.get(joint, '')}" if left else keys
    if right:
        text += rng.choice([" ", ", ", ". "]) + right
    return (capital(text) if rng.random() < 0.8 else text) + rng.choice([".", ".", ":", "?", "!", ""])


def composed_sentence(key: str, value: str, rng: Rng) -> str:
    """A sentence of little words in any order that names a key and then its value, or the other way round."""
    between = f" {joints} " if (joints := _joints(rng, 4)) else " "
    opening = rng.choice(_BREAKS)
    if rng.random() < 0.65:
        gap = between.rstrip() + opening if between.strip() or opening.strip() else rng.choice([": ", " = ", " is "])
        core = f"{key}{gap}{value}{_CLOSING.get(opening, '')}"
    else:
        core = f"{value}{rng.choice([',', '', ''])}{between if between.strip() else ' as '}{key}"
    text = f"{_joints(rng, 4)} {core}".strip()
    if rng.random() < 0.25:
        text += ", " + (_joints(rng, 3) or "too")
    return text + "."


def _words(rng: Rng, most: int) -> str:
    """Little words, nouns, adjectives, verbs and unknown words in any order."""
    kinds = rng.choices([_JOINTS, w.NOUNS, w.ADJECTIVES, _ACTIONS, []], [10, 3, 2, 3, 5], k=rng.randint(0, most))
    return " ".join(rng.choice(kind) if kind else _unknown_word(rng) for kind in kinds)


def composed_typed(value: str, rng: Rng, cues: tuple[str, ...] = ()) -> str:
    """A sentence that holds a value without its key, after one of the words that announce it, if there are any."""
    text = f"{_words(rng, 5)} {rng.choice(cues)}" if cues else _words(rng, 5)
    text = f"{text.strip()} {value}".strip()
    if rng.random() < 0.3:
        text += f" {rng.choice(_WHO)} {_words(rng, 4)}".rstrip()
    elif rng.random() < 0.6:
        text += rng.choice([" ", " ", ", "]) + (_words(rng, 6) or rng.choice(w.NOUNS))
    return text + "."


def _foreign(field: Field, rng: Rng) -> Field:
    """The field with a random key, and often with letters of other scripts in its values."""
    key = v.pseudo(rng, 2) if rng.random() < 0.35 else rng.choice(w.NOUNS).replace(" ", "_")
    make = field.make
    if field.kind == "string" and rng.random() < 0.35:  # values that look like nothing that the sentence says
        make = rng.choice([v.foreign, v.code, v.code, _date, v.price])
    return Field(key, field.kind, make, ())


def shown(value: Any) -> str:
    """A value as a sentence says it."""
    if isinstance(value, list):
        return ", ".join(value[:-1]) + " and " + value[-1] if len(value) > 1 else str(value[0])
    return str(value)


def schema_of(fields: list[Field], rng: Rng) -> str:
    """A JSON schema of the fields."""
    properties: dict[str, Any] = {}
    for field in fields:
        properties[field.key] = {"type": field.kind}
        if field.kind == "array":
            properties[field.key]["items"] = {"type": "string"}
    schema: dict[str, Any] = {"properties": properties}
    if rng.random() < 0.7:
        schema["required"] = [field.key for field in fields]
    if rng.random() < 0.6:
        schema["type"] = "object"
    if rng.random() < 0.3:
        schema["title"] = v.pseudo(rng, 2).capitalize()
    return json.dumps(schema, ensure_ascii=False)


def sentence(field: Field, value: Any, rng: Rng, common: tuple[str, ...] = NAMED) -> str:
    """A sentence that states the value of a field."""
    own = bool(field.ways) and rng.random() < (0.55 if field.kind != "array" else 0.3)
    if common is NAMED and rng.random() < 0.6:
        cues = CUES.get(field.key, ())
        if field.ways and (cues or field.key in _TYPED) and rng.random() < 0.55:
            return capital(composed_typed(shown(value), rng, cues)).replace("..", ".")
        return capital(composed_sentence(field.key.replace("_", " "), shown(value), rng)).replace("..", ".")
    text = rng.choice(field.ways if own else common).replace("{k}", field.key.replace("_", " "))
    return capital(text.replace("{}", shown(value))).replace("..", ".")


def choose(fields: list[Field], rng: Rng, count: int) -> list[Field]:
    """Fields with different keys whose own sentences cannot be confused."""
    chosen: list[Field] = []
    for field in rng.sample(fields, len(fields)):
        if len(chosen) == count:
            break
        if all(field.key != other.key and field.ways != other.ways for other in chosen):
            chosen.append(field)
    return chosen


def extraction(
    rng: Rng, fields: list[Field] | None = None, asks: list[str] = ASKS, common: tuple[str, ...] = NAMED
) -> Dialogue:
    """A text and keys to be answered with a JSON object of the values, in the order of the keys."""
    chosen = choose(fields or rng.choice([FIELDS, _KNOWN, _KNOWN]), rng, rng.randint(2, 6))
    if fields is None:
        chosen = [_foreign(field, rng) if rng.random() < 0.35 else field for field in chosen]
        chosen = list({field.key: field for field in chosen}.values())
        if rng.random() < 0.4:  # two of a type
            twin = rng.choice(chosen)
            other = Field(rng.choice(w.NOUNS), twin.kind, twin.make, ())
            if all(other.key != field.key for field in chosen):
                if rng.random() < 0.5:  # else the name of the other one is all that tells them apart
                    chosen[chosen.index(twin)] = Field(twin.key, twin.kind, twin.make, ())
                chosen.append(other)
    values = {field.key: field.make(rng) for field in chosen}
    lines = [sentence(field, values[field.key], rng, common) for field in rng.sample(chosen, len(chosen))]
    text = " ".join(lines) if rng.random() < 0.8 else "\n".join(f"{capital(k)}: {shown(x)}" for k, x in values.items())
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(_SYSTEMS)})
    by_schema = rng.random() < 0.3
    for turn in range(rng.choice([1, 1, 2, 3])):
        asked = rng.sample(chosen, rng.randint(1, len(chosen)))
        quoted = rng.random() < 0.3
        listing = ", ".join(f'"{field.key}"' if quoted else field.key for field in asked)
        if len(asked) > 1 and rng.random() < 0.4:
            listing = " and ".join(listing.rsplit(", ", 1))
        if by_schema:
            ask = rng.choice(_SCHEMA_ASKS).format(schema=schema_of(asked, rng))
        else:
            ask = rng.choice(asks).format(keys=listing)
            if asks is ASKS and rng.random() < 0.6:
                ask = composed_ask(listing, rng)
        head = rng.choice([f"{text}\n\n{ask}", f"{ask}\n\n{text}", f"{ask}\nText: {text}"])
        messages.append({"role": "user", "content": head if turn == 0 else ask})
        messages.append({"role": "assistant", "content": dumps({field.key: values[field.key] for field in asked})})
    return Dialogue("json", messages)
