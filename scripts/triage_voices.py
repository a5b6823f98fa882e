"""Who writes the reports of datasets/triage, and how: one function a voice.

Each voice puts the same three things (see triage_grammar.py) into its own form and order, among its own noise.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from triage_grammar import WHEN, Combination, Component, Writer, capital


def _on_call(w: Writer) -> str:
    head = w.rng.choice([f"{w.fault.component.name}: ", f"{w.fault.component.name} again, ", "fyi ", "", ""])
    since = w.rng.choice(
        [f" since {w.clock}", f" after build {w.version}", f", paged at {w.clock}", f", first seen {w.clock}"]
    )
    reach, effect = w.reach("terse"), w.effect("terse")
    cues = w.rng.choice([f"{reach}, {effect}", f"{effect}. {reach}", f"{reach}. {effect}"])
    tail = w.rng.choice(
        [
            f"{w.other.name} and {w.another.name} ok",
            f"graphs for {w.other.name} look normal",
            f"handing over to {w.name}, my shift ends",
            f"build {w.version} is live, {w.colleague} has the logs",
            f"{w.colleague} is busy with {w.other.name}, unrelated",
            f"not the {w.other.name} thing from yesterday",
        ]
    )
    return f"{head}{w.fault.tag}{since}. {cues}. {tail}."


def _alert(w: Writer) -> str:
    level = w.rng.choice(["ALERT", "[monitor]", "CHECK FAILED", "[probe]"])
    host = f"{w.fault.component.name}-prod-{w.rng.randint(1, 9)}"
    fields = [f"scope={w.reach('terse')}", w.effect("field")]
    w.rng.shuffle(fields)
    noise = w.rng.sample(
        [
            f"build={w.version}",
            f"{w.other.name}=ok",
            f"{w.another.name}=ok",
            f"region=eu-{w.rng.randint(1, 3)}",
            f"run={w.rng.randint(10000, 99999)}",
        ],
        2,
    )
    return f"{level} {host} {w.clock}Z: {w.fault.tag}; {'; '.join([*fields, *noise])}"


def _form(w: Writer) -> str:
    lines = [
        f"Subject: {w.fault.tag}",
        f"What happens: {capital(w.said())}.",
        f"Who has it: {w.reach('terse')}",
    ]
    lines.append(f"Effect: {w.effect('terse')}")
    if w.rng.random() < 0.3:
        lines[2:] = lines[:1:-1]
    if w.rng.random() < 0.75:
        lines.append(f"Remarks: {w.fine() if w.rng.random() < 0.5 else w.talk()}")
    return "\n".join(lines)


def _phone_note(w: Writer) -> str:
    head = w.rng.choice(
        [
            f"Phone note, {w.clock}, taken by {w.name}.",
            f"Call at {w.clock}, {w.name} on the line.",
            f"Phoned in by {w.name} at {w.clock}.",
            f"Voicemail from {w.name}, {w.clock}.",
        ]
    )
    verb = w.rng.choice(["The caller says that", "The caller reports that", "We are told that", "Complaint:"])
    return f"{head} {verb} {w.story()} {w.aside(own=False)}"


def _customer(w: Writer) -> str:
    hello = w.rng.choice(["Hello,", "Dear support team,", "Good morning,", "Hi there,"])
    lead = w.rng.choice(
        [
            "I hope you can help:",
            f"I noticed {w.rng.choice(WHEN)} that",
            "I am sorry to bother you, but",
            "thank you for the quick help last time. Now",
            "it seems that",
            "maybe I am doing something wrong, but",
            "I did not find this in your help pages:",
            f"{w.name} here. I am afraid that",
        ]
    )
    cues = [f"{capital(w.reach('mine'))}.", f"{capital(w.effect('plain'))}."]
    w.rng.shuffle(cues)
    regards = w.rng.choice(["Kind regards,", "Many thanks,", "Best wishes,", "Yours,"])
    return f"{hello}\n{capital(lead)} {w.said()}. {' '.join(cues)} {w.aside(none=0.4)}\n{regards} {w.name}"


def _owner(w: Writer) -> str:
    rant = w.rng.choice(
        [
            "I have had enough of this.",
            "This is the third ticket I write this month!",
            "Do you people test anything?",
            "What am I paying you for?",
            f"I have been on hold since {w.clock}.",
            "Unbelievable.",
            "I have better things to do than write to you.",
            "My patience is at an end.",
            "Great start into the week!",
        ]
    )
    link = w.rng.choice(["Now", "Once more", "This time", "As of this morning", "Guess what:"])
    threat = w.rng.choice(
        [
            "Call me back.",
            "I run a shop, not a test lab.",
            f"And spare me the answer that {w.other.alias} is fine, I know that.",
            f"{w.name} from your sales team promised me better.",
            "I am this close to leaving.",
            "And the invoice for this comes on time, of course.",
            f"{w.colleague} from my team can tell you more.",
            f"Last month it was {w.other.alias}, what comes next?",
        ]
    )
    return f"{rant} {link} {w.story()} {threat}"


def _colleague(w: Writer) -> str:
    lead = w.rng.choice(
        [
            f"So I was about to go for coffee with {w.colleague} when I saw that",
            f"Not sure who takes this, {w.colleague} sent me here, but",
            f"Funny story, I was looking at {w.other.alias} for something else and found that",
            "While I was clearing my desk I heard that",
            f"Long day, anyway: {w.colleague} told me {w.rng.choice(WHEN)} that",
            f"You know how {w.colleague} always finds things? Well, it turns out that",
            f"I meant to write {w.rng.choice(WHEN)} and forgot, but",
            f"Between two meetings, so in short: {w.colleague} showed me that",
            "No idea whether this is the right place, but it looks as if",
        ]
    )
    tail = w.rng.choice(
        [
            f"{w.name} blamed {w.another.alias} first, but that is fine.",
            "Sorry for the long message.",
            f"Ask {w.name} if you need more.",
            f"{capital(w.talk())}.",
            f"{capital(w.fine())}.",
        ]
    )
    return f"{lead} {w.story()} {tail}"


def _chat(w: Writer) -> str:
    said, reach, effect = w.said(), w.reach("terse"), w.effect("terse")
    ask = w.rng.choice(["how many people?", "who has it?", "for whom?"])
    me, you = w.name.lower(), w.colleague.lower()
    return w.rng.choice(
        [
            f"{me}: hey, {said}\n{you}: {ask}\n{me}: {reach}\n{me}: {effect}",
            f"hi, are you around?\n{said}\n{reach}\n{effect}\n{w.other.alias} is ok though",
            f"{me}: {said} :(\n{you}: hm, {w.other.alias} is fine here. {ask}\n{me}: {reach}, {effect}",
            f"{me}: ping {you}, {said}\n{me}: {effect}\n{you}: {ask}\n{me}: {reach}",
            f"{me}: is this known? {said}\n{you}: no, {ask}\n{me}: {reach}, since {w.clock}\n{me}: {effect}",
            f"morning! {said}, since {w.clock} i think\n{reach}, {effect}\n{you} asked me to pass it on",
        ]
    )


VOICES: dict[str, Callable[[Writer], str]] = {
    "on-call": _on_call,
    "alert": _alert,
    "form": _form,
    "phone-note": _phone_note,
    "customer": _customer,
    "owner": _owner,
    "colleague": _colleague,
    "chat": _chat,
}
TYPED_IN_HASTE = {"on-call": 0.15, "owner": 0.2, "colleague": 0.2, "chat": 0.35}
"""Share of reports with one slip of the keyboard, by voice."""


_NEVER_SLIPS = {"single", "several", "everyone", "workaround", "cosmetic", "visual"}


def _slip(rng: random.Random, text: str) -> str:
    """Swaps two inner letters of a longer word or drops one; words that carry a cue are left alone."""
    words = text.split(" ")
    places = [
        place
        for place, word in enumerate(words)
        if len(word) >= 6 and word.isalpha() and word.islower() and word not in _NEVER_SLIPS
    ]
    if not places:
        return text
    place = rng.choice(places)
    word = words[place]
    cut = rng.randint(2, len(word) - 3)
    words[place] = word[:cut] + rng.choice([word[cut + 1] + word[cut], word[cut + 1]]) + word[cut + 2 :]
    return " ".join(words)


def write_report(rng: random.Random, combination: Combination, components: list[Component]) -> str:
    """The combination in words, slips included."""
    text = VOICES[combination.voice](Writer(rng, combination, components))
    if rng.random() < TYPED_IN_HASTE.get(combination.voice, 0.0):
        text = _slip(rng, text)
    # An aside that was left out leaves its space behind.
    return "\n".join(line.strip() for line in text.split("\n"))
