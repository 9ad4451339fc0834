"""What rounding costs an answer: greedy answers with rounded weights, judged by the fp32 weights.

python tests/benchmarks/rounded_answers.py MODEL_DIRECTORY

The answers to twenty questions are made greedily with each type of weights. transformers in fp32 then says
how probable each answer is, after its question: exp of the mean surprise of its tokens. Greedy answers of the
fp32 weights themselves are the measure. An answer that says something else is not worse for that, so it is
also counted how many answers are the same token by token.
"""

import argparse
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run by its path, this script sees only its own directory

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from full_stack_transformer.generation.text_generator import TextGenerator  # noqa: E402
from tests.generation.test_real_answers import QUESTIONS  # noqa: E402

WEIGHTS = ("float32", "bfloat16", "int8", "int4")


def answers(model: Path, weights_dtype: str, num_tokens: int) -> list[tuple[list[int], list[int]]]:
    """The prompt and the answer to each question, with the token that ends it."""
    generator = TextGenerator.open(model, weights_dtype=weights_dtype, device="cpu")  # type: ignore[arg-type]
    found = []
    for question in QUESTIONS:
        prompt = generator.template.encode(
            [{"role": "user", "content": question}], generator.model.tokenizer
        )
        pieces = generator.pieces(
            prompt,
            num_log_probabilities=0,
            is_chat=True,
            clips=True,
            max_new_tokens=num_tokens,
            temperature=0,
        )
        ids = [scored.token_id for _, piece in pieces for scored in piece.scored]
        found.append((list(prompt), ids))
    return found


@torch.inference_mode()
def perplexity(model: torch.nn.Module, given: list[tuple[list[int], list[int]]]) -> float:
    """Of all answers together."""
    total = num_tokens = 0.0
    for prompt, answer in given:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        targets = torch.tensor(answer)
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        num_tokens += len(answer)
    return math.exp(total / num_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--num_tokens", type=int, default=40)
    options = parser.parse_args()
    made = {kind: answers(options.model, kind, options.num_tokens) for kind in WEIGHTS}
    judge = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    exact = made["float32"]
    for kind, given in made.items():
        found = {
            "weights": kind,
            "perplexity": round(perplexity(judge, given), 4),
            "same_answers": sum(map(bool, (a == b for a, b in zip(given, exact, strict=True)))),
            "num_answers": len(given),
            "num_tokens": sum(len(answer) for _, answer in given),
        }
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
