"""The tasks by name. Standard library only: the command line and the documents' side import it.

How to add a task: write its file in this folder, add its line to `TASKS`. A task outside the package needs
no line: `--task my_module.MyTask`.
"""

from typing import TYPE_CHECKING, Literal, TypeAlias

from full_stack_transformer.errors import UsageError

# name -> module of this folder : class. Where several tasks can open a model, the first one does.
TASKS = {
    "causal_lm": "causal_lm:CausalLm",
    "supervised_fine_tuning": "supervised_fine_tuning:SupervisedFineTuning",
    "dpo": "dpo:Dpo",
    "orpo": "orpo:Orpo",
    "distillation": "distillation:Distillation",
    "masked_lm": "masked_lm:MaskedLm",
    "sequence_classification": "sequence_classification:SequenceClassification",
    "multiple_choice": "multiple_choice:MultipleChoice",
    "span_selection": "span_selection:SpanSelection",
    "token_labelling": "token_labelling:TokenLabelling",
    "sentence_embedding": "sentence_embedding:SentenceEmbedding",
}
DEFAULT_TASK = "causal_lm"
# They learn from a dataset directory, the others from labelled rows.
CORPUS_TASKS = (
    *("causal_lm", "supervised_fine_tuning", "dpo", "orpo", "distillation"),
    "masked_lm",
)
# The one that `--teacher` chooses.
TEACHER_TASK = "distillation"
# What a dataset directory is for, by the kind of its samples.
TASK_OF_KIND = {
    "documents": "causal_lm",
    "conversations": "supervised_fine_tuning",
    "preferences": "dpo",
}
# What rows are for where their class does not say.
DEFAULT_ROW_TASK = "sequence_classification"
# What `--mlm` of other trainers means, and what a whitened model does.
FILL_MASK_TASK = "masked_lm"
EMBEDDING_TASK = "sentence_embedding"
# name -> the maker of its labelled rows of python_docs in document_sources/task_rows.py.
EXAMPLE_ROWS = {
    "sequence_classification": "package_rows",
    "token_labelling": "name_rows",
    "multiple_choice": "choice_rows",
    "span_selection": "span_rows",
    "sentence_embedding": "sentence_rows",
    "supervised_fine_tuning": "conversation_rows",
}

if TYPE_CHECKING:
    TaskName: TypeAlias = str
    ExampleName: TypeAlias = str
else:  # so that --help lists the names
    TaskName = Literal[tuple(TASKS)] | str
    ExampleName = Literal[tuple(EXAMPLE_ROWS)]


def check_task_name(name: str) -> None:
    """Refuse what is neither a task of this package nor a dotted path.

    Raises:
        UsageError: it is neither.
    """
    if name not in TASKS and "." not in name:
        raise UsageError(
            f"--task must be one of {', '.join(TASKS)}, or my_module.MyTask; found {name!r}"
        )
