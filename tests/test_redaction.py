from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.redaction import hide
from pipeline.runs.provenance import provenance


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("evaluation.judge.api_key=sk-1234", "evaluation.judge.api_key=***"),
        ("judge={model: m, api_key: 'sk-1234', n: 2}", "judge={model: m, api_key: ***, n: 2}"),
        ('{"hub_token": "hf_abc"}', '{"hub_token": ***}'),
        ("sft.options.hub_token=hf_abc", "sft.options.hub_token=***"),
        ("PASSWORD=open sesame", "PASSWORD=*** sesame"),
        ("https://me:open@host/v1", "https://***@host/v1"),
        ("judge={key_env: sk-1234, model: m}", "judge={key_env: ***, model: m}"),
        ("evaluation.judge.key_env=hf_abc", "evaluation.judge.key_env=***"),
        # What only sounds so is shown.
        ("evaluation.judge.key_env=OPENAI_API_KEY", "evaluation.judge.key_env=OPENAI_API_KEY"),
        ("sft.options.eos_token=<|im_end|>", "sft.options.eos_token=<|im_end|>"),
        ("evaluation.max_new_tokens=5", "evaluation.max_new_tokens=5"),
        ("https://host/v1", "https://host/v1"),
        ("someone@example.org", "someone@example.org"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, shown: str) -> None:
    assert hide(text) == shown


def test_the_value_of_a_secret_variable_is_hidden_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh12")
    monkeypatch.setenv("SOME_SHORT_KEY", "abc")
    monkeypatch.setenv("SOME_KEY_FILE", str(tmp_path))
    assert hide("it said abcdefgh12!") == "it said ***!"
    assert hide(f"abc {tmp_path}") == f"abc {tmp_path}"
    error = PipelineError("it said abcdefgh12", code="x", mend="not abcdefgh12")
    assert "abcdefgh12" not in f"{error} {error!r} {error.as_dict()}"
    assert provenance(["pipeline", "--set", "name=abcdefgh12"])["argv"] == ["pipeline", "--set", "name=***"]
