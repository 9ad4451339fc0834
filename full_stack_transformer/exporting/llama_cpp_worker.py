"""Asks llama.cpp: a program of its own, since llama.cpp ends the whole process where it finds a mistake.

    python llama_cpp_worker.py questions.json answers.json

It may run in an interpreter that has llama-cpp-python and none of our packages: it imports nothing else.
"""

import ctypes
import json
import pathlib
import sys
from typing import Any


def main(questions_file: str, answers_file: str) -> None:
    """Answer the questions: file, texts, framed_texts, prompts, num_tokens."""
    import llama_cpp

    questions = json.loads(pathlib.Path(questions_file).read_text(encoding="utf-8"))
    prompts, num_tokens = questions["prompts"], questions["num_tokens"]
    full = 0  # GGML_TYPE_F32
    model = llama_cpp.Llama(
        questions["file"],
        n_ctx=max([*map(len, prompts), 1]) + num_tokens,
        n_threads=questions["num_threads"],
        type_k=full,
        type_v=full,
        verbose=False,
    )
    answers = {
        "version": llama_cpp.__version__,
        "ids": [model.tokenize(text.encode(), False, False) for text in questions["texts"]],
        "framed_ids": [
            model.tokenize(text.encode(), True, False) for text in questions["framed_texts"]
        ],
        "template": model.metadata.get("tokenizer.chat_template"),
        "continuations": [_continue(llama_cpp, model, ids, num_tokens) for ids in prompts],
    }
    pathlib.Path(answers_file).write_text(json.dumps(answers), encoding="utf-8")


def _continue(llama_cpp: Any, model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The most likely next tokens, one after the other; the end of a text is a token like any other."""
    size = model.n_vocab()
    model.reset()
    found: list[int] = []
    step = prompt
    for _ in range(num_tokens):
        model.eval(step)
        pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        logits = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * size)).contents
        step = [max(range(size), key=logits.__getitem__)]
        found += step
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
