"""A generator of E2E-style data: tables of attributes, sentences that say them, and plain prose around the same words.

`write_sample` makes an E2E-style set of restaurants in the official CSV schema (several references a meaning
representation, no meaning representation in two splits). `general_rows` makes texts about other things - hotels, books,
ships, schools, people, days - to pretrain on, so that a base knows words and tables but not this task.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.common.e2e_data import Row, write_csv

_NAMES = (
    "The Copper Kettle",
    "The Silver Lantern",
    "The Golden Anchor",
    "The Quiet Orchard",
    "The Green Badger",
    "The Crooked Harp",
    "The Little Bridge",
    "The Hidden Acorn",
    "The Blue Heron",
    "The Merry Wagon",
    "The Amber Compass",
    "The Northern Fiddle",
    "The Iron Willow",
    "The Velvet Tower",
    "The Painted Spoon",
    "The Lucky Owl",
    "The Old Bakery",
    "The Red Apron",
    "The White Gate",
    "The Black Pepper",
)
_LANDMARKS = (
    "Central Station",
    "Market Hall",
    "Castle Hill",
    "Victoria Park",
    "City Library",
    "Ferry Pier",
    "Opera House",
    "Saint Martin",
    "Bell Museum",
    "Rose Garden",
)
_PEOPLE = (
    "Anna",
    "Boris",
    "Clara",
    "Daniel",
    "Elif",
    "Farid",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Karin",
    "Liam",
    "Mira",
    "Noah",
    "Olga",
    "Pavel",
    "Rosa",
    "Simon",
    "Tara",
    "Viktor",
)
_TOWNS = (
    "Ashford",
    "Belmont",
    "Carrow",
    "Dunmore",
    "Elmside",
    "Farleigh",
    "Glenmoor",
    "Hartwell",
    "Inverley",
    "Kingsey",
)
_DAYS = (
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
)
_AREAS = ("city centre", "riverside", "old town", "harbour")


@dataclass(frozen=True)
class Attribute:
    """One attribute of a kind of thing.

    A phrase stands before the noun ("a cheap pub"), after it ("a pub near the Heron") or as its own statement ("It is
    cheap."); `{}` is the value. `phrases` is for all values, or a mapping from the value to its phrases.
    """

    key: str
    values: Sequence[str]
    before: Sequence[str] | Mapping[str, Sequence[str]] = ()
    after: Sequence[str] | Mapping[str, Sequence[str]] = ()
    statement: Sequence[str] | Mapping[str, Sequence[str]] = ()

    def phrases(self, place: str, value: str) -> list[str]:
        found = getattr(self, place)
        chosen = found.get(value, ()) if isinstance(found, Mapping) else found
        return [phrase.format(value) for phrase in chosen]


def _yes_no(key: str, yes: str, no: str, after_yes: str, after_no: str) -> Attribute:
    return Attribute(
        key, ("yes", "no"), after={"yes": [after_yes], "no": [after_no]}, statement={"yes": [yes], "no": [no]}
    )


_NEAR = Attribute("near", _LANDMARKS, after=("near {}", "close to {}"), statement=("stands near {}", "is next to {}"))
_AREA = Attribute("area", _AREAS, after=("in the {}", "in the {} area"), statement=("is in the {}",))

_RATINGS = ("low", "average", "high")
_POINTS = ("1 out of 5", "3 out of 5", "5 out of 5")

RESTAURANT = (
    Attribute("eatType", ("restaurant", "pub", "coffee shop")),
    Attribute(
        "food",
        ("Italian", "French", "Greek", "Thai", "Mexican", "Turkish", "Japanese"),
        before=("{}",),
        after=("with {} food", "that serves {} food"),
        statement=("serves {} food", "offers {} dishes"),
    ),
    Attribute(
        "priceRange",
        ("cheap", "moderate", "high"),
        after=("with {} prices", "in the {} price range"),
        statement=("has {} prices", "has a {} price range"),
    ),
    Attribute(
        "customer rating",
        (*_RATINGS, *_POINTS),
        after={
            **{value: ["with a {} customer rating"] for value in _RATINGS},
            **{value: ["with a customer rating of {}", "rated {}"] for value in _POINTS},
        },
        statement={
            **{value: ["has a {} customer rating", "is rated {} by its customers"] for value in _RATINGS},
            **{value: ["has a customer rating of {}", "is rated {} by its customers"] for value in _POINTS},
        },
    ),
    _AREA,
    Attribute(
        "familyFriendly",
        ("yes", "no"),
        before={"yes": ["family friendly"]},
        after={"yes": ["where children are welcome"], "no": ["for adults only"]},
        statement={"yes": ["is family friendly", "welcomes children"], "no": ["is not family friendly"]},
    ),
    _NEAR,
)

# Noun, then attributes: what the general text describes.
_OTHER_THINGS: dict[str, tuple[Attribute, ...]] = {
    "hotel": (
        Attribute("rooms", ("12", "20", "35", "60"), after=("with {} rooms",), statement=("has {} rooms",)),
        Attribute("stars", ("2", "3", "4", "5"), after=("with {} stars",), statement=("has {} stars",)),
        _AREA,
        _yes_no("pool", "has a pool", "has no pool", "with a pool", "without a pool"),
        _NEAR,
    ),
    "museum": (
        Attribute("theme", ("science", "art", "history", "music"), before=("{}",), statement=("is about {}",)),
        Attribute("entry", ("free", "cheap", "expensive"), statement=("is {} to enter",)),
        Attribute("opens", _DAYS, after=("open on {}",), statement=("opens on {}",)),
        _AREA,
        _NEAR,
    ),
    "book": (
        Attribute("author", _PEOPLE, after=("by {}",), statement=("was written by {}",)),
        Attribute("genre", ("crime", "travel", "poetry", "war"), before=("{}",), statement=("is about {}",)),
        Attribute("pages", ("120", "240", "360", "480"), after=("of {} pages",), statement=("has {} pages",)),
        Attribute("rating", ("low", "average", "high"), after=("with a {} rating",), statement=("has a {} rating",)),
    ),
    "ship": (
        Attribute("from", _TOWNS, after=("from {}",), statement=("sails from {}",)),
        Attribute("day", _DAYS, after=("that leaves on {}",), statement=("leaves on {}",)),
        Attribute("price", ("cheap", "moderate", "high"), statement=("has {} prices", "has {} fares")),
        _yes_no("cabins", "has cabins", "has no cabins", "with cabins", "without cabins"),
    ),
    "school": (
        Attribute("town", _TOWNS, after=("in {}",), statement=("is in {}",)),
        Attribute("teaches", ("music", "French", "Italian", "art"), before=("{}",), statement=("teaches {}",)),
        _yes_no("children", "welcomes children", "is for adults", "for children", "for adults only"),
        _NEAR,
    ),
}

_PROSE = (
    "On {day} {person} walked from the {area} to the {area2} and bought bread, tea and a newspaper.",
    "{person} and {person2} had dinner near {landmark}. The food was good but the prices were high.",
    "It rained in {town} on {day}, so the children stayed at home with {person}.",
    "The road from {town} to {town2} is long. {person} takes the train, which is cheap and fast.",
    "{person} asked {person2}: where is {name}? It is in the {area}, said {person2}.",
    "In {town} there is a pub called {name}. {person} has worked there since {day}.",
    "Customers like {name}, and {person} likes the coffee shop near {landmark}.",
    "{person} writes about Greek, Thai and Japanese food. The family of {person2} comes from {town}.",
    "My friends are welcome at {name}, close to {landmark}, on {day}. Families with children come on {day2}.",
    "The rating of {name} was average last year; now it is high, says {person}.",
)


def _fill(attributes: Sequence[Attribute], rng: random.Random, least: int, most: int) -> dict[str, str]:
    """A random table: a name, then `least` to `most` of the attributes in their order."""
    chosen = set(rng.sample(range(len(attributes)), rng.randint(least, min(most, len(attributes)))))
    table = {"name": rng.choice(_NAMES)}
    for place, attribute in enumerate(attributes):
        if place in chosen:
            table[attribute.key] = rng.choice(attribute.values)
    return table


def _as_mr(table: Mapping[str, str]) -> str:
    return ", ".join(f"{key}[{value}]" for key, value in table.items())


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'AEIOUaeiou' else 'a'} {phrase}"


def describe(table: Mapping[str, str], attributes: Sequence[Attribute], noun: str, rng: random.Random) -> str:
    """One or two sentences that say the whole table."""
    name = table["name"]
    before: list[str] = []
    after: list[str] = []
    statements: list[str] = []
    for attribute in rng.sample(attributes, len(attributes)):
        value = table.get(attribute.key)
        if value is None or attribute.key == "eatType":
            continue
        options = [
            (place, phrase) for place in ("before", "after", "statement") for phrase in attribute.phrases(place, value)
        ]
        if len(after) == 2:  # a noun with more behind it is hard to read
            options = [option for option in options if option[0] != "after"] or options
        place, phrase = rng.choice(options)
        {"before": before, "after": after, "statement": statements}[place].append(phrase)
    thing = _article(" ".join([*before, table.get("eatType", noun)]))
    detail = "".join(f" {phrase}" for phrase in after)
    openings = ["{name} is {thing}{detail}.", "There is {thing} called {name}{detail}."]
    if detail:
        openings.append("{name}: {thing}{detail}.")
    opening = rng.choice(openings)
    sentences = [opening.format(name=name, thing=thing, detail=detail)]
    for start, subject in zip(range(0, len(statements), 2), ("It", "It also", "And it"), strict=False):
        sentences.append(f"{subject} {' and '.join(statements[start : start + 2])}.")
    return " ".join(sentences)


def write_sample(
    folder: Path, train_mrs: int = 400, dev_mrs: int = 40, test_mrs: int = 60, references: int = 4, seed: int = 1
) -> Path:
    """Write `train.csv`, `dev.csv` and `test.csv`; up to `references` different texts a meaning representation."""
    rng = random.Random(seed)
    tables: dict[str, dict[str, str]] = {}
    while len(tables) < train_mrs + dev_mrs + test_mrs:
        table = _fill(RESTAURANT, rng, 3, 6)
        tables.setdefault(_as_mr(table), table)
    mrs = iter(tables)
    for split, count in (("train", train_mrs), ("dev", dev_mrs), ("test", test_mrs)):
        rows = []
        for mr in (next(mrs) for _ in range(count)):
            texts = dict.fromkeys(describe(tables[mr], RESTAURANT, "place", rng) for _ in range(references))
            rows += [Row(mr, reference) for reference in texts]
        write_csv(folder / f"{split}.csv", rows)
    return folder


def general_rows(count: int, seed: int = 1) -> list[Row]:
    """Texts to pretrain on: half of them a table of some other thing with its description, half prose with no table."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        if rng.random() < 0.5:
            noun = rng.choice(list(_OTHER_THINGS))
            attributes = _OTHER_THINGS[noun]
            table = _fill(attributes, rng, 2, 4)
            rows.append(Row(_as_mr(table), describe(table, attributes, noun, rng)))
        else:
            words = {
                "name": rng.choice(_NAMES),
                "landmark": rng.choice(_LANDMARKS),
                **dict(zip(("person", "person2"), rng.sample(_PEOPLE, 2), strict=True)),
                **dict(zip(("area", "area2"), rng.sample(_AREAS, 2), strict=True)),
                **dict(zip(("town", "town2"), rng.sample(_TOWNS, 2), strict=True)),
                **dict(zip(("day", "day2"), rng.sample(_DAYS, 2), strict=True)),
            }
            rows.append(Row("", " ".join(template.format(**words) for template in rng.sample(_PROSE, 2))))
    return rows
