"""A small world in self-made English: the text that the demo's base model learns to read from.

People have things, at a place, on a day. Short stories tell such facts and tell them again in other words, as answers, notes and
quotations, so a model learns grammar, and to find and copy what was said. Everything follows from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

NAMES = (
    "Ada", "Anton", "Bela", "Boris", "Carla", "Dario", "Dora", "Emil", "Enzo", "Farah", "Felix", "Greta", "Hana", "Hugo", "Ida",
    "Igor", "Jonas", "Julia", "Karim", "Lara", "Leo", "Mara", "Milo", "Nora", "Omar", "Paula", "Rosa", "Samir", "Tara", "Theo",
    "Vera", "Yara",
)  # fmt: skip
ITEMS = {  # one: many
    "apple": "apples", "ball": "balls", "basket": "baskets", "bell": "bells", "blanket": "blankets", "boat": "boats",
    "book": "books", "bottle": "bottles", "bowl": "bowls", "box": "boxes", "brush": "brushes", "button": "buttons",
    "candle": "candles", "chair": "chairs", "coat": "coats", "cup": "cups", "drum": "drums", "flag": "flags",
    "glove": "gloves", "hat": "hats", "jar": "jars", "kite": "kites", "knife": "knives", "ladder": "ladders",
    "lamp": "lamps", "leaf": "leaves", "letter": "letters", "mug": "mugs", "pear": "pears", "pencil": "pencils",
    "plate": "plates", "ribbon": "ribbons", "ring": "rings", "rope": "ropes", "rose": "roses", "scarf": "scarves",
    "shoe": "shoes", "stone": "stones", "ticket": "tickets", "wheel": "wheels",
}  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "pink", "purple", "orange", "golden")
NUMBERS = {  # number: word
    1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six",
    7: "seven", 8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve",
}  # fmt: skip
PLACES = {  # place: how one is there
    "attic": "in", "bakery": "at", "barn": "in", "beach": "on", "bridge": "on", "cellar": "in", "farm": "on", "forest": "in",
    "garden": "in", "harbour": "at", "kitchen": "in", "library": "in", "market": "at", "meadow": "in", "mill": "at",
    "museum": "in", "park": "in", "river": "by", "school": "at", "station": "at", "tower": "in", "workshop": "in",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEATHER = ("sunny", "rainy", "windy", "cloudy", "cold", "warm", "foggy", "stormy", "snowy", "bright")
FEELINGS = ("happy", "tired", "hungry", "proud", "busy", "calm", "glad", "sleepy", "curious", "quiet")
WAYS = ("slowly", "quickly", "quietly", "happily", "carefully", "early", "late", "alone", "together", "again")

EVENTS = (  # how a fact is told first
    "{who} has {things}.",
    "{who} had {things} {there}.",
    "{who} bought {things} {there} {then}.",
    "{then} {who} found {things} {there}.",
    "{who} found {things} {there}.",
    "{there} {who} saw {things}.",
    "{who} carried {things} home from the {place}.",
    "{who} made {things} {then}.",
    "{then} {who} painted {things}.",
    "{who} lost {things} {there} {then}.",
    "{who} went to the {place} with {things}.",
    "{who} took {things} to the {place} {then}.",
    "{who} got {things} from {other}.",
    "{other} gave {who} {things} {then}.",
    "{other} met {who}, who had {things}.",
    "There are {things} {there}, and they belong to {who}.",
    "{who} sold {things} to {other} {there}.",
    "{other} knows that {who} keeps {things} {there}.",
    "{then} {who} and {other} were {there}, and {who} brought {things}.",
    "{who} counted {things} {there} {then}.",
    "{who} needs {things} for {then_bare}.",
    "{who} sent {things} to the {place} {then}.",
    "{who} wanted {things}, and {other} wanted none.",
    "{who} borrowed {things} from {other} {then}.",
    "{who} cleaned {things} {there} {then}.",
    "{then} {who} packed {things} and hid the box {there}.",
    "It was {weather}, and {who} showed {other} {things} {there}.",
    "{things} were sold by {who} {there}.",
    "{things} are what {who} found {then}.",
    "{things}: {who} brought so many.",
    "{other} was there, and {who} made {things}.",
)
AGAIN = (  # how it is told again
    "{who} still has {things}.",
    "So {who} has {things}.",
    "The {many} of {who} are {colour}.",
    "{who} showed {other} the {many}.",
    "{who} put the {colour} {many} down {there}.",
    "{who} thinks of the {number} {many}.",
    "{who} was {there} {then}.",
    "It was {who} who had {things}.",
    "{who} is proud of the {colour} {many}.",
    "{other} asked {who} for the {many}.",
    "The {many} are {there}.",
    "There were {things}, and {who} had them.",
)
FILLERS = (
    "The day was {weather}.",
    "It was a {weather} day.",
    "{other} was {feeling}.",
    "{who} felt {feeling}.",
    "{other} came home {way}.",
    "{who} walked {way} to the {place}.",
    "The {place} was full of people.",
    "Then it was {weather} and they went home {way}.",
    "{who} and {other} are friends.",
    "{who} sang a song, and {other} sang {way}.",
    "Nobody was {there}.",
)
TALK = (
    '"What do you have?" asked {other}. "{Things}," said {who}.',
    '"Where were you?" asked {other}. "{There}," said {who}.',
    '"When was that?" asked {other}. "{Then}," said {who}.',
    '"Who has the {many}?" asked {other}. "{who}," said the others.',
    '"How many {many}?" asked {other}. "{Number}," said {who}.',
    '"What colour are they?" asked {other}. "{Colour}," said {who}.',
    '{other} read the label: "{item}".',
    '{who} wrote "{place}" on a card and "{colour}" on the other side.',
    'The box said "{count} {many}" and "{who}".',
    'The sign said "{place}", and the list said "{day}".',
)
QUESTIONS = (
    ("Who has the {many}?", "who"),
    ("Who is it about?", "who"),
    ("How many are there?", "number"),
    ("How many {many}?", "number"),
    ("What colour are they?", "colour"),
    ("What are they?", "many"),
    ("Where was it?", "place"),
    ("On which day?", "day"),
)
NOTES = (  # what a note calls a value, and the value
    (("who", "name", "person"), "who"),
    (("count", "number", "how many"), "count"),
    (("colour",), "colour"),
    (("item", "thing", "what"), "item"),
    (("place", "where"), "place"),
    (("day", "when"), "day"),
)
NOTE_STYLES = (
    ("{key}: {value}", "\n"),
    ("{key}: {value}", ", "),
    ("{key}: {value}", "; "),
    ('{key}: "{value}"', "\n"),
    ('{key}: "{value}"', ", "),
    ('the {key} is "{value}"', ", "),
    ('"{value}" is the {key}', " and "),
    ("{key} = {value}", "\n"),
    ('"{value}"', ", "),
    ("({value})", " "),
)
ROLL_STYLES = (("{}", ", "), ('"{}"', ", "), ("{}", " and "), ('"{}"', " and "), ("the {}", ", "), ("({})", " "))
ECHO_STYLES = (
    "{word}, {word}.",
    "{word}: {word}",
    '{word}: "{word}"',
    '"{word}": "{word}"',
    '"{word}" is {word}',
    'The word {word} is written "{word}".',
    "After {word} comes {word} again.",
    "The word is {word}; yes, {word}.",
)
BRIEF_FORMS = (  # a short fact, and what can be asked about it
    ("{who} has {things}.", ("who", "count", "colour", "item")),
    ("{who} has the {colour} {many}.", ("who", "colour", "item")),
    ("{who} is {there}.", ("who", "place")),
    ("{who} came {then}.", ("who", "day")),
    ("{who} came to the {place} {then}.", ("who", "place", "day")),
    ("{then} {who} had {things}.", ("who", "count", "colour", "item", "day")),
    ("{there} there are {things}.", ("count", "colour", "item", "place")),
    ("{things} belong to {who}.", ("who", "count", "colour", "item")),
    ("{things}, said {who}.", ("who", "count", "colour", "item")),
)
BRIEF_STYLES = ("{key}: {value}", '{key}: "{value}"', '"{key}": "{value}"', 'The {key} is "{value}".', "The {key} is {value}.")
COLOURLESS = 0.25
"""Share of facts told in notes, or as examples of the task, that have no colour."""
EVERYTHING = (*NAMES, *DAYS, *COLOURS, *PLACES, *ITEMS, *ITEMS.values(), *NUMBERS.values())


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Somebody has some things, somewhere, on some day. `colour` may be unknown."""

    who: str
    count: int
    colour: str | None
    item: str
    place: str
    day: str

    def things(self, *, digits: bool = False) -> str:
        """`three red apples`, `3 red apples`, `an orange kite`."""
        words = f"{self.colour} {self.noun}" if self.colour else self.noun
        if self.count == 1 and not digits:
            return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        return f"{self.count if digits else NUMBERS[self.count]} {words}"

    @property
    def noun(self) -> str:
        """The item in the number of the count."""
        return self.item if self.count == 1 else ITEMS[self.item]

    @property
    def there(self) -> str:
        """`at the market`."""
        return f"{PLACES[self.place]} the {self.place}"


def draw(rng: Random, *, least: int = 2) -> Fact:
    """A fact by chance, of at least `least` things."""
    return Fact(
        who=rng.choice(NAMES),
        count=rng.randint(least, max(NUMBERS)),
        colour=rng.choice(COLOURS),
        item=rng.choice(list(ITEMS)),
        place=rng.choice(list(PLACES)),
        day=rng.choice(DAYS),
    )


def documents(count: int, seed: int) -> Iterator[str]:
    """`count` short documents, the same ones for the same seed."""
    rng = Random(seed)
    kinds: tuple[Callable[[Random], str], ...] = (
        _echo,
        _echo,
        _echo,
        _brief,
        _brief,
        _brief,
        _note,
        _note,
        _note,
        _questions,
        _roll,
        _story,
        _talk,
        _pairs,
    )
    for _ in range(count):
        yield rng.choice(kinds)(rng)


def capitalised(sentence: str) -> str:
    """The sentence with a large first letter, the rest as it is."""
    return sentence[:1].upper() + sentence[1:]


def _words(rng: Random, fact: Fact, other: str) -> dict[str, str]:
    """Everything a template may name."""
    digits = rng.random() < 0.25
    number = str(fact.count) if digits else NUMBERS[fact.count]
    words = {
        "who": fact.who, "other": other, "things": fact.things(digits=digits), "number": number, "count": str(fact.count),
        "colour": str(fact.colour), "item": fact.item, "many": ITEMS[fact.item], "place": fact.place, "there": fact.there,
        "day": fact.day, "then": f"on {fact.day}", "then_bare": fact.day, "weather": rng.choice(WEATHER),
        "feeling": rng.choice(FEELINGS), "way": rng.choice(WAYS),
    }  # fmt: skip
    return words | {capitalised(key): capitalised(words[key]) for key in ("things", "there", "then", "number", "colour")}


def _tell(rng: Random, templates: tuple[str, ...], fact: Fact, other: str) -> str:
    return capitalised(rng.choice(templates).format_map(_words(rng, fact, other)))


def _cast(rng: Random, size: int) -> tuple[list[Fact], str]:
    """`size` facts about different people with different things, and one more person."""
    names, items = rng.sample(NAMES, size + 1), rng.sample(list(ITEMS), size)
    drawn = (draw(rng) for _ in range(size))
    facts = [replace(fact, who=who, item=item) for fact, who, item in zip(drawn, names, items, strict=False)]
    return facts, names[-1]


def _told(rng: Random, facts: list[Fact], other: str) -> list[str]:
    """Every fact once, with fillers between."""
    sentences = []
    for fact in facts:
        sentences.append(_tell(rng, EVENTS, fact, other))
        if rng.random() < 0.3:
            sentences.append(_tell(rng, FILLERS, fact, other))
    return sentences


def _story(rng: Random) -> str:
    """Facts told, and told again in another order."""
    facts, other = _cast(rng, rng.randint(1, 3))
    sentences = _told(rng, facts, other)
    for fact in rng.sample(facts, len(facts)):
        sentences += [_tell(rng, AGAIN, fact, other) for _ in range(rng.randint(1, 2))]
    return " ".join(sentences)


def _talk(rng: Random) -> str:
    """Facts told, then talked about."""
    facts, other = _cast(rng, rng.randint(1, 2))
    sentences = _told(rng, facts, other)
    for fact in rng.sample(facts, len(facts)):
        sentences += [_tell(rng, TALK, fact, other) for _ in range(2)]
    return " ".join(sentences)


def _questions(rng: Random) -> str:
    """A fact told in full, then asked for."""
    facts, other = _cast(rng, 1)
    words = _words(rng, facts[0], other)
    lines = [_in_full(rng, facts[0], other)]
    for question, answer in rng.sample(QUESTIONS, 4):
        lines.append(f"{question.format_map(words)} {capitalised(words[answer])}.")
    return "\n".join(lines)


def _note(rng: Random) -> str:
    """A fact told in full, then noted: some of its values in some order, in one style."""
    (fact,), other = _cast(rng, 1)
    if rng.random() < COLOURLESS:
        fact = replace(fact, colour=None)
    words = _words(rng, fact, other)
    style, between = rng.choice(NOTE_STYLES)
    known = [note for note in NOTES if note[1] != "colour" or fact.colour]
    noted = rng.sample(known, rng.randint(3, len(known)))
    if rng.random() < 0.5:
        noted.sort(key=NOTES.index)
    note = between.join(style.format(key=rng.choice(keys), value=words[value]) for keys, value in noted)
    return f"{_in_full(rng, fact, other)}\n{note}"


def _in_full(rng: Random, fact: Fact, other: str) -> str:
    """One sentence or two that hold everything."""
    first = rng.choice(EVENTS)
    place_is_told = "{there}" in first or "{place}" in first
    missing = [part for part, told in (("{there}", place_is_told), ("{then}", "{then" in first)) if not told]
    sentence = f"{first} It was {' '.join(missing)}." if missing else first
    return capitalised(sentence.format_map(_words(rng, fact, other)))


def _echo(rng: Random) -> str:
    """Words said twice at once: the first step towards copying."""
    style = rng.choice(ECHO_STYLES)
    return "\n".join(style.format(word=word) for word in rng.sample(EVERYTHING, rng.randint(5, 9)))


def _brief(rng: Random) -> str:
    """A few short facts, each with one question about it: the second step."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        words = _words(rng, draw(rng), rng.choice(NAMES))
        form, askable = rng.choice(BRIEF_FORMS)
        asked = rng.choice(askable)
        keys = next(keys for keys, value in NOTES if value == asked)
        style = rng.choice(BRIEF_STYLES)
        lines.append(f"{capitalised(form.format_map(words))} {style.format(key=rng.choice(keys), value=words[asked])}")
    return "\n".join(lines)


def _roll(rng: Random) -> str:
    """A list of all kinds of words, said again and again: to go on, one looks up what came next the last time."""
    chosen = rng.sample(EVERYTHING, rng.randint(3, 8))
    styles = rng.sample(ROLL_STYLES, 2)
    first, second = (between.join(style.format(word) for word in chosen) for style, between in styles)
    return f"The list: {first}.\nAgain: {first}.\nOnce more: {second}."


def _pairs(rng: Random) -> str:
    """One and many, numbers and figures, opposite each other."""
    lines = []
    for _ in range(rng.randint(4, 7)):
        fact = draw(rng)
        lines.append(
            rng.choice(
                (
                    f"One {fact.item}, {NUMBERS[fact.count]} {fact.noun}.",
                    f"{capitalised(NUMBERS[fact.count])} is {fact.count}.",
                    f'"{fact.noun}" is the word for many, "{fact.item}" for one.',
                    f"{fact.count} {fact.noun} are {NUMBERS[fact.count]} {fact.noun}.",
                    f'{capitalised(fact.things())}: "{fact.count}", "{fact.colour}", "{fact.item}".',
                )
            )
        )
    return "\n".join(lines)
