"""What adapters cost: requests that all have different ones beside the same requests on the base alone.

python tests/benchmarks/adapters.py --short

    32 requests, 32 adapters of rank 16 on all linear layers ──┐
    32 requests on the base ───────────────────────────────────┴─> one engine, by turns ──> tokens a second

SmolLM2-135M-Instruct's own weights where they are in the cache, else random ones of its shape. Steps that
make a token for every request are timed, in processor time of one thread, because neighbours take turns with
us. Prints as its last line the medians of the ratios and what they are to be; higher is better. Also with all
requests on one adapter, which has no aim, and with --peft relative to PEFT, which has batches of several
adapters in transformers' generate (fp32).
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # run by its path, this script sees only its own directory
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers import PreTrainedModel as Backbone  # noqa: E402

from full_stack_transformer.arguments.sampling import SamplingParameters  # noqa: E402
from full_stack_transformer.generation.engine import Engine  # noqa: E402
from full_stack_transformer.generation.runners.native.decoder import (  # noqa: E402
    NativeRunner,
    WeightsDtype,
)
from full_stack_transformer.generation.token_requests import TokenRequest  # noqa: E402
from full_stack_transformer.machine import processor_name  # noqa: E402
from full_stack_transformer.modelling.adapter_weights import AdapterWeights, LowRank  # noqa: E402
from tests import real_models  # noqa: E402
from tests.benchmarks.machine import commit  # noqa: E402

AIM = 0.7
DTYPES: tuple[WeightsDtype, ...] = ("float32", "bfloat16", "int8")
NUM_STREAMS, RANK, NUM_PROMPT = 32, 16, 16
BASE, MANY, ONE = "base", "many", "one"


def open_backbone() -> tuple[str, Backbone]:
    """SmolLM2, and what its weights are."""
    path = real_models.ROOT / "SmolLM2-135M-Instruct"
    if path.is_dir():
        return "SmolLM2-135M-Instruct", AutoModelForCausalLM.from_pretrained(path).eval()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return "SmolLM2-135M's shape, random weights", LlamaForCausalLM(config).eval()


def random_adapter(backbone: Backbone, seed: int) -> AdapterWeights:
    """Beside all linear layers but the head; it changes what comes out."""
    numbers = torch.Generator().manual_seed(seed)
    head = backbone.get_output_embeddings()
    layers = {}
    for name, layer in backbone.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            num_outputs, num_inputs = layer.weight.shape
            down = torch.randn(RANK, num_inputs, generator=numbers)
            up = torch.randn(num_outputs, RANK, generator=numbers) * 0.2 * layer.weight.std() / RANK
            layers[name] = LowRank(down, up.detach())
    return AdapterWeights(Path(f"adapter-{seed}"), layers)


def run(engine: Engine, adapters: list[int], num_new: int) -> tuple[float, list[list[int]]]:
    """Tokens a second, and the new tokens of each request."""
    sampling = SamplingParameters(temperature=0, max_new_tokens=num_new)
    tokens: dict[int, list[int]] = {}
    for stream, adapter in enumerate(adapters):
        prompt = [(7 * stream + 31 * place) % 40000 + 100 for place in range(NUM_PROMPT)]
        tokens[engine.add(replace(TokenRequest(prompt, sampling), adapter=adapter))] = []
    seconds = []
    while engine.num_running:
        before = time.process_time()
        events = engine.step()
        if len(events) == NUM_STREAMS:
            seconds.append(time.process_time() - before)
        for event in events:
            tokens[event.request_id] += [event.token_id or 0]
    return NUM_STREAMS / statistics.median(seconds), list(tokens.values())


def measure(
    backbone: Backbone, dtype: WeightsDtype, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Tokens a second of each way, by turns."""
    # With one more for each, so that none waits.
    num_blocks = NUM_STREAMS * (1 + -(-(NUM_PROMPT + options.tokens) // 32))
    runner = NativeRunner(
        backbone,
        num_blocks=num_blocks,
        weights_dtype=dtype,
        kv_dtype="float32" if dtype == "float32" else "bfloat16",
        num_threads=1,
    )
    engine = Engine(runner, num_slots=NUM_STREAMS, guesses=False)
    loaded = [engine.add_adapter(random_adapter(backbone, seed)) for seed in range(NUM_STREAMS)]
    ways = {BASE: [0] * NUM_STREAMS, MANY: loaded, ONE: loaded[:1] * NUM_STREAMS}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[list[int]]] = {}
    for _ in range(options.rounds):
        for name, adapters in ways.items():
            rate, found[name] = run(engine, adapters, options.tokens)
            rates[name].append(rate)
    assert found[MANY] != found[BASE] and found[MANY][0] == found[ONE][0], "adapters are mixed up"
    return rates


def peft_rate(backbone: Backbone) -> float:
    """Tokens a second of PEFT, by the difference between texts of two lengths; its adapters do nothing."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules="all-linear")
    names = [f"adapter-{number}" for number in range(NUM_STREAMS)]
    model = get_peft_model(backbone, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    ids = torch.arange(NUM_STREAMS * NUM_PROMPT).view(NUM_STREAMS, NUM_PROMPT) + 100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "adapter_names": names}

    def seconds(num_new: int) -> float:
        before = time.process_time()
        lengths = {"min_new_tokens": num_new, "max_new_tokens": num_new}
        model.eval().generate(**inputs, **lengths, do_sample=False)
        return time.process_time() - before

    seconds(2)
    num_more = 4
    steps = [(seconds(2 + num_more) - seconds(2)) / num_more for _ in range(3)]
    return NUM_STREAMS / statistics.median(steps)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="under a minute")
    parser.add_argument("--peft", action="store_true", help="compare with PEFT, too")
    parser.add_argument("--tokens", type=int, help="new ones of each request (64, short 10)")
    parser.add_argument("--rounds", type=int, help="of each way (6, short 3)")
    options = parser.parse_args()
    options.tokens = options.tokens or (10 if options.short else 64)
    options.rounds = options.rounds or (3 if options.short else 6)
    name, backbone = open_backbone()
    print(
        f"{processor_name()}, one thread, {name}, commit {commit()}, load {os.getloadavg()[0]:.1f}"
    )
    results: dict[str, dict[str, float]] = {"ratios": {}, "aims": {}}
    ours = {}
    for dtype in DTYPES:
        rates = measure(backbone, dtype, options)
        line = ", ".join(f"{way} {statistics.median(some):,.0f}" for way, some in rates.items())
        print(f"{dtype}: tokens/s {line}")
        ours[dtype] = statistics.median(rates[MANY])
        for way, label in ((MANY, f"{NUM_STREAMS} adapters"), (ONE, "one adapter")):
            pairs = zip(rates[way], rates[BASE], strict=True)
            ratio = round(statistics.median(one / other for one, other in pairs), 2)
            results["ratios"][f"{dtype}, {label}"] = ratio
        results["aims"][f"{dtype}, {NUM_STREAMS} adapters"] = AIM
    if options.peft:  # the last one: it changes the backbone
        theirs = peft_rate(backbone)
        print(f"PEFT: tokens/s {theirs:,.0f}")
        results["ratios"]["float32, PEFT"] = round(ours["float32"] / theirs, 1)
        results["aims"]["float32, PEFT"] = 1.0
    print(json.dumps({"benchmark": "adapters", **results}))


if __name__ == "__main__":
    main()
