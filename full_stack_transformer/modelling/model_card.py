"""The model card: README.md of a model directory, in the form that the Hugging Face hub reads.

Contains the description, the options and the curve, and nothing else: no licence, no language, no claim about
what the model is good for. Reads and writes no files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Key in description.json of an adapter: the model that it was trained on.
BASE_KEY = "base_model"
_MAX_CURVE_ROWS = 20
# Options that say where files are or how progress is shown, not what was learned.
_PLACES = frozenset(
    {
        "dataset_dir",
        "experiments_root",
        "experiment_name",
        "resume",
        "enable_progress_bar",
        "num_generated_samples",
        "histograms",
        "profile",
    }
)
_FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: {tag}
tags:
- full_stack_transformer
---
"""
_USE = """\
## Use

With transformers, from this directory:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer("The beginning of a text", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

As a service with the API of OpenAI, or on the command line:

```sh
fst serve .
fst generate . --prompt "The beginning of a text"
```
"""


_USE_OF_ADAPTER = """\
## Use

With PEFT, from this directory, or merged with its base:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(".")
```

```sh
fst merge . --output_dir merged
fst serve merged
```
"""


_USE_OF_OTHER_TASKS = """\
## Use

From Python, as it was trained:

```python
from pathlib import Path

from full_stack_transformer.tasks.opening import open_task

opened = open_task(Path("."))
print(opened.task.predict([{{"text": "A text"}}], opened.backbone))  # fields: {fields}
```

On the command line:

```sh
fst evaluate . rows.jsonl
```
"""


@dataclass(frozen=True)
class TaskWords:
    """What a card says of a task; by default of generating."""

    pipeline_tag: str = "text-generation"
    """What the hub and transformers' `pipeline` call it."""
    does: str = "predicts the next token"
    """What a model of it does."""
    fields: str = ""
    """The fields of a row to predict; empty for a model that generates."""


_LANGUAGE_MODEL = TaskWords()


def model_card(
    description: Mapping[str, Any],
    arguments: Mapping[str, Any],
    curve: Sequence[tuple[int, float]],
    words: TaskWords = _LANGUAGE_MODEL,
) -> str:
    """The text of README.md.

    Args:
        description: the content of description.json. Used if present: `experiment`, `model_type`,
            `num_parameters`, `context_length`, `step`, `validation_loss`, `validation_perplexity`,
            `validation_bits_per_byte`, `base_model` (of an adapter), `dataset` (the description of the
            dataset) and `averaged_from` (`model`, `step`, `validation_loss` of each source).
        arguments: the options of the training by name.
        curve: (optimizer step, validation loss in nats a token) of each validation, in order.
        words: of the model's task.
    """
    sections = [
        _front_matter(description, words),
        f"# {_name(description)}\n",
        _summary(description, words),
        _metrics(description),
        _sources(description.get("averaged_from", ())),
        _data(description.get("dataset", {})),
        _options(arguments),
        _curve(curve, description.get("step")),
        _use(description, words),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(description: Mapping[str, Any], words: TaskWords) -> str:
    matter = _FRONT_MATTER.format(tag=words.pipeline_tag)
    if BASE_KEY not in description:
        return matter
    library = f"library_name: peft\nbase_model: {_cell(description[BASE_KEY])}"
    return matter.replace("library_name: transformers", library)


def _use(description: Mapping[str, Any], words: TaskWords) -> str:
    if BASE_KEY in description:
        return _USE_OF_ADAPTER
    return _USE_OF_OTHER_TASKS.format(fields=words.fields) if words.fields else _USE


def _name(description: Mapping[str, Any]) -> str:
    if "averaged_from" in description:
        return f"Average of {len(description['averaged_from'])} models"
    return str(description.get("experiment", "Language model"))


def _summary(description: Mapping[str, Any], words: TaskWords) -> str:
    kind = f"a {description['model_type']} model" if "model_type" in description else "a model"
    facts = [f"{kind} that {words.does}"]
    if "num_parameters" in description:
        facts.append(f"{description['num_parameters']:,} parameters")
    if "context_length" in description:
        facts.append(f"a context of {description['context_length']:,} tokens")
    return f"{facts[0].capitalize()}{''.join(f', {fact}' for fact in facts[1:])}.\n"


def _metrics(description: Mapping[str, Any]) -> str:
    names = {
        "step": ("optimizer steps", "{:,}"),
        "validation_loss": ("validation loss, nats a token", "{:.4f}"),
        "validation_perplexity": ("validation perplexity, of this tokenizer", "{:,.2f}"),
        "validation_bits_per_byte": ("validation bits per byte of text", "{:.3f}"),
    }
    rows = [
        (label, form.format(description[name]))
        for name, (label, form) in names.items()
        if description.get(name) is not None
    ]
    rows += [
        (name.replace("_", " "), f"{value:.4f}")
        for name, value in description.items()
        if name.startswith("validation_") and name not in names and isinstance(value, float)
    ]
    return _table(("figure", "value"), rows)


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    if not sources:
        return ""
    rows = [
        (
            _cell(source["model"]),
            f"{source['step']:,}" if source.get("step") is not None else "",
            f"{source['validation_loss']:.4f}" if source.get("validation_loss") is not None else "",
        )
        for source in sources
    ]
    table = _table(("model", "step", "validation loss"), rows)
    return f"## Averaged\n\nEach weight is the mean of those of these models.\n\n{table}"


def _data(dataset: Mapping[str, Any]) -> str:
    if not dataset:
        return ""
    rows = [("dataset", _cell(dataset["dataset_name"]))] if "dataset_name" in dataset else []
    for split, label in (("train", "training"), ("valid", "validation")):
        counts = dataset.get("counts", {}).get(split, {})
        known = {
            "documents": counts.get("num_documents"),
            "samples": dataset.get(f"number_of_{split}_samples"),
            "tokens": dataset.get(f"number_of_{split}_tokens"),
            "rows": dataset.get(f"number_of_{split}_rows"),
        }
        parts = [f"{number:,} {what}" for what, number in known.items() if number is not None]
        rows.append((label, ", ".join(parts)))
    tokenizer = [
        _cell(dataset[name])
        for name in ("tokenizer_cls_name", "tokenizer_path")
        if dataset.get(name)
    ]
    if "vocab_size" in dataset:
        tokenizer.append(f"{dataset['vocab_size']:,} tokens")
    rows.append(("tokenizer", ", ".join(tokenizer)))
    if "max_sample_length" in dataset:
        lengths = f"{dataset.get('min_sample_length', 1):,} to {dataset['max_sample_length']:,}"
        rows.append(("tokens in a sample", lengths))
    return f"## Data\n\n{_table(('what', 'value'), [row for row in rows if row[1]])}"


def _options(arguments: Mapping[str, Any]) -> str:
    rows = [
        (f"`--{name}`", _cell(value))
        for name, value in arguments.items()
        if name not in _PLACES and value is not None
    ]
    return f"## Training\n\n{_table(('option', 'value'), rows)}" if rows else ""


def _curve(curve: Sequence[tuple[int, float]], exported_step: int | None) -> str:
    """Evenly spaced validations, with the first, the last and the exported one."""
    if not curve:
        return ""
    # A row is kept for the exported step, which may lie between the others.
    num_rows = len(curve) if len(curve) <= _MAX_CURVE_ROWS else _MAX_CURVE_ROWS - 1
    spacing = (len(curve) - 1) / max(num_rows - 1, 1)
    shown = {round(row * spacing) for row in range(num_rows)}
    shown |= {row for row, (step, _) in enumerate(curve) if step == exported_step}
    rows = [
        (f"{curve[row][0]:,}", f"{curve[row][1]:.4f}", f"{_perplexity(curve[row][1]):,.2f}")
        for row in sorted(shown)
    ]
    return f"## Curve\n\n{_table(('step', 'validation loss', 'perplexity'), rows)}"


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    """A value for a cell of a table; of an absolute path only its last part."""
    text = str(value)
    if isinstance(value, (str, Path)) and Path(text).is_absolute():
        text = Path(text).name
    return " ".join(text.split()).replace("|", r"\|")
