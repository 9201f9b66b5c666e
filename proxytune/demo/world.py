"""The synthetic world: people with a home, a job and a favourite food, a pure function of a seed.

The four groups of people differ only in where *questions* about them may occur; statements about all of them are in the
pre-training documents. So the base knows the facts, and tuning teaches to answer the questions.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

Attribute = Literal["city", "job", "food"]
Group = Literal["pretraining", "tuning", "validation", "test"]

ATTRIBUTES: tuple[Attribute, ...] = ("city", "job", "food")

QUESTIONS: dict[Attribute, tuple[str, ...]] = {
    "city": ("Where does {name} live?", "What is the home of {name}?"),
    "job": ("What is the job of {name}?", "What does {name} work as?"),
    "food": ("What does {name} like to eat?", "What is the favourite food of {name}?"),
}

STATEMENTS: dict[Attribute, tuple[str, ...]] = {
    "city": ("{name} lives in {value}.", "The home of {name} is {value}."),
    "job": ("{name} works as a {value}.", "The job of {name} is {value}."),
    "food": ("{name} likes to eat {value}.", "The favourite food of {name} is {value}."),
}

_JOB_WORDS = """
baker miner pilot nurse tailor farmer sailor painter lawyer judge singer dancer writer teacher doctor smith mason weaver
hunter fisher miller cook guard clerk banker printer porter barber butcher potter roofer welder driver jockey actor poet
monk scout chemist grocer
"""
_FOOD_WORDS = """
plums figs dates beans bread cheese olives onions apples pears grapes lemons rice soup honey nuts eggs fish crabs shrimp
noodles corn beets kale peas leeks yams melons berries cherries mangos papayas garlic ginger mint basil tofu butter
waffles pancakes
"""
JOBS = tuple(_JOB_WORDS.split())
FOODS = tuple(_FOOD_WORDS.split())

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


def stable_hash(text: str) -> int:
    """The first 8 bytes of SHA-256 as an unsigned integer; Python's own `hash` differs between processes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Person:
    """One inhabitant.

    `group` says where questions about the person may occur: in `pretraining` threads, in the `tuning` set, or in no
    training text (`validation`, `test`).
    """

    name: str
    city: str
    job: str
    food: str
    group: Group

    def value(self, attribute: Attribute) -> str:
        """An attribute's value, as written in statements and answers."""
        return {"city": self.city, "job": self.job, "food": self.food}[attribute]


@dataclass(frozen=True)
class World:
    """All inhabitants, in a fixed order, and the names and cities that occur."""

    people: tuple[Person, ...]
    names: tuple[str, ...]
    cities: tuple[str, ...]

    def group(self, group: Group) -> tuple[Person, ...]:
        """The people of one group, in the order of `people`."""
        return tuple(person for person in self.people if person.group == group)


def build_world(seed: int = 1, population: int = 300) -> World:
    """Draw the world, the same on every machine. The shipped weights belong to the default seed.

    `population` is at most 1024 (32 first times 32 last names).
    """
    names_rng = random.Random(7)
    first_names = _invent_words(names_rng, 32, "cvcv")
    last_names = _invent_words(names_rng, 32, "cvcvc")
    cities = _invent_words(names_rng, 40, "vccvcv")
    rng = random.Random(seed)
    full_names = [f"{first} {last}" for first in first_names for last in last_names]
    rng.shuffle(full_names)
    people = tuple(
        Person(name, city=rng.choice(cities), job=rng.choice(JOBS), food=rng.choice(FOODS), group=_group_of(name))
        for name in full_names[:population]
    )
    return World(people=people, names=tuple(first_names + last_names), cities=tuple(cities))


def _group_of(name: str) -> Group:
    """Half of the people in pre-training questions, a tenth in tuning, a fifth each in validation and test."""
    bucket = stable_hash(f"person:{name}") % 10
    if bucket < 5:
        return "pretraining"
    if bucket < 6:
        return "tuning"
    return "validation" if bucket < 8 else "test"


def _invent_words(rng: random.Random, count: int, pattern: str) -> list[str]:
    """Distinct pronounceable words; in `pattern`, `c` is a consonant and `v` a vowel."""
    words: list[str] = []
    while len(words) < count:
        word = "".join(rng.choice(_CONSONANTS if kind == "c" else _VOWELS) for kind in pattern).capitalize()
        if word not in words:
            words.append(word)
    return words
