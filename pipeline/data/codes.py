"""The stable codes of everything that can be wrong with a data file, each with the usual way to mend it."""

from __future__ import annotations

NO_FILE = (
    "no-such-file",
    "is-a-folder",
    "symbolic-link",
    "special-file",
    "unreadable-file",
    "unreadable-dataset",
    "unknown-column",
)
"""The path is wrong, not the data."""

MENDS: dict[str, str] = {
    # The file
    "no-such-file": "check the path: relative to the current folder, or to the experiment that names it",
    "is-a-folder": "name the file inside the folder",
    "symbolic-link": "name the file that it leads to",
    "special-file": "write the data to an ordinary file first",
    "unreadable-file": "check the path and its permissions",
    "file-changed": "wait until whatever writes the file is done",
    "unreadable-dataset": "check the name, the split (`hf:NAME:SPLIT`) and the network; a folder works as NAME as well",
    "unknown-column": "name a column that the file has: `--map COLUMN=FIELD`",
    "empty-file": "put at least one row into the file",
    "unsupported-file": "give JSONL, one JSON array of objects, CSV, Parquet or Arrow, as they are or as .gz or .zst",
    "broken-archive": "write or copy the archive again: it is cut off or damaged",
    "archive-too-large": "unpack the archive yourself, if you trust where it comes from",
    "invalid-table": "write the file again with a library (in Python: `csv`, `pyarrow`)",
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
    "invalid-arguments": "write the arguments of a call as one JSON object (in Python: `json.dumps`)",
    "invalid-transcript": "begin with two line feeds and `Human:`, and end with an `Assistant:` turn",
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
    "nothing-to-train": "give at least one assistant turn the weight 1, or drop the row",
    "prompts-differ": "pair answers to one and the same conversation",
    "no-common-prompt": "let both begin with the prompt, or give it as `prompt`",
    "no-answer": "write the answer behind the prompt, or drop the row",
    "completion-repeats-prompt": "begin the answer where the prompt ends: training puts the two together",
    "chosen-equals-rejected": "drop the row: there is nothing to prefer",
    # Warnings
    "duplicate-row": "drop the copy, unless the row is meant to count twice",
    "opposite-preference": "find out which of the two is right, and drop the other, or both",
    "length-bias": "balance the pairs, or expect the model to learn length: compare `length_mean` before and after",
    "evaluated-on-training-data": "drop the row from one of the two files: a score on what was trained on says nothing",
    "duplicate-across-files": "drop the row from one of the files",
    "near-duplicate-across-files": "drop it from one of them, unless the small difference is what is evaluated",
    "shared-prompts": "nothing, if it is meant (answers to demonstrations' prompts, say); else drop them from one",
    "near-duplicate": "drop one of the two, unless the small difference is the point",
    "few-rows": "a handful of rows shows that a setup works; it teaches a model little",
}

TOKEN_MENDS: dict[str, str] = {
    # Errors: such a row is refused or set aside (`data.on_invalid`)
    "control-token": "take it out of the text or write it otherwise (with a space inside, say): the model reads it as "
    "the end of a turn or the start of one",
    "template-refuses": "change the conversation (often: no system turn, or alternating roles) or the template",
    "template-not-prefix": "name a template that renders each turn alike wherever it stands as "
    "`tokenizer.chat_template`",
    "nothing-in-loss": "raise `max_length`, shorten the prompt, or train without the row: `data.on_invalid: set-aside`",
    "equal-after-cut": "raise `max_length`, or train without the row: `data.on_invalid: set-aside`",
    "equal-tokens": "drop the row: to the model, `chosen` and `rejected` are the same",
    # Warnings
    "prompt-not-prefix": "end the prompt at a word's end, or use a template that renders it alike in both cases",
    "completion-cut": "raise `max_length`, or shorten the row",
    "stop-cut": "raise `max_length`: without its stop token the row teaches the model not to stop",
    "no-stop-token": "let the template end each turn with the tokenizer's eos token",
    "not-tokenised": "ask for it with `--tokens`, or download the model; the stages check the same before they load it",
    "foreign-control-token": "check that it is meant: another model's markup, which this one reads as ordinary text",
}
"""The same for what the tokenizer does to rows (`tokenised`)."""
