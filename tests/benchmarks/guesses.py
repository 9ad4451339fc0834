"""What guesses of next tokens save: a chat model with and without them, by turns.

OMP_NUM_THREADS=1 python -m tests.benchmarks.guesses MODEL --draft_model MODEL --streams 1 2

    questions of a chat, so many at once ──> engine with guesses, engine without, A B B A ──> tokens a second

Both run in this process, in one thread, and processor time is counted, because neighbours take turns with us.
Every text must be the same with and without. Prompts are read before the time begins; what the draft model
reads counts. Prints a line of JSON for each number of streams, with the median of the ratios.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.open_draft import DraftSource, open_draft
from full_stack_transformer.generation.open_engine import open_engine
from full_stack_transformer.generation.token_requests import TokenRequest
from full_stack_transformer.modelling.model_directory import open_model
from full_stack_transformer.modelling.model_files import find_model_directory
from full_stack_transformer.tokenization.chat import ChatMessage, load_chat_template
from tests.benchmarks.machine import commit

QUESTIONS = (
    "Explain how a bicycle works to a child.",
    "Write a short story about a fox and a crow.",
    "What is the capital of France, and what can one see there?",
    "List five uses of a hammer.",
    "Write a Python function that sorts a list of numbers.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "Rewrite more politely: send me the report now, I have waited for it since Monday.",
)
SAMPLINGS = {
    "greedy": SamplingParameters(temperature=0),
    "sampled": SamplingParameters(temperature=0.8, top_p=0.95),
}


def run(engine: Engine, requests: Sequence[TokenRequest]) -> tuple[list[list[int]], float]:
    """New tokens of each request, and seconds of processor time for those after the first ones."""
    tokens: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    seconds = 0.0
    while engine.num_running:
        is_read = all(tokens.values())
        before = time.thread_time()
        events = engine.step()
        seconds += (time.thread_time() - before) * is_read
        for event in events:
            if event.token_id is not None:
                tokens[event.request_id].append(event.token_id)
    return list(tokens.values()), seconds


def main() -> None:
    """Measure and print."""
    if torch.get_num_threads() != 1:
        sys.exit("only one thread is timed: start this with OMP_NUM_THREADS=1")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--draft_model", type=Path)
    parser.add_argument("--weights_dtype", default="float32")
    parser.add_argument("--draft_weights_dtype", default="auto")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sampling", choices=SAMPLINGS, default="greedy")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    model = open_model(arguments.model, device="cpu")
    template = load_chat_template(find_model_directory(arguments.model))
    draft = None
    if arguments.draft_model is not None:
        source = DraftSource(arguments.draft_model, arguments.draft_weights_dtype)
        draft = open_draft(source, model, arguments.model, device="cpu")

    def opened(*, guesses: bool) -> Engine:
        engine = open_engine(
            model.backbone,
            num_slots=max(arguments.streams),
            weights_dtype=arguments.weights_dtype,
            max_length=1024,
            draft=draft if guesses else None,
        )
        if not guesses:
            engine.guesses = None
        return engine

    for streams in arguments.streams:
        engines = {"with": opened(guesses=True), "without": opened(guesses=False)}
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(arguments.rounds):
            asked = [
                QUESTIONS[(number * streams + place) % len(QUESTIONS)] for place in range(streams)
            ]
            requests = [
                TokenRequest(
                    template.encode([ChatMessage(role="user", content=one)], model.tokenizer),
                    replace(
                        SAMPLINGS[arguments.sampling],
                        max_new_tokens=arguments.tokens,
                        seed=number * streams + place,
                    ),
                )
                for place, one in enumerate(asked)
            ]
            found = {}
            for name in sorted(engines, reverse=number % 2 == 1):
                found[name], seconds = run(engines[name], requests)
                rates[name].append(sum(len(one) - 1 for one in found[name]) / seconds)
            assert found["with"] == found["without"], "guesses changed a text"
        print(json.dumps(report(engines["with"], rates, arguments, streams)), flush=True)


def report(
    engine: Engine, rates: dict[str, list[float]], arguments: argparse.Namespace, streams: int
) -> dict[str, object]:
    """What to print of one number of streams."""
    guesses = engine.guesses
    assert guesses is not None
    pairs = zip(rates["with"], rates["without"], strict=True)
    return {
        "commit": commit(),
        "streams": streams,
        "sampling": arguments.sampling,
        "model": engine.computed_by,
        "draft": None if guesses.draft is None else guesses.draft.computed_by,
        "tokens per second": {
            name: round(statistics.median(some), 1) for name, some in rates.items()
        },
        "times as fast": round(statistics.median(one / other for one, other in pairs), 2),
        "guesses": {
            kind: f"{counts.num_accepted} of {counts.num_proposed} right in {counts.num_drafts}"
            for kind, counts in guesses.counts.items()
        },
        "off": [f"{kind}, {num}" for (kind, num), is_off in guesses.are_off.items() if is_off],
    }


if __name__ == "__main__":
    main()
