"""The stable codes of everything that can be wrong with a data file, each with the usual way to mend it."""

from __future__ import annotations

NO_FILE = ("no-such-file", "is-a-folder", "special-file", "unreadable-file")
"""The path is wrong, not the data."""

MENDS: dict[str, str] = {
    # The file
    "no-such-file": "check the path: relative to the current folder, or to the experiment that names it",
    "is-a-folder": "name the file inside the folder",
    "special-file": "write the data to an ordinary file first",
    "unreadable-file": "check the path and its permissions",
    "empty-file": "put at least one row into the file",
    "unsupported-file": "give JSONL (one JSON object a line) or one JSON array of objects",
    "wrong-encoding": "save the file as UTF-8 without a byte order mark",
    "not-rows": "put each object on a line of its own, or all of them into one JSON array",
    # The text
    "byte-order-mark": "save the file as UTF-8 without a byte order mark",
    "broken-utf-8": "save the file as UTF-8; text in Latin-1 or Windows-1252 has to be converted first",
    "nul-character": "remove the NUL character",
    "invalid-json": "write rows with a JSON library (in Python: `json.dumps`), not by hand",
    "row-too-long": "split the row, or drop it: no model reads that much at once",
    "nesting-too-deep": "flatten the row",
    "duplicate-key": "keep one of the two: JSON readers silently drop the others",
    "not-a-number": "NaN and Infinity are not JSON: write null, or leave the key out",
    "number-out-of-range": "write the number as a string, or leave the key out",
    "unpaired-surrogate": "repair the text: half of a character (often an emoji) was cut off",
    # The shape
    "not-an-object": "write each row as a JSON object",
    "unknown-shape": "use `messages`, `prompt` with `completion`, or `prompt` with `chosen` and `rejected`",
    "wrong-kind": "use this file for the other stage, or name the right file",
    "ambiguous-form": "keep either `messages` or `prompt` with `completion`",
    "missing-key": "add the key",
    "wrong-type": "change the value's type",
    "mixed-forms": "write the whole row as text, or the whole row as lists of messages",
    "unknown-role": "use `system`, `developer`, `user`, `assistant` or `tool`",
    "empty-content": "write the text, or drop the row",
    "no-messages": "put at least one message into the list",
    "unsupported-part": "keep text parts only: images, audio and video cannot be trained on here",
    "unsupported-media": "drop the key if the text stands on its own, or drop the row",
    "invalid-tools": "write `tools` as a list of JSON Schema objects",
    "invalid-value": "see the JSON Schema of this kind of row",
    # The conversation
    "system-not-first": "move the system message to the front, or drop it",
    "first-not-user": "start with a user turn, after the system message if there is one",
    "roles-not-alternating": "join the two turns into one, or add the turn between them",
    "stray-tool-result": "let a `tool` turn follow an assistant turn that has `tool_calls`",
    "no-assistant-turn": "add the assistant's answer: nothing in the row can be trained on",
    "last-not-assistant": "end with an assistant turn, or cut what follows the last one",
    "prompt-last-not-user": "end the prompt with a user turn (or a tool's result)",
    "first-not-assistant": "keep the prompt's turns in `prompt`, and begin the answer with an assistant turn",
    "chosen-equals-rejected": "drop the row: there is nothing to prefer",
    # Warnings
    "duplicate-row": "drop the copy, unless the row is meant to count twice",
    "few-rows": "a handful of rows shows that a setup works; it teaches a model little",
}
