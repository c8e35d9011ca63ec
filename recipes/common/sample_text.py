# ruff: noqa: SIM905 (word lists are easier to read as one text)
"""About 1 MB of simple English prose, made by a program: the text of a first look, with nothing to download.

`sample` in `train_files` (pretraining) and `text` (the LSTM) means this text. It is short stories of four to seven
sentences from a small grammar, the same on every machine: what one character wants, where it goes, whom it meets.
A model learns its spelling and its turns of phrase; losses on it compare with nothing else.
"""

import random
from pathlib import Path

from recipes.common.files import write_text
from recipes.common.smollm2 import cache_folder

NAME = "sample"
STORIES = 4000

_NAMES = (
    "Ada Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Mary Noah Olive Peter Rose Sam Tom Vera".split()
)
_ROLES = "baker farmer sailor teacher doctor painter gardener miller tailor carpenter fisher cook".split()
_PLACES = (
    "the market, the river, the old mill, the harbour, the forest, the school, the garden, the bridge, the village, "
    "the hill, the library, the station"
).split(", ")
_THINGS = "lamp basket coat boat letter key clock kettle ladder map book bell violin blanket rope chair".split()
_ADJECTIVES = "small old red blue heavy broken new quiet warm green wooden bright plain strange".split()
_WEATHER = (
    "It rained all morning. | The sun was warm. | A cold wind came from the sea. | Snow lay on the roofs. | "
    "There was fog over the fields. | The evening was clear. | "
).split("| ")
_TIMES = (
    "On Monday, In the morning, One evening, After lunch, Last winter, In spring, Late at night, Before breakfast"
).split(", ")
_FEELINGS = "happy tired glad sorry proud calm surprised hungry".split()
_WANTS = (
    "wanted to sell {a} | looked for {a} | had to mend {a} | carried {a} home | hoped to find {a} | "
    "promised to bring {a} | dreamed of {a} | had lost {a}"
).split(" | ")
_MEETINGS = (
    "At {place} {she} met {other}, {role}. | {other}, {role}, was there before {her}. | "
    "{She} asked {other}, {role}, for help. | On the way to {place} {she} saw {other}, {role}."
).split(" | ")
_TALK = (
    '"I have seen it near {place}," said {other}. | "Come with me to {place}," said {other}. | '
    '"It is too {adjective} for me," said {other}. | "You may take mine," said {other}. | '
    '"Wait until tomorrow," said {other}, "then we go to {place}."'
).split(" | ")
_DEEDS = (
    "They went to {place} together and looked behind every door. | {other} gave {her} {b} instead. | "
    "They sat down and ate bread and cheese. | {She} walked back to {place} and thought about it. | "
    "{other} laughed, and then {she} laughed too. | They counted the coins: there were {number} of them."
).split(" | ")
_ENDS = (
    "In the end {name} was {feeling}. | That night {name} slept well. | So {name} went home, {feeling} and slow. | "
    "Since then {name} and {other} are friends. | Nobody in {place} has forgotten it."
).split(" | ")
_NUMBERS = "three four five seven nine twelve twenty".split()


class _Chooser:
    """Choices that depend on nothing but `random()`, which Python keeps the same from version to version."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def one(self, words: list[str]) -> str:
        return words[int(self.random() * len(words))]

    def thing(self) -> str:
        adjective = self.one(_ADJECTIVES)
        return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {self.one(_THINGS)}"


def _story(choose: _Chooser) -> str:
    name, other = choose.one(_NAMES), choose.one(_NAMES)
    while other == name:
        other = choose.one(_NAMES)
    women = "Ada Clara Emma Grace Iris Karen Mary Olive Rose Vera".split()
    she, her = ("she", "her") if name in women else ("he", "him")
    a = choose.thing()

    def fill(template: str) -> str:
        return template.format(
            name=name,
            other=other,
            she=she,
            She=she.capitalize(),
            her=her,
            a=a,
            b=choose.thing(),
            place=choose.one(_PLACES),
            role=f"the {choose.one(_ROLES)}",
            adjective=choose.one(_ADJECTIVES),
            feeling=choose.one(_FEELINGS),
            number=choose.one(_NUMBERS),
        )

    sentences = [f"{choose.one(_TIMES)} {name} {fill(choose.one(_WANTS))}.", choose.one(_WEATHER).strip()]
    sentences += [fill(choose.one(_MEETINGS)), fill(choose.one(_TALK))]
    sentences += [fill(choose.one(_DEEDS)) for _ in range(1 + int(choose.random() * 2))]
    sentences.append(fill(choose.one(_ENDS)))
    return " ".join(filter(None, sentences))


def sample_text(stories: int = STORIES, seed: int = 0) -> str:
    """The stories, an empty line after each."""
    choose = _Chooser(seed)
    return "\n\n".join(_story(choose) for _ in range(stories)) + "\n"


def sample_file() -> Path:
    """The file of the text in the cache folder (`HF_SAI_CACHE`), made at the first call."""
    path = cache_folder() / "sample_text.txt"
    return path if path.is_file() else write_text(path, sample_text())
