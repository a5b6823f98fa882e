from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM

from pipeline.errors import PipelineError
from pipeline.evaluation.generation import Answer, generate, stop_tokens

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in (
        "Hi",
        "The printer is on fire.",
        "a",
        "It works again, thank you! " * 3,
        "fire?",
        "on",
        "again",
    )
]
LIMIT = 20


def prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """What the model is given, written out: ChatML up to the assistant's turn."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in prompt)
    return tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]


@torch.no_grad()
def one_at_a_time(model: Any, tokenizer: Any, prompt: Any, stops: set[int], limit: int = LIMIT) -> Answer:
    """Greedy decoding by its definition: no batch, no padding, no cache."""
    ids = prompt_ids(tokenizer, prompt)
    generated: list[int] = []
    while len(generated) < limit:
        token = int(model(input_ids=torch.tensor([ids + generated])).logits[0, -1].argmax())
        if token in stops:
            return Answer(tokenizer.decode(generated, skip_special_tokens=True), len(generated), True)
        generated.append(token)
    return Answer(tokenizer.decode(generated, skip_special_tokens=True), len(generated), False)


def tokens_of(model: Any, tokenizer: Any, prompt: Any) -> list[int]:
    ids = torch.tensor([prompt_ids(tokenizer, prompt)])
    for _ in range(LIMIT):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, -LIMIT:].tolist()


def choose_stops(model: Any, tokenizer: Any) -> set[int]:
    """Stop tokens that a random model does reach: the 4th of one answer, the 9th of another."""
    stops = {tokens_of(model, tokenizer, PROMPTS[0])[3], tokens_of(model, tokenizer, PROMPTS[3])[8]}
    model.generation_config.eos_token_id = sorted(stops)
    return stops | {tokenizer.eos_token_id}


@pytest.mark.parametrize("batch_size", [1, 3, 25])
def test_batched_is_one_at_a_time(chat_model: Any, tiny_tokenizer: Any, batch_size: int) -> None:
    stops = choose_stops(chat_model, tiny_tokenizer)
    expected = [one_at_a_time(chat_model, tiny_tokenizer, prompt, stops) for prompt in PROMPTS]
    # Both ways to end occur and answers leave the batch at different steps, or the test would show little.
    assert {answer.ended for answer in expected} == {True, False}
    assert len({answer.tokens for answer in expected}) > 2
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id

    answers = generate(chat_model, tiny_tokenizer, PROMPTS, max_new_tokens=LIMIT, batch_size=batch_size)
    assert answers == expected


@pytest.mark.parametrize("batch_size", [2, 25])
def test_a_common_beginning_is_computed_once(
    chat_model: Any, tiny_tokenizer: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[{"role": "system", "content": "Answer the report in one word."}, *prompt] for prompt in PROMPTS]
    stops = choose_stops(chat_model, tiny_tokenizer)
    expected = [one_at_a_time(chat_model, tiny_tokenizer, prompt, stops) for prompt in prompts]
    computed: list[tuple[int, int]] = []
    stock = chat_model.model.forward
    monkeypatch.setattr(
        chat_model.model, "forward", lambda **given: (computed.append(given["input_ids"].shape), stock(**given))[1]
    )
    answers = generate(chat_model, tiny_tokenizer, prompts, max_new_tokens=LIMIT, batch_size=batch_size)
    assert answers == expected
    lengths = sorted((len(prompt_ids(tiny_tokenizer, prompt)) for prompt in prompts), reverse=True)
    one, shared = computed[0]
    assert (one, computed[1]) == (1, (min(batch_size, len(prompts)), lengths[0] - shared))
    assert shared > 8


def test_plain_text_prompts(chat_model: Any, tiny_tokenizer: Any) -> None:
    texts = ["The printer", "It works again, thank", "on"]
    stops = choose_stops(chat_model, tiny_tokenizer)
    expected = [one_at_a_time(chat_model, tiny_tokenizer, text, stops) for text in texts]
    assert generate(chat_model, tiny_tokenizer, texts, max_new_tokens=LIMIT, batch_size=3) == expected


def test_an_answer_that_reaches_the_limit_has_not_ended(chat_model: Any, tiny_tokenizer: Any) -> None:
    """The stop token is the 6th: with five tokens allowed it is not reached, with six it is."""
    tokens = tokens_of(chat_model, tiny_tokenizer, PROMPTS[1])
    assert tokens[5] not in tokens[:5]
    chat_model.generation_config.eos_token_id = tokens[5]
    five, six = (
        generate(chat_model, tiny_tokenizer, [PROMPTS[1]], max_new_tokens=limit, batch_size=1)[0] for limit in (5, 6)
    )
    text = tiny_tokenizer.decode(tokens[:5], skip_special_tokens=True)
    assert five == Answer(text, 5, ended=False)
    assert six == Answer(text, 5, ended=True)


def test_defaults_of_the_model_change_nothing(chat_model: Any, tiny_tokenizer: Any) -> None:
    plain = generate(chat_model, tiny_tokenizer, PROMPTS, max_new_tokens=LIMIT, batch_size=4)
    chat_model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.5, repetition_penalty=3.0, min_new_tokens=19, max_length=3
    )
    before = chat_model.generation_config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = generate(chat_model, tiny_tokenizer, PROMPTS, max_new_tokens=LIMIT, batch_size=4)
    assert answers == plain
    assert chat_model.generation_config.to_dict() == before


def test_stop_tokens_are_all_that_the_model_has(chat_model: Any, tiny_tokenizer: Any) -> None:
    end_of_text, end_of_turn = tiny_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    chat_model.generation_config.eos_token_id = None
    assert stop_tokens(chat_model, tiny_tokenizer) == {end_of_turn}
    chat_model.generation_config.eos_token_id = 7
    assert stop_tokens(chat_model, tiny_tokenizer) == {end_of_turn, 7}
    chat_model.generation_config.eos_token_id = [7, 9]
    assert stop_tokens(chat_model, tiny_tokenizer) == {end_of_turn, 7, 9}

    # A base model: its eos ends texts, and only the template knows what ends a turn.
    chat_model.generation_config.eos_token_id = end_of_text
    tiny_tokenizer.eos_token = "<|endoftext|>"
    try:
        assert stop_tokens(chat_model, tiny_tokenizer) == {end_of_text, end_of_turn}
    finally:
        tiny_tokenizer.eos_token = "<|im_end|>"


def test_modes_and_gradients_are_left_as_they_were(make_model: Any, tiny_tokenizer: Any) -> None:
    model = make_model(attention_dropout=0.5)
    expected = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=LIMIT, batch_size=4)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]

    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=LIMIT, batch_size=4) == expected
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    assert torch.is_grad_enabled()
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()


def test_with_an_adapter(chat_model: Any, tiny_tokenizer: Any) -> None:
    plain = generate(chat_model, tiny_tokenizer, PROMPTS, max_new_tokens=LIMIT, batch_size=3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(chat_model, config)
    expected = [one_at_a_time(model, tiny_tokenizer, prompt, {tiny_tokenizer.eos_token_id}) for prompt in PROMPTS]
    assert expected != plain
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=LIMIT, batch_size=3) == expected


def test_positions_count_real_tokens(tiny_tokenizer: Any) -> None:
    """Rotary positions are relative and forgive a shift; GPT-2's are absolute."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).eval()
    stops = stop_tokens(model, tiny_tokenizer)
    expected = [one_at_a_time(model, tiny_tokenizer, prompt, set(stops)) for prompt in PROMPTS]
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=LIMIT, batch_size=7) == expected


def test_without_a_key_value_cache(tiny_tokenizer: Any) -> None:
    """RWKV keeps a recurrent state, which padding would run through."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    model = RwkvForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    texts = ["The printer", "fire", "It works again, thank you!", "a", "is on"]
    stops = stop_tokens(model, tiny_tokenizer)
    expected = [one_at_a_time(model, tiny_tokenizer, text, set(stops), 6) for text in texts]
    assert len({answer.text for answer in expected}) > 2
    assert generate(model, tiny_tokenizer, texts, max_new_tokens=6, batch_size=4) == expected


def test_progress_counts_every_answer_once(chat_model: Any, tiny_tokenizer: Any) -> None:
    choose_stops(chat_model, tiny_tokenizer)
    counts: list[int] = []
    generate(chat_model, tiny_tokenizer, PROMPTS, max_new_tokens=LIMIT, batch_size=3, progress=counts.append)
    assert sum(counts) == len(PROMPTS)
    assert len(counts) > 3  # more often than once a batch
    assert all(counts)


def test_no_prompts(chat_model: Any, tiny_tokenizer: Any) -> None:
    assert generate(chat_model, tiny_tokenizer, [], max_new_tokens=4, batch_size=2) == []


@pytest.mark.parametrize(("prompt", "limit", "code"), [("word " * 40, 200, "prompt-too-long"), ("", 4, "empty-prompt")])
def test_what_cannot_be_asked(chat_model: Any, tiny_tokenizer: Any, prompt: str, limit: int, code: str) -> None:
    with pytest.raises(PipelineError, match="prompt 2 has") as raised:
        generate(chat_model, tiny_tokenizer, ["fine", prompt], max_new_tokens=limit, batch_size=2)
    assert raised.value.code == code


def test_a_conversation_needs_a_template(chat_model: Any, tiny_tokenizer: Any) -> None:
    template, tiny_tokenizer.chat_template = tiny_tokenizer.chat_template, None
    try:
        with pytest.raises(PipelineError) as raised:
            generate(chat_model, tiny_tokenizer, PROMPTS[:1], max_new_tokens=4, batch_size=1)
        assert raised.value.code == "no-chat-template"
        assert len(generate(chat_model, tiny_tokenizer, ["text"], max_new_tokens=4, batch_size=1)) == 1
    finally:
        tiny_tokenizer.chat_template = template
