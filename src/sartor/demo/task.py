"""The demo's task: a sentence in, its facts out as JSON. There is one right answer, so a result is right or wrong.

    On Monday Ada bought three red apples at the market.
    {"who":"Ada","count":3,"colour":"red","item":"apple","place":"market","day":"Monday"}

What the sentence does not say is left out of the answer. Every tenth pair of a person and an item is set aside: unseen examples
are made of these pairs only and training examples of the others, so no example can be in both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

from sartor.demo.world import COLOURLESS, ITEMS, NAMES, WEATHER, Fact, capitalised, draw

FORMS = (  # {there}, {place} and {then}, {day} tell the place and the day; {other} is somebody who does not count
    "{who} {verb} {things}.",
    "{who} {verb} {things} {there}.",
    "{who} {verb} {things} {then}.",
    "{who} {verb} {things} {there} {then}.",
    "{who} {verb} {things} {then} {there}.",
    "{then} {who} {verb} {things} {there}.",
    "{then} {who} {verb} {things}.",
    "{there} {who} {verb} {things}.",
    "{there}, {who} {verb} {things} {then}.",
    "Last {day} {who} {verb} {things}.",
    "It was {weather} when {who} {verb} {things} {there}.",
    "It was {who} who {verb} {things} {then}.",
    "It was {day}, and {who} {verb} {things} {there}.",
    "{other} saw that {who} {verb} {things}.",
    "{other} says that {who} {verb} {things} {there}.",
    "{other} met {who}, who {verb} {things} {then}.",
    "{who} and not {other} {verb} {things} {there}.",
    "{who} {verb} {things}, and {other} watched.",
    "{who} {verb} {things} for {other} {there} {then}.",
    "Without {other}, {who} {verb} {things} {then}.",
    "The {place} was quiet when {who} {verb} {things}.",
    "{who} went to the {place} {then} and {verb} {things}.",
    "On a {weather} {day} {who} {verb} {things} {there}.",
    "Everybody knows of {things} that {who} {verb} {there}.",
)
VERBS = (
    "bought", "found", "lost", "brought", "sold", "painted", "carried", "cleaned", "packed", "borrowed", "wanted",
    "counted", "hid", "made", "took", "showed",
)  # fmt: skip
PLACE_SLOTS, DAY_SLOTS = ("{there}", "{place}"), ("{then}", "{day}")


def examples(count: int, seed: int, *, unseen: bool = False) -> list[dict[str, Any]]:
    """`count` different examples as chat messages, the same ones for the same seed; from the pairs set aside where `unseen`."""
    made: dict[str, dict[str, Any]] = {}
    for fact, sentence, answer in _drawn(Random(seed)):
        if set_aside(fact) == unseen:
            made.setdefault(sentence, {"messages": [_message("user", sentence), _message("assistant", answer)]})
        if len(made) >= count:
            break
    return list(made.values())


def set_aside(fact: Fact) -> bool:
    """Whether this person with this item is kept from training."""
    return (NAMES.index(fact.who) + 3 * list(ITEMS).index(fact.item)) % 10 == 0


def answer_of(fact: Fact) -> str:
    """The facts as compact JSON, keys in this order; an empty colour, place or day is left out."""
    keys = ("who", "count", "colour", "item", "place", "day")
    return json.dumps({key: getattr(fact, key) for key in keys if getattr(fact, key)}, separators=(",", ":"))


def _drawn(rng: Random) -> Iterator[tuple[Fact, str, str]]:
    """Facts with their sentence and answer, without end."""
    while True:
        fact, form = draw(rng, least=1), rng.choice(FORMS)
        if rng.random() < COLOURLESS:
            fact = replace(fact, colour=None)
        slots = {
            "who": fact.who, "other": rng.choice([name for name in NAMES if name != fact.who]), "verb": rng.choice(VERBS),
            "things": fact.things(digits=rng.random() < 0.3), "there": fact.there, "place": fact.place,
            "then": f"on {fact.day}", "day": fact.day, "weather": rng.choice(WEATHER),
        }  # fmt: skip
        told = replace(
            fact,
            place=fact.place if any(slot in form for slot in PLACE_SLOTS) else "",
            day=fact.day if any(slot in form for slot in DAY_SLOTS) else "",
        )
        yield fact, capitalised(form.format_map(slots)), answer_of(told)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
