from __future__ import annotations

from typing import Any

from pipeline.data.rows import Demonstration
from pipeline.data.tokens import encode
from pipeline.evaluation.questions import Question, completion_of, question_of

TOOLS = [{"type": "function", "function": {"name": "restart"}}]
SYSTEM = {"role": "system", "content": "Be brief."}
FIRST, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SECOND, LAST = {"role": "user", "content": "On?"}, {"role": "assistant", "content": "Yes."}


def test_everything_before_the_last_answer_is_asked() -> None:
    question = question_of(Demonstration(messages=[SYSTEM, FIRST, REPLY, SECOND, LAST], tools=TOOLS))
    assert question == Question([SYSTEM, FIRST, REPLY, SECOND], [LAST], TOOLS)
    assert question.reference == "Yes."


def test_what_follows_the_last_answer_is_left_out() -> None:
    assert question_of(Demonstration(messages=[FIRST, REPLY, SECOND])) == Question([FIRST], [REPLY])


def test_plain_text() -> None:
    question = question_of(Demonstration(prompt="The printer is", completion=" on fire."))
    assert question == Question("The printer is", " on fire.")
    assert question.reference == " on fire."


def test_a_conversation_that_asks_nothing() -> None:
    assert question_of(Demonstration(messages=[FIRST])) is None
    assert question_of(Demonstration(messages=[REPLY, FIRST])) is None


def test_a_turn_without_text_is_no_reference() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "restart"}}]}
    question = question_of(Demonstration(messages=[FIRST, call]))
    assert question is not None
    assert question.reference is None


def test_the_completion_is_what_training_has_in_its_loss(tiny_tokenizer: Any) -> None:
    """The last answer with its stop token; not the earlier one, nor what the template sets behind the stop."""
    completion = completion_of(tiny_tokenizer, Question([SYSTEM, FIRST, REPLY, SECOND], [LAST]))
    assert tiny_tokenizer.decode(completion.completion_ids) == "Yes.<|im_end|>"
    asked = encode(tiny_tokenizer, [SYSTEM, FIRST, REPLY, SECOND], add_generation_prompt=True)
    assert completion.prompt_ids == asked
    cut = completion_of(tiny_tokenizer, Question([FIRST], [REPLY]), max_length=4)
    assert (len(cut.prompt_ids), cut.completion_ids) == (4, [])


def test_tools_stand_in_the_prompt(tiny_tokenizer: Any) -> None:
    chatml = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = "{{ tools[0].function.name if tools }}" + chatml
    try:
        completion = completion_of(tiny_tokenizer, Question([FIRST], [REPLY], TOOLS))
    finally:
        tiny_tokenizer.chat_template = chatml
    assert tiny_tokenizer.decode(completion.prompt_ids).startswith("restart<|im_start|>user")


def test_the_completion_of_a_text(tiny_tokenizer: Any) -> None:
    completion = completion_of(tiny_tokenizer, Question("Hi", " you"))
    assert tiny_tokenizer.decode(completion.prompt_ids) == "Hi"
    assert tiny_tokenizer.decode(completion.completion_ids) == " you<|im_end|>"
