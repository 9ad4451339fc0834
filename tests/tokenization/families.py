"""Chat templates in the manner of the most used families, small, and conversations to render with them.

§ stands at both ends of what the model is to write: nothing in the template that is tested, and
`{% generation %}` in the one that transformers is asked with for comparison.
"""

import random
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    TrainedTokenizer,
)

_CHATML = """{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' }}
{%- if m['role'] == 'assistant' %}§{{- m['content'] + '<|im_end|>' }}§{{- '\\n' }}
{%- else %}{{- m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

_LLAMA_3 = """{{- bos_token }}{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
{%- if m['role'] == 'assistant' %}§{{- m['content'] | trim + '<|eot_id|>' }}§
{%- else %}{{- m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# The system message stands in the last turn of the user, so no rendering is the beginning of a longer one.
_MISTRAL = """{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{%- set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in loop_messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{{- bos_token }}{% for m in loop_messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if m['role'] == 'user' %}{% if system is defined and loop.index0 == ns.last %}
{{- '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}
{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{% endif %}
{%- else %}§{{- ' ' + m['content'] | trim + eos_token }}§{% endif %}{% endfor %}"""

_GEMMA = """{{- bos_token }}{%- if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('must alternate') }}{% endif %}
{%- if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}
{{- '<start_of_turn>' + role + '\\n' }}
{%- if role == 'model' %}§{{- m['content'] | trim + '<end_of_turn>' }}§{{- '\\n' }}
{%- else %}{{- m['content'] | trim + '<end_of_turn>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

# Where nothing is asked, the end of the text follows.
_PHI = """{%- for m in messages %}
{%- if m['role'] == 'system' and m['content'] %}{{- '<|system|>\\n' + m['content'] + '<|end|>\\n' }}
{%- elif m['role'] == 'user' %}{{- '<|user|>\\n' + m['content'] + '<|end|>\\n' }}
{%- elif m['role'] == 'assistant' %}{{- '<|assistant|>\\n' }}§{{- m['content'] + '<|end|>' }}§{{- '\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""

_QWEN_3 = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{% endfor %}{{- '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(more=true, last=messages|length - 1) %}
{%- for m in messages[::-1] %}
{%- if ns.more and m.role == 'user' and m.content is string and
    not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
{%- set ns.more, ns.last = false, messages|length - loop.index %}{% endif %}{% endfor %}
{%- for m in messages %}{% set content = m.content if m.content is string else '' %}
{%- if m.role == 'assistant' %}{% set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' }}
{%- set with_thought = loop.index0 > ns.last and (loop.last or thought) %}
{%- if with_thought %}BEFORE{% endif %}§{%- if with_thought %}WITHIN{% endif %}{{- content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>' }}§{{- '\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}ASKED{% endif %}"""

_SMOLLM_3 = """{%- set mode = '/think' %}{% set custom = '' %}
{%- if messages[0].role == 'system' %}
{%- if '/no_think' in messages[0].content %}{% set mode = '/no_think' %}{% endif %}
{%- set custom = messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() %}{% endif %}
{{- '<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: ' + mode + '\\n\\n' + custom + '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}
{%- if mode == '/no_think' %}{{- '<think>\\n\\n</think>\\n' }}§{{- m.content.lstrip('\\n') + '<|im_end|>' }}§
{%- else %}§{{- m.content.lstrip('\\n') + '<|im_end|>' }}§{% endif %}{{- '\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if mode == '/no_think' %}{{- '<think>\\n\\n</think>\\n' }}{% endif %}{% endif %}"""

# The thought that the prompt begins is not in the answers of a finished conversation.
_DEEPSEEK = """{{- bos_token }}{%- for m in messages %}
{%- if m['role'] == 'system' %}{{- m['content'] }}
{%- elif m['role'] == 'user' %}{{- '<|User|>' + m['content'] }}
{%- else %}{% set content = m['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|Assistant|>' }}§{{- content + eos_token }}§{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{% endif %}"""

# The marks of turns are no control tokens.
_ZEPHYR = """{%- for m in messages %}
{%- if m['role'] == 'user' %}{{- '<|user|>\\n' + m['content'] + eos_token + '\\n' }}
{%- elif m['role'] == 'system' %}{{- '<|system|>\\n' + m['content'] + eos_token + '\\n' }}
{%- else %}{{- '<|assistant|>\\n' }}§{{- m['content'] + eos_token }}§{{- '\\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}{% endfor %}"""

_OLMO = """{{- bos_token }}{%- for m in messages %}
{%- if m['role'] == 'assistant' %}{{- '<|assistant|>\\n' }}§{{- m['content'] + eos_token }}§
{%- if not loop.last %}{{- '\\n' }}{% endif %}
{%- else %}{{- '<|' + m['role'] + '|>\\n' + m['content'] + '\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}"""

_GRANITE = """{%- if messages[0]['role'] != 'system' %}
{{- '<|start_of_role|>system<|end_of_role|>You are Granite.<|end_of_text|>\\n' }}{% endif %}
{%- for m in messages %}{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' }}
{%- if m['role'] == 'assistant' %}§{{- m['content'] + '<|end_of_text|>' }}§{{- '\\n' }}
{%- elif m['content'] | length > 20 %}{{- m['content'] + ' (long)<|end_of_text|>\\n' }}
{%- else %}{{- m['content'] + '<|end_of_text|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

_COMMAND = """{{- bos_token }}{%- for m in messages %}
{%- set content = m['content'] | replace('<results>', '(results)') %}
{%- if m['role'] == 'assistant' %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}§{{- content | trim + '<|END_OF_TURN_TOKEN|>' }}§
{%- else %}{% set role = 'SYSTEM' if m['role'] == 'system' else 'USER' %}
{{- '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' + content | trim + '<|END_OF_TURN_TOKEN|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A template, and what its conversations may have."""

    source: str
    has_system: bool = True
    has_tools: bool = False

    @property
    def template(self) -> str:
        """As a model has it."""
        return self.source.replace("§", "")

    @property
    def with_blocks(self) -> str:
        """That says itself what is to be written."""
        parts = self.source.split("§")
        tags = ("{% generation %}", "{% endgeneration %}")
        return parts[0] + "".join(tags[place % 2] + part for place, part in enumerate(parts[1:]))


def _qwen_3(*, thinks: bool) -> Family:
    thought = "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}"
    empty = "{{- '<think>\\n\\n</think>\\n\\n' }}"
    source = _QWEN_3.replace("ASKED", "" if thinks else empty)
    source = source.replace("BEFORE", "" if thinks else empty)
    source = source.replace("WITHIN", thought if thinks else "")
    return Family(source, has_tools=True)


FAMILIES = {
    "chatml": Family(_CHATML),
    "llama_3": Family(_LLAMA_3),
    "mistral": Family(_MISTRAL),
    "gemma": Family(_GEMMA, has_system=False),
    "phi": Family(_PHI),
    "qwen_3": _qwen_3(thinks=True),
    "qwen_3_without_thinking": _qwen_3(thinks=False),
    "smollm_3": Family(_SMOLLM_3),
    "deepseek": Family(_DEEPSEEK),
    "zephyr": Family(_ZEPHYR),
    "olmo": Family(_OLMO),
    "granite": Family(_GRANITE),
    "command": Family(_COMMAND),
}
_SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>"),
    *("<|assistant|>", "<|end|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>"),
    "<|SYSTEM_TOKEN|>",
]
_ADDED = [
    *("<|User|>", "<|Assistant|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    "<tool_response>",
]
WORDS = [
    *_SPECIAL,
    *_ADDED,
    *(
        "[DOC_END]",
        "[DOC_START]",
        "<|",
        "|>",
        "im_start",
        "end|>",
        "<|im_Xend|>",
        "\\n",
        '"',
        "{{ 1 }}",
    ),
    *(
        "/no_think",
        "</tool_response>",
        "<results>",
        "(results)",
        "user",
        "assistant",
        "naïve 🙂",
        "你好",
    ),
    *("the cat sat", "on the mat", " ", "\n", "\n\n", "a", "Z", "42", "\ue000", "&amp;"),
]


def family_tokenizer(name: str) -> DocumentTokenizer:
    """A small vocabulary with the control tokens of all families; Zephyr's and OLMo's roles are texts."""
    texts = ["the cat sat on the mat, the cat ate", "user\nassistant\nsystem\n", "naïve café"] * 5
    trained = TrainedTokenizer.train(texts, vocab_size=400)
    backend = trained.backend
    are_texts = ("<|system|>", "<|user|>", "<|assistant|>") if name in ("zephyr", "olmo") else ()
    special = [one for one in _SPECIAL if one not in are_texts]
    backend.add_special_tokens([AddedToken(one, normalized=False) for one in special])
    backend.add_tokens([AddedToken(one, special=False, normalized=False) for one in _ADDED])
    return DocumentTokenizer(backend, begin=trained.begin, end=trained.end, pad=trained.end)


def random_conversation(family: Family, numbers: random.Random) -> dict[str, Any]:
    """`messages`, and `tools` for a family that has them; every answer has a letter."""

    def text(most: int = 6) -> str:
        return "".join(numbers.choices(WORDS, k=numbers.randint(1, most)))

    messages: list[dict[str, Any]] = []
    if family.has_system and numbers.random() < 0.4:
        messages.append({"role": "system", "content": text()})
    for _ in range(numbers.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        if family.has_tools and numbers.random() < 0.3:
            function = {"name": "look_up", "arguments": {"what": text(2), "most": 3}}
            call = {"type": "function", "function": function}
            messages += [
                {
                    "role": "assistant",
                    "content": numbers.choice(["", text()]),
                    "tool_calls": [call],
                },
                {"role": "tool", "content": text()},
            ]
        thought = f"<think>\n{text()}b\n</think>\n\n" if numbers.random() < 0.3 else ""
        content = f"{thought}{text()}{numbers.choice('bcd')}{text()}"
        messages.append({"role": "assistant", "content": content})
    tools = [{"type": "function", "function": {"name": "look_up", "description": text()}}]
    return {"messages": messages, "tools": tools if family.has_tools else []}
