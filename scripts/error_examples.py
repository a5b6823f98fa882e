"""For each code of `pipeline.data.codes` that rows of text can show: rows that give it, and the same rows mended.

Several rows are several lines. What takes a file, an experiment or a tokenizer is in `error_scenes`.
"""

from __future__ import annotations

from typing import NamedTuple


class Example(NamedTuple):
    wrong: str
    mended: str
    kind: str | None = None


USER = '{"role": "user", "content": "Hi"}'
ANSWER = '{"role": "assistant", "content": "Hello"}'


def talk(*turns: str) -> str:
    return '{"messages": [' + ", ".join(turns) + "]}"


GOOD = talk(USER, ANSWER)
TEXT = '{"prompt": "2 + 2 =", "completion": " 4"}'
PAIR = '{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}'
TURNS = f'{{"prompt": [{USER}], "completion": [{ANSWER}]}}'
LONG = "one two three four five six seven eight nine ten eleven twelve"
BIAS = "\n".join(f'{{"prompt": "{n}", "chosen": "a long answer", "rejected": "short"}}' for n in range(30))
BALANCED = "\n".join(
    f'{{"prompt": "{n}", "chosen": "{"a long answer" if n % 2 else "good"}", "rejected": "shorter"}}' for n in range(30)
)

EXAMPLES: dict[str, Example] = {
    "empty-file": Example("", TEXT),
    "not-rows": Example('{\n  "prompt": "2 + 2 =",\n  "completion": " 4"\n}', TEXT),
    "byte-order-mark": Example("\ufeff" + TEXT, TEXT),
    "nul-character": Example('{"prompt": "2 + 2 =", "completion": "\\u0000"}', TEXT),
    "invalid-json": Example("{'prompt': '2 + 2 =', 'completion': ' 4'}", TEXT),
    "nesting-too-deep": Example(TEXT[:-1] + ', "x": ' + "[" * 64 + "]" * 64 + "}", TEXT[:-1] + ', "x": []}'),
    "duplicate-key": Example('{"prompt": "1 + 1 =", "prompt": "2 + 2 =", "completion": " 4"}', TEXT),
    "not-a-number": Example(TEXT[:-1] + ', "score": NaN}', TEXT[:-1] + ', "score": null}'),
    "number-out-of-range": Example(
        TEXT[:-1] + ', "id": 18446744073709551616}', TEXT[:-1] + ', "id": "18446744073709551616"}'
    ),
    "unpaired-surrogate": Example(
        '{"prompt": "Hi", "completion": "\\ud83d"}', '{"prompt": "Hi", "completion": "\\ud83d\\ude00"}'
    ),
    "not-an-object": Example("1", TEXT),
    "unknown-shape": Example('{"left": "2 + 2 =", "right": " 4"}', TEXT),
    "wrong-kind": Example(TEXT, PAIR, "preference"),
    "ambiguous-form": Example(GOOD[:-1] + ', "completion": "Hello"}', GOOD),
    "missing-key": Example('{"prompt": "2 + 2 =", "response": " 4"}', TEXT),
    "wrong-type": Example('{"prompt": "2 + 2 =", "completion": 4}', '{"prompt": "2 + 2 =", "completion": "4"}'),
    "mixed-forms": Example(f'{{"prompt": "Hi", "completion": [{ANSWER}]}}', TURNS),
    "unknown-role": Example(talk(USER, ANSWER.replace("assistant", "bot")), GOOD),
    "empty-content": Example(talk(USER, '{"role": "assistant", "content": " "}'), GOOD),
    "no-messages": Example('{"messages": []}', GOOD),
    "unsupported-part": Example(
        talk('{"role": "user", "content": [{"type": "image_url"}]}', ANSWER),
        talk('{"role": "user", "content": [{"type": "text", "text": "Hi"}]}', ANSWER),
    ),
    "unsupported-media": Example(GOOD[:-1] + ', "images": ["cat.png"]}', GOOD),
    "invalid-tools": Example(GOOD[:-1] + ', "tools": "now()"}', GOOD[:-1] + ', "tools": [{"name": "now"}]}'),
    "invalid-arguments": Example(
        talk(USER, '{"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": "UTC"}}]}'),
        talk(USER, '{"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": "{}"}}]}'),
    ),
    "invalid-value": Example(
        talk(
            USER, '{"role": "assistant", "tool_calls": [{"type": "x", "function": {"name": "now", "arguments": {}}}]}'
        ),
        talk(USER, '{"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}'),
    ),
    "invalid-transcript": Example(
        '{"chosen": "Human: Hi", "rejected": "Human: Hi"}',
        '{"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello", "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: Go"}',
    ),
    "prompts-differ": Example(
        '{"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello", "rejected": "\\n\\nHuman: Go\\n\\nAssistant: Bye"}',
        '{"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello", "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: Bye"}',
    ),
    "no-common-prompt": Example(
        '{"chosen": "Four.", "rejected": "Is it five?"}',
        '{"prompt": "2 + 2?", "chosen": "Four.", "rejected": "Is it five?"}',
    ),
    "no-answer": Example(
        '{"chosen": "2 + 2 =", "rejected": "2 + 2 = 5"}', '{"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}'
    ),
    "system-not-first": Example(talk(USER, '{"role": "system", "content": "Be kind"}', ANSWER), GOOD),
    "first-not-user": Example(talk(ANSWER), GOOD),
    "roles-not-alternating": Example(talk(USER, USER, ANSWER), GOOD),
    "stray-tool-result": Example(talk(USER, '{"role": "tool", "content": "noon"}', ANSWER), GOOD),
    "no-assistant-turn": Example(talk(USER), GOOD),
    "last-not-assistant": Example(talk(USER, ANSWER, USER), GOOD),
    "prompt-last-not-user": Example(f'{{"prompt": [{USER}, {ANSWER}], "completion": [{ANSWER}]}}', TURNS),
    "first-not-assistant": Example(f'{{"prompt": [{USER}], "completion": [{USER}, {ANSWER}]}}', TURNS),
    "nothing-to-train": Example(talk(USER, ANSWER[:-1] + ', "weight": 0}'), talk(USER, ANSWER[:-1] + ', "weight": 1}')),
    "completion-repeats-prompt": Example(TEXT.replace(" 4", "2 + 2 = 4"), TEXT),
    "chosen-equals-rejected": Example(PAIR.replace("5", "4"), PAIR),
    "duplicate-row": Example(f"{TEXT}\n{TEXT}", TEXT),
    "opposite-preference": Example(f"{PAIR}\n" + '{"prompt": "2 + 2 =", "chosen": " 5", "rejected": " 4"}', PAIR),
    "near-duplicate": Example(
        f'{{"prompt": "{LONG}", "completion": "yes"}}\n{{"prompt": "{LONG}", "completion": "no"}}', TEXT
    ),
    "length-bias": Example(BIAS, BALANCED),
    "few-rows": Example(TEXT, "\n".join(TEXT.replace("2 +", f"{n} +") for n in range(10))),
}
