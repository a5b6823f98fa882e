"""What the reports of datasets/triage say: the fault, its extent, its effect, and the severity that follows.

A report is a `Combination` put into words: what is broken (a fault of triage_faults.toml), how far it reaches
(`extent`), and who writes (`voice`, see triage_voices.py). Whatever the voice, a report states three things: the
fault, its extent, and what it does to people (the fault's kind). The rest (times, versions, names, small talk,
other components that are fine) is there to be read past.
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

SEVERITIES = ("low", "medium", "high", "critical")
EXTENTS = ("one", "some", "all")
SEVERITY = {"looks": "low", "detour": "medium", "blocked": "high", "loss": "critical"}
"""The rule: severity by the fault's kind, which the report states as its effect. The extent does not count."""


@dataclass(frozen=True)
class Component:
    """A part of the shop system, the team behind it and the people it serves; see triage_faults.toml."""

    name: str
    team: str
    one: str
    many: str
    me: str
    alias: str


@dataclass(frozen=True)
class Fault:
    """One thing that can go wrong; the fields are described in triage_faults.toml."""

    component: Component
    name: str
    kind: str
    tag: str
    said: tuple[str, ...]
    sum: str
    fix: str
    way: str = ""
    lost: str = ""


@dataclass(frozen=True)
class Combination:
    """What a report says and in whose voice: the key by which held-out reports differ from trained ones."""

    fault: Fault
    extent: str
    voice: str

    @property
    def severity(self) -> str:
        return SEVERITY[self.fault.kind]


def load_faults() -> list[Fault]:
    """The catalogue, in the order of its file."""
    catalogue = tomllib.loads(Path(__file__).with_name("triage_faults.toml").read_text(encoding="utf-8"))
    faults = []
    for name, entry in catalogue.items():
        component = Component(name, **{key: value for key, value in entry.items() if key != "fault"})
        faults += [Fault(component, **{**fault, "said": tuple(fault["said"])}) for fault in entry["fault"]]
    return faults


NAMES = ["Amir", "Bea", "Chloe", "Dana", "Felix", "Hana", "Ines", "Jonas", "Kofi", "Nora", "Omar", "Ruth", "Tom"]

REACH = {
    "plain": {
        "one": [
            "it affects only one {one}",
            "just one {one} has it, the others are fine",
            "a single {one} is affected",
            "so far it is one {one} only",
            "only a single {one} has reported it",
            "one {one} has this, nobody else",
        ],
        "some": [
            "it affects some {many}, others are fine",
            "several {many} are affected, the rest are not",
            "a group of {many} has it, but not everyone",
            "about a dozen {many} are affected",
            "some {many} have it and some do not",
            "a handful of {many} are affected, most are fine",
        ],
        "all": [
            "all {many} are affected",
            "it hits every {one}",
            "every {one} has it, without exception",
            "all our {many} have this",
            "everyone is affected, all {many}",
            "it is the same for all {many}",
        ],
    },
    "mine": {
        "one": [
            "it seems to be {me}, the others are fine",
            "as far as I know it is {me}",
            "I asked around and it is {me}",
            "it looks like {me} so far",
        ],
        "some": [
            "several {many} I know have it too, others do not",
            "some {many} have told me the same, but not everyone",
            "I know of some {many} with the same trouble",
            "a handful of {many} in our group have it too, most do not",
        ],
        "all": [
            "your status page says that all {many} are affected",
            "every {one} I have asked has the same",
            "I read that all {many} have this",
            "in the forum they say it hits every {one}",
        ],
    },
    "terse": {
        "one": ["one {one} only", "just one {one}", "a single {one}", "only one {one}"],
        "some": [
            "some {many}",
            "several {many}",
            "a group of {many}",
            "some {many}, not everyone",
            "a handful of {many}",
        ],
        "all": ["all {many}", "every {one}", "everyone, all {many}", "each and every {one}"],
    },
}
"""How far it reaches, by style and extent."""

EFFECT = {
    "plain": {
        "looks": [
            "it is purely cosmetic",
            "it is cosmetic, the rest works",
            "it is a cosmetic glitch and work goes on as usual",
            "it looks ugly but is harmless, cosmetic",
            "it looks bad, which is cosmetic",
        ],
        "detour": [
            "there is a workaround: {way}",
            "luckily {way}, so there is a way around it",
            "as a workaround, {way}",
            "people get by because {way}",
            "for now {way}, which is a fair workaround",
        ],
        "blocked": [
            "work is blocked by it",
            "it blocks all work, nothing we tried helps",
            "people are blocked and cannot go on",
            "it is a dead end and work is blocked",
            "that means blocked, with no way on",
        ],
        "money": [
            "real money is being lost",
            "money is gone because of this",
            "this is costing people real money",
            "money has been lost already",
        ],
        "data": [
            "the data is lost",
            "this is real data loss",
            "the data is gone and cannot be brought back by hand",
            "data has been lost already",
        ],
        "leak": [
            "private data is exposed",
            "this is a data leak",
            "strangers get to see private data",
            "private data has leaked already",
        ],
    },
    "terse": {
        "looks": ["cosmetic only", "purely cosmetic", "cosmetic, all works", "harmless, cosmetic"],
        "detour": ["workaround: {way}", "has a workaround, {way}", "can be worked around, {way}"],
        "blocked": ["blocked", "work is blocked", "blocked, nothing helps", "dead end, blocked"],
        "money": ["money is being lost", "losing real money", "money lost"],
        "data": ["data lost", "data loss confirmed", "the data is gone"],
        "leak": ["private data exposed", "data leak", "private data visible to strangers"],
    },
    "field": {
        "looks": ["impact=cosmetic", "effect=cosmetic"],
        "detour": ["workaround=yes ({way})"],
        "blocked": ["impact=blocked", "work=blocked"],
        "money": ["money_loss=yes", "impact=money_lost"],
        "data": ["data_loss=yes", "impact=data_lost"],
        "leak": ["data_leak=yes", "impact=private_data_exposed"],
    },
}
"""What it does to people, by style and kind; a loss goes by what is lost."""

WHEN = [
    "this morning",
    "last night",
    "on Tuesday",
    "around 9",
    "after lunch",
    "yesterday evening",
    "at half past ten",
    "on Monday",
    "during the night",
    "a while ago",
    "right after breakfast",
]
SMALL_TALK = {
    "of oneself": [
        "we moved office last week and I am still unpacking",
        "sorry if this has been reported before",
        "{name} is on leave, so I write instead",
        "I have no screenshot yet",
        "our office runs Windows 11",
        "we are on version {version}",
        "I have restarted my laptop, no change",
        "I am on the train and the line is bad",
        "my day started well otherwise",
        "I can be reached at extension {extension}",
        "I tried it at home and at work",
        "the office printer is playing up too, but that is another story",
    ],
    "of the matter": [
        "{name} noticed it first",
        "it started {when}",
        "the old site never had this, {name} says",
        "{name} brought it up in the stand-up",
        "it was noticed {when}",
        "clearing the cache changed nothing",
        "ticket {number} from spring looked similar",
        "{name} thinks that the update to {version} did it",
        "{name} has a recording of the screen",
    ],
}


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


class Writer:
    """Puts one combination into words; every choice is drawn from `rng`."""

    def __init__(self, rng: random.Random, combination: Combination, components: list[Component]) -> None:
        self.rng = rng
        self.fault = combination.fault
        self.extent = combination.extent
        others = [other for other in components if other != self.fault.component]
        self.other, self.another = rng.sample(others, 2)
        self.name, self.colleague, self.third = rng.sample(NAMES, 3)
        self.clock = f"{rng.randint(6, 22):02d}:{rng.randint(0, 59):02d}"
        self.version = f"{rng.randint(2, 9)}.{rng.randint(0, 19)}.{rng.randint(0, 9)}"

    def said(self) -> str:
        return self.rng.choice(self.fault.said)

    def reach(self, style: str) -> str:
        component = self.fault.component
        text = self.rng.choice(REACH[style][self.extent])
        return text.format(one=component.one, many=component.many, me=component.me)

    def effect(self, style: str) -> str:
        return self.rng.choice(EFFECT[style][self.fault.lost or self.fault.kind]).format(way=self.fault.way)

    def cues(self) -> str:
        """Extent and effect as one or two sentences, in either order."""
        reach, effect = self.reach("plain"), self.effect("plain")
        return self.rng.choice(
            [
                f"{capital(reach)}. {capital(effect)}.",
                f"{capital(effect)}. {capital(reach)}.",
                f"{capital(reach)}, and {effect}.",
            ]
        )

    def story(self) -> str:
        """The fault with its extent and effect, the extent now and then in the fault's own sentence."""
        if self.rng.random() < 0.3:
            link = self.rng.choice(["and that for", "and it is so for"])
            return f"{self.said()}, {link} {self.reach('terse')}. {capital(self.effect('plain'))}."
        return f"{self.said()}. {self.cues()}"

    def fine(self) -> str:
        """Other components, said to be in order."""
        other, another = self.other.alias, self.another.alias
        return self.rng.choice(
            [
                f"{other} works as usual",
                f"no trouble with {other}",
                f"I checked {other} and it is fine",
                f"{other} and {another} look normal",
                f"first I suspected {other}, but it is fine",
                f"there was something with {other} last week, but that is settled",
            ]
        )

    def talk(self, *, own: bool = True) -> str:
        """Something beside the point; `own`: the writer may speak of themselves."""
        lines = SMALL_TALK["of the matter"] + (SMALL_TALK["of oneself"] if own else [])
        return self.rng.choice(lines).format(
            name=self.third,
            version=self.version,
            when=self.rng.choice(WHEN),
            number=self.rng.randint(1200, 9800),
            extension=self.rng.randint(120, 980),
        )

    def aside(self, *, none: float = 0.2, own: bool = True) -> str:
        """A distracting sentence, or with probability `none` nothing."""
        if self.rng.random() < none:
            return ""
        return f"{capital(self.fine() if self.rng.random() < 0.5 else self.talk(own=own))}."
