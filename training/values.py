"""Random values for the slots of the fact bank: times, prices, names, places, codes and pseudo-words."""

# ruff: noqa: SIM905

from __future__ import annotations

import random
from collections.abc import Callable

from . import words as w

Rng = random.Random
_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pl pr qu r s sh sk st t th tr v w y z".split()
_VOWELS = "a e i o u ai ea ia oo ou ei".split()
_CODAS = ["", "", "", "l", "n", "r", "s", "t", "m", "nd", "rk", "x", "ck", "ll", "st"]


def pseudo(rng: Rng, syllables: int | None = None) -> str:
    """A pronounceable made-up word in lower case."""
    count = syllables or rng.choice([1, 2, 2, 2, 3])
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))


def noun(rng: Rng) -> str:
    """A common noun, now and then a made-up one or a compound."""
    roll = rng.random()
    if roll < 0.15:
        return pseudo(rng, 2)
    if roll < 0.25:
        return f"{rng.choice(w.NOUNS)} {rng.choice(w.NOUNS)}"
    return rng.choice(w.NOUNS)


def adjective(rng: Rng) -> str:
    """An adjective of the bank."""
    return rng.choice(w.ADJECTIVES)


def first_name(rng: Rng) -> str:
    """A first name, made up in half of the cases."""
    return rng.choice(w.FIRST_NAMES) if rng.random() < 0.5 else pseudo(rng, 2).capitalize()


def last_name(rng: Rng) -> str:
    """A family name, made up in half of the cases."""
    return rng.choice(w.LAST_NAMES) if rng.random() < 0.5 else pseudo(rng).capitalize()


def name(rng: Rng) -> str:
    """A person: first and last name, a title and a last name, or a first name."""
    roll = rng.random()
    if roll < 0.45:
        return f"{first_name(rng)} {last_name(rng)}"
    if roll < 0.85:
        return f"{rng.choice(w.TITLES)}{rng.choice(['', '', '.'])} {last_name(rng)}"
    return first_name(rng)


def time(rng: Rng) -> str:
    """A time of day in one of many notations."""
    hour, minute = rng.randint(5, 22), rng.choice([0, 0, 0, 15, 30, 30, 45, 10, 20, 40, 50, 5])
    style = rng.random()
    twelve, half = (hour - 1) % 12 + 1, "a.m." if hour < 12 else "p.m."
    if style < 0.4:
        return f"{hour}:{minute:02d}"
    if style < 0.5:
        return f"{hour:02d}:{minute:02d}"
    if style < 0.75:
        return f"{twelve} {half}" if minute == 0 else f"{twelve}:{minute:02d} {half}"
    if style < 0.82:
        return f"{twelve}{f':{minute:02d}' if minute else ''} {half.replace('.', '')}"
    if style < 0.9:
        return rng.choice(["half past ", "quarter past ", "quarter to "]) + rng.choice(w.NUMBER_WORDS)
    if style < 0.93:
        return rng.choice(["noon", "midnight", "midday"])
    return f"{twelve} o'clock"


def price(rng: Rng) -> str:
    """An amount of money."""
    style = rng.random()
    whole = rng.choice([rng.randint(1, 20), rng.randint(1, 99), rng.randint(20, 900)])
    amount = str(whole) if rng.random() < 0.55 else f"{whole}.{rng.choice(['50', '20', '80', '90', '95', '40', '75'])}"
    if style < 0.6:
        return f"{amount} {rng.choice(w.CURRENCIES)}"
    if style < 0.8:
        return rng.choice("$€£") + amount
    return rng.choice(["CHF ", "EUR ", "USD "]) + amount


def date(rng: Rng) -> str:
    """A calendar date."""
    day, month = rng.randint(1, 28), rng.choice(w.MONTHS)
    style = rng.random()
    if style < 0.4:
        return f"{day} {month}"
    if style < 0.6:
        return f"{month} {day}"
    if style < 0.75:
        return f"{day} {month} {rng.randint(2020, 2035)}"
    if style < 0.85:
        return f"the {day}{'th' if 3 < day < 21 or day > 23 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')} of {month}"
    return f"{rng.randint(2020, 2035)}-{rng.randint(1, 12):02d}-{day:02d}"


def days(rng: Rng) -> str:
    """A phrase that says on which days."""
    a, b = rng.sample(w.WEEKDAYS, 2)
    return rng.choice(
        [
            f"on {a}s",
            f"on {a}s",
            f"from {a} to {b}",
            f"every {a}",
            "on weekdays",
            "at weekends",
            "every day",
            "daily",
            f"on {a}s and {b}s",
            f"every {a} and {b}",
            f"on {a}",
            "on public holidays",
            f"{a} to {b}",
            "on working days",
        ]
    )


def number(rng: Rng) -> str:
    """A small number, as digits or as a word."""
    return rng.choice(w.NUMBER_WORDS) if rng.random() < 0.4 else str(rng.randint(2, 60))


def duration(rng: Rng) -> str:
    """A length of time."""
    unit = rng.choice(["minutes", "minutes", "hours", "days", "weeks", "months", "years", "working days"])
    if unit == "minutes":
        return rng.choice([f"{rng.choice([5, 10, 15, 20, 25, 30, 40, 45, 50, 90])} minutes", "half an hour"])
    if rng.random() < 0.15:
        return rng.choice(["an hour", "one day", "a week", "a month", "a year", "one hour", "24 hours", "48 hours"])
    return f"{number(rng)} {unit}"


def street(rng: Rng) -> str:
    """A street with a number."""
    base = rng.choice(w.STREETS) if rng.random() < 0.7 else pseudo(rng).capitalize()
    kind = rng.choice(["Street", "Road", "Lane", "Avenue", "Square"])
    return f"{base} {kind} {rng.randint(1, 180)}" if rng.random() < 0.5 else f"{rng.randint(1, 180)} {base} {kind}"


def place(rng: Rng) -> str:
    """A place inside or outside a building."""
    options: list[Callable[[], str]] = [
        lambda: f"room {rng.choice(['', 'A', 'B', 'C', 'K'])}{rng.randint(1, 420)}",
        lambda: f"the {rng.choice('first second third fourth fifth ground top'.split())} floor",
        lambda: f"building {rng.choice('ABCDEFGH')}",
        lambda: f"the {rng.choice(w.ADJECTIVES)} {rng.choice(w.NOUNS)}",
        lambda: f"the {rng.choice(w.NOUNS)} {rng.choice(['behind', 'opposite', 'next to', 'beside'])} the {noun(rng)}",
        lambda: street(rng),
        lambda: f"desk {rng.randint(1, 30)}",
        lambda: f"the {rng.choice(['north', 'south', 'east', 'west', 'left', 'old', 'new'])} wing",
        lambda: f"the {rng.choice(['information', 'reception', 'ticket', 'service', 'main', 'front'])} desk",
        lambda: f"the {noun(rng)}",
    ]
    return rng.choice(options)()


def phone(rng: Rng) -> str:
    """A telephone number."""
    groups = [str(rng.randint(10, 999)) for _ in range(rng.randint(2, 4))]
    return rng.choice(["0", "+4", "+3", ""]) + rng.choice([" ", "-"]).join(groups)


def email(rng: Rng) -> str:
    """An e-mail address."""
    left = rng.choice([pseudo(rng), rng.choice(w.NOUNS), "info", "office", "help", first_name(rng).lower()])
    return f"{left}@{pseudo(rng)}{rng.choice(['', '-' + pseudo(rng, 1)])}.{rng.choice(['org', 'com', 'net', 'ch', 'example'])}"


def url(rng: Rng) -> str:
    """A web address."""
    return f"{rng.choice(['www.', ''])}{pseudo(rng)}.{rng.choice(['org', 'com', 'ch', 'example'])}{rng.choice(['', '/' + rng.choice(w.NOUNS)])}"


def code(rng: Rng) -> str:
    """A code of letters and digits."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 4)))
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
    return rng.choice([letters + digits, letters + "-" + digits, letters.lower() + digits, digits + letters])


def city(rng: Rng) -> str:
    """A town, made up in half of the cases."""
    return rng.choice(w.CITIES) if rng.random() < 0.5 else pseudo(rng, 2).capitalize()


# ranges of code points whose characters stand for themselves, without combining with their neighbours
_SCRIPTS = [
    ((0x4E00, 0x9FA5),),
    ((0x4E00, 0x9FA5),),
    ((0x3041, 0x3093), (0x4E00, 0x9FA5)),
    ((0x30A1, 0x30F6), (0x30A1, 0x30F6), (0x4E00, 0x9FA5)),
    ((0xAC00, 0xD7A3),),
    ((0x0430, 0x044F),),
    ((0x03B1, 0x03C9),),
    ((0x0621, 0x063A), (0x0641, 0x064A)),
    ((0x0905, 0x0939), (0x0E01, 0x0E2E)),
    ((0x1EA0, 0x1EF9), (0x0061, 0x007A), (0x0061, 0x007A)),
    ((0x05D0, 0x05EA),),
    ((0x00DF, 0x00F6), (0x00F8, 0x00FF), (0x0061, 0x007A), (0x0061, 0x007A)),
    ((0x0101, 0x017E), (0x0061, 0x007A)),
]


def foreign(rng: Rng) -> str:
    """A random word or two in the letters of another script."""
    ranges = rng.choice(_SCRIPTS)
    wide = ranges[0][0] > 0x3000

    def word() -> str:
        letters = (
            chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(2, 6) if wide else rng.randint(3, 8))
        )
        return "".join(letters).capitalize()

    roll = rng.random()
    if roll < 0.5:
        return word()
    if roll < 0.75:
        return f"{word()}{' ' if not wide or rng.random() < 0.5 else '・'}{word()}"
    if roll < 0.85:
        return f"{rng.choice([first_name(rng), pseudo(rng).capitalize()])} {word()}"
    return f"{word()} {rng.choice(['Ltd', 'AG', 'GmbH', '有限', '会', last_name(rng)])}"


def region(rng: Rng) -> str:
    """A town with the two letters of its state."""
    return f"{city(rng)}, {rng.choice('ABCDFGHIKLMNOPRSTUVWZ')}{rng.choice('ABCDEFHIKLMNORSTVXYZ')}"


SLOTS: dict[str, Callable[[Rng], str]] = {
    "time": time,
    "price": price,
    "date": date,
    "days": days,
    "n": number,
    "num": lambda rng: str(rng.randint(12, 950)),
    "dur": duration,
    "name": name,
    "first": first_name,
    "last": last_name,
    "place": place,
    "street": street,
    "phone": phone,
    "email": email,
    "url": url,
    "code": code,
    "city": city,
    "noun": noun,
    "adj": adjective,
    "gate": lambda rng: rng.choice("ABCDEF") + str(rng.randint(1, 60)),
    "year": lambda rng: str(rng.randint(1750, 2024)),
    "month": lambda rng: rng.choice(w.MONTHS),
    "day": lambda rng: rng.choice(w.WEEKDAYS),
    "colour": lambda rng: rng.choice(w.COLOURS),
    "unit": lambda rng: rng.choice(w.UNITS),
    "made": lambda rng: pseudo(rng, 2),
    "org": lambda rng: pseudo(rng, 2).capitalize(),
}
