"""One subject of the benchmark of generation: a process that loads a model once and then answers.

python tests/benchmarks/generation_peers.py JOB

`tests/benchmarks/generation.py` starts this with the interpreter that has the subject. JOB is the fields
of `Job` as JSON. The process says in a line of JSON that it is ready; then each line in holds prompts and
a number of new tokens, each line out the tokens and when each came, in seconds since the prompts were
there. All decode greedily, none stops before its last token, and prompts come as ids. Knows nothing of
repetitions and of ratios.
"""

import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Prompts = list[list[int]]
_now = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Job:
    """Who generates, and with what."""

    subject: str
    model: str
    """Directory of the model of transformers."""
    files: str = ""
    """Directory of what the subject reads in place of it."""
    weights: str = "float32"
    isa: str = ""
    """The most that is to be used, one of `machine.INSTRUCTION_SETS`."""
    num_threads: int = 1
    counts_processor_time: bool = False
    """Of all threads of the process."""
    max_streams: int = 32
    max_tokens: int = 1024
    """Of prompt and new text of a stream that is alone."""
    max_tokens_beside_others: int = 128


@dataclass(frozen=True)
class Generated:
    """For each stream its tokens, and when each came: seconds of `_now`."""

    ids: list[list[int]]
    times: list[list[float]]
    started: float = 0.0
    """When the prompts were handed over, if that was later than the call."""


Generate = Callable[[Prompts, int], Generated]


def load_ours(job: Job) -> Generate:
    """The engine, on the C++ decoder where it runs."""
    from full_stack_transformer.arguments.sampling import SamplingParameters
    from full_stack_transformer.generation.engine import Engine
    from full_stack_transformer.generation.runners.native.decoder import (
        NativeRunner,
        why_not_native,
    )
    from full_stack_transformer.generation.runners.torch import Runner, TorchRunner
    from full_stack_transformer.generation.token_requests import TokenRequest

    backbone = _load_backbone(job, dtype="float32")
    problem = why_not_native(backbone)
    runner: Runner
    num_blocks = job.max_streams * -(-job.max_tokens // 32)
    if problem is None:
        runner = NativeRunner(
            backbone,
            num_blocks=num_blocks,
            weights_dtype=job.weights,  # type: ignore[arg-type]
            kv_dtype="float32" if job.weights == "float32" else "bfloat16",
            max_length=job.max_tokens,
        )
    else:
        if job.weights.startswith("int"):
            raise SystemExit(f"no {job.weights} without the C++ decoder: {problem}")
        print(f"PyTorch in place of the C++ decoder: {problem}", file=sys.stderr)
        backbone = _load_backbone(job, dtype=job.weights)
        runner = TorchRunner(backbone, num_blocks=num_blocks, max_length=job.max_tokens)
    del backbone
    # No guessing: with random weights the text repeats itself, and every guess would come true.
    engine = Engine(runner, num_slots=job.max_streams, guesses=False)

    def generate(prompts: Prompts, num_new: int) -> Generated:
        greedy = SamplingParameters(max_new_tokens=num_new, temperature=0, seed=0)
        streams = {
            engine.add(TokenRequest(prompt, greedy, shares_with=None)): number
            for number, prompt in enumerate(prompts)
        }
        result = Generated([[] for _ in prompts], [[] for _ in prompts])
        while engine.num_running:
            events = engine.step()
            now = _now()
            for event in events:
                if event.token_id is not None:
                    result.ids[streams[event.request_id]].append(event.token_id)
                    result.times[streams[event.request_id]].append(now)
        return result

    return generate


def load_transformers(job: Job) -> Generate:
    """`generate` of transformers."""
    torch = importlib.import_module("torch")
    backbone = _load_backbone(job, dtype=job.weights)
    times: list[float] = []
    goes_on = torch.zeros(job.max_streams, dtype=torch.bool)

    def note_time(input_ids: Any, scores: Any, **_: Any) -> Any:
        times.append(_now())
        return goes_on[: len(input_ids)]

    def generate(prompts: Prompts, num_new: int) -> Generated:
        times.clear()
        input_ids = torch.tensor(prompts)
        output = backbone.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_new,
            do_sample=False,
            stopping_criteria=[note_time],
        )
        return Generated(output[:, input_ids.shape[1] :].tolist(), [times[:] for _ in prompts])

    return generate


def load_continuous_batching(job: Job) -> Generate:
    """Continuous batching of transformers; its manager is made anew for each call, outside the clock."""
    transformers = importlib.import_module("transformers")
    batching = importlib.import_module("transformers.generation.configuration_utils")
    backbone = _load_backbone(job, dtype=job.weights)
    greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)

    def generate(prompts: Prompts, num_new: int) -> Generated:
        num_tokens = len(prompts[0]) + num_new
        config = batching.ContinuousBatchingConfig(
            num_blocks=2 * len(prompts) + 2,
            page_size=num_tokens,
            max_batch_tokens=max(2048, num_tokens),
            allow_block_sharing=False,
        )
        results: dict[str, Any] = {}
        with backbone.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=config
        ) as manager:
            started = _now()
            keys = [
                manager.add_request(
                    prompt, request_id=str(number), max_new_tokens=num_new, record_timestamps=True
                )
                for number, prompt in enumerate(prompts)
            ]
            while len(results) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    results[result.request_id] = result
                elif result is None and not manager.is_running():
                    raise RuntimeError("the thread of continuous batching has ended")
        ordered = [results[key] for key in keys]
        return Generated(
            [result.generated_tokens for result in ordered],
            [result.timestamps for result in ordered],
            started,
        )

    return generate


def load_ctranslate2(job: Job) -> Generate:
    """Greedy search of CTranslate2 over a batch of prompts of equal length."""
    generator = importlib.import_module("ctranslate2").Generator(
        job.files, device="cpu", compute_type=job.weights, intra_threads=job.num_threads
    )

    def generate(prompts: Prompts, num_new: int) -> Generated:
        times: list[list[float]] = [[] for _ in prompts]

        def note_time(step: Any) -> bool:
            times[step.batch_id].append(_now())
            return False

        results = generator.generate_batch(
            [[str(token_id) for token_id in prompt] for prompt in prompts],
            max_length=num_new,
            min_length=num_new,
            end_token=[],
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=note_time,
        )
        return Generated([result.sequences_ids[0] for result in results], times)

    return generate


def load_openvino(job: Job) -> Generate:
    """Continuous batching of OpenVINO GenAI; float32 is float32 in keys and values, too."""
    openvino = importlib.import_module("openvino")
    genai = importlib.import_module("openvino_genai")
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 2048
    scheduler.max_num_seqs = job.max_streams
    scheduler.enable_prefix_caching = False
    # Blocks of 32 tokens, and one for each stream that the last block of it does not fill.
    num_tokens = max(job.max_tokens, job.max_streams * job.max_tokens_beside_others)
    scheduler.num_kv_blocks = num_tokens // 32 + job.max_streams
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": job.num_threads}
    if job.weights == "float32":
        properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    if job.weights == "bfloat16":
        # A processor without AVX-512 takes fp32.
        hint = "bf16" if job.isa.startswith("avx512") else "f32"
        properties |= {"INFERENCE_PRECISION_HINT": hint, "KV_CACHE_PRECISION": "bf16"}
    pipeline = genai.ContinuousBatchingPipeline(job.files, scheduler, "CPU", properties)

    def generate(prompts: Prompts, num_new: int) -> Generated:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_new, True, False
        handles = [
            pipeline.add_request(number, openvino.Tensor(np.array([prompt])), config)
            for number, prompt in enumerate(prompts)
        ]
        step_times: list[float] = []
        first_steps: dict[int, int] = {}
        while pipeline.has_non_finished_requests():
            pipeline.step()
            step_times.append(_now())
            # To read the tokens of each step would cost time; each stream gets one in every step.
            if len(first_steps) < len(prompts):
                for number, handle in enumerate(handles):
                    if number not in first_steps and handle.can_read():
                        first_steps[number] = len(step_times) - 1
        firsts = [first_steps[number] for number in range(len(prompts))]
        return Generated(
            [list(handle.read_all()[0].generated_ids) for handle in handles],
            [step_times[first : first + num_new] for first in firsts],
        )

    return generate


class _LlamaContexts:
    """A model of llama.cpp, and a context for each number of streams."""

    def __init__(self, job: Job) -> None:
        self.library: Any = importlib.import_module("llama_cpp")
        self._job = job
        self._silence = self.library.llama_log_callback(lambda *_: None)
        self.library.llama_log_set(self._silence, ctypes.c_void_p(0))
        self.library.llama_backend_init()
        path = str(Path(job.files, "model.gguf")).encode()
        self._model = self.library.llama_model_load_from_file(
            path, self.library.llama_model_default_params()
        )
        self._contexts: dict[int, Any] = {}

    def context(self, num_streams: int) -> Any:
        """A context with room for as many streams."""
        if num_streams not in self._contexts:
            parameters = self.library.llama_context_default_params()
            # Streams apart: each then attends to its own tokens only, not to masked ones of the others.
            parameters.kv_unified = False
            parameters.n_seq_max = num_streams
            job = self._job
            num_tokens = job.max_tokens if num_streams == 1 else job.max_tokens_beside_others
            parameters.n_ctx = num_streams * num_tokens
            parameters.n_batch = 2048
            parameters.n_threads = parameters.n_threads_batch = job.num_threads
            if job.weights == "float32":
                parameters.type_k = parameters.type_v = self.library.GGML_TYPE_F32
            self._contexts[num_streams] = self.library.llama_init_from_model(
                self._model, parameters
            )
        return self._contexts[num_streams]

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        vocabulary = self.library.llama_model_get_vocab(self._model)
        return int(self.library.llama_vocab_n_tokens(vocabulary))


def load_llama_cpp(job: Job) -> Generate:
    """llama.cpp's own calls for batches of sequences."""
    contexts = _LlamaContexts(job)
    library, vocab_size = contexts.library, contexts.vocab_size
    batch = library.llama_batch_init(2048, 0, 1)

    def decode(context: Any, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """The likeliest token after each row (token, position, stream) that wants logits."""
        for number, (token_id, position, stream, wants_logits) in enumerate(rows):
            batch.token[number], batch.pos[number] = token_id, position
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, stream
            batch.logits[number] = wants_logits
        batch.n_tokens = len(rows)
        if library.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode has failed")
        num_wanted = sum(row[3] for row in rows)
        logits = np.ctypeslib.as_array(library.llama_get_logits(context), (num_wanted, vocab_size))
        ids: list[int] = logits.argmax(axis=1).tolist()
        return ids

    def generate(prompts: Prompts, num_new: int) -> Generated:
        context = contexts.context(len(prompts))
        library.llama_memory_clear(library.llama_get_memory(context), False)
        length = len(prompts[0])
        rows = [
            (token_id, position, stream, position == length - 1)
            for stream, prompt in enumerate(prompts)
            for position, token_id in enumerate(prompt)
        ]
        steps = [decode(context, rows)]
        times = [_now()]
        for position in range(length, length + num_new - 1):
            rows = [(token_id, position, stream, True) for stream, token_id in enumerate(steps[-1])]
            steps.append(decode(context, rows))
            times.append(_now())
        return Generated([list(ids) for ids in zip(*steps, strict=True)], [times] * len(prompts))

    return generate


def _versions(job: Job, packages: Sequence[str]) -> dict[str, str]:
    versions = {name: version(name) for name in packages}
    if job.subject == "llama.cpp":  # nothing but its build holds it back
        library: Any = importlib.import_module("llama_cpp")
        features = library.llama_print_system_info().decode().split(" | ")
        versions["its instructions"] = "+".join(
            one.split(" = ")[0].removeprefix("CPU : ") for one in features if one.endswith(" = 1")
        )
    return versions


def _load_backbone(job: Job, dtype: str) -> Any:
    importlib.import_module("torch").set_num_threads(job.num_threads)
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()


SUBJECTS: dict[str, tuple[Callable[[Job], Generate], tuple[str, ...]]] = {
    "ours": (load_ours, ("torch", "transformers")),
    "transformers": (load_transformers, ("transformers", "torch")),
    "continuous batching": (load_continuous_batching, ("transformers", "torch")),
    "ctranslate2": (load_ctranslate2, ("ctranslate2",)),
    "openvino": (load_openvino, ("openvino", "openvino-genai")),
    "llama.cpp": (load_llama_cpp, ("llama-cpp-python",)),
}
"""What loads the model, and the packages whose versions are told."""


def _memory_mb(field: str) -> float:
    """VmHWM, the most that was resident, or VmRSS, what is now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def main() -> None:
    global _now
    # Libraries print; what they print is not to stand between the lines of JSON.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = Job(**json.loads(sys.argv[1]))
    if job.counts_processor_time:
        _now = time.process_time
    load, packages = SUBJECTS[job.subject]
    generate = load(job)
    loading_peak_mb = _memory_mb("VmHWM")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again
    print(json.dumps(_versions(job, packages)), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started = _now()
        generated = generate(request["prompts"], request["num_new"])
        started = max(started, generated.started)
        answer = {
            "ids": generated.ids,
            "times": [[moment - started for moment in one] for one in generated.times],
            "loading_peak_mb": loading_peak_mb,
            "generating_peak_mb": _memory_mb("VmHWM"),
        }
        print(json.dumps(answer), file=answers, flush=True)
    # Threads of a runtime may still wait for work; nothing is left to be written.
    os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
