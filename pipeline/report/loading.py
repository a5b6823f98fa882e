"""The code that opens a run's adapter with stock PEFT, ready to be pasted."""

from __future__ import annotations

from pathlib import Path
from pprint import pformat
from typing import Any

from pipeline.experiment import Experiment
from pipeline.model.builtin import PREFIX
from pipeline.runs.run import Run


def loading_code(run: Run, experiment: Experiment, prompt: Any) -> str:
    """Python that loads base and adapter, asks one prompt and prints the answer.

    Args:
        run: a finished one.
        experiment: as the run resolved it.
        prompt: text or messages.
    """
    base = run.manifest["base"]
    imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    name, revision = str(base["id"]), base.get("revision")
    arguments = []
    if name.startswith(PREFIX):
        imports.append("from pipeline.model.builtin import builtin_model")
        origin = f"builtin_model({name!r})"
    elif name.endswith(".gguf"):
        origin = repr(str(Path(name).parent))
        arguments.append(f"gguf_file={Path(name).name!r}")
    else:
        origin = repr(name)
    if revision is not None:
        arguments.append(f"revision={revision!r}")
    if experiment.model.dtype != "auto":
        arguments.append(f"dtype={experiment.model.dtype!r}")
    if experiment.model.trust_remote_code:
        arguments.append("trust_remote_code=True")
    if experiment.model.quantize == "nf4":
        imports.append("from transformers import BitsAndBytesConfig")
        arguments.append(
            'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            "bnb_4bit_use_double_quant=True)"
        )
    if isinstance(prompt, str):
        inputs = 'inputs = tokenizer(prompt, return_tensors="pt")'
    else:
        inputs = (
            "inputs = tokenizer.apply_chat_template(\n"
            '    prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
        )
    lines = [
        *sorted(imports),
        "",
        f"adapter = {str(run.adapter.resolve())!r}",
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        f"base = AutoModelForCausalLM.from_pretrained({', '.join([origin, *arguments])})",
        "model = PeftModel.from_pretrained(base, adapter).eval()",
        "",
        f"prompt = {pformat(prompt, width=100, sort_dicts=False)}",
        inputs,
        f"output = model.generate(**inputs, max_new_tokens={experiment.evaluation.max_new_tokens}, do_sample=False)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines) + "\n"
