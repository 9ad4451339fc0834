"""A model as lm-evaluation-harness sees one: three questions, answered by our runner and engine.

Imported only where lm-evaluation-harness is installed; see `harness`.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from lm_eval.api.model import LM

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.evaluation.continued_texts import continue_texts
from full_stack_transformer.evaluation.log_likelihoods import (
    continuation_span,
    log_likelihoods,
    open_scoring_runner,
    rolling_spans,
)
from full_stack_transformer.generation.open_engine import open_engine
from full_stack_transformer.generation.runners.native.decoder import KvDtype, WeightsDtype
from full_stack_transformer.generation.runners.torch import Runner
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.modelling.backbones import context_length
from full_stack_transformer.modelling.model_directory import OpenedModel

# Length of a text, if the task does not say.
_MAX_NEW_TOKENS = 256


class HarnessModel(LM):
    """An opened model; texts begin as its tokenizer says: with a begin token, or without one.

    Args:
        model: what computes and its tokenizer.
        num_slots: texts computed at once.
        weights_dtype: what to compute with.
        kv_dtype: of keys and values.
    """

    def __init__(
        self,
        model: OpenedModel,
        *,
        num_slots: int,
        weights_dtype: WeightsDtype,
        kv_dtype: Literal["auto"] | KvDtype = "auto",
    ) -> None:
        super().__init__()
        self._model = model
        self._num_slots = num_slots
        self._weights_dtype = weights_dtype
        self._kv_dtype: Literal["auto"] | KvDtype = kv_dtype
        self._max_length = context_length(model.backbone.config)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """How probable each continuation is after its context, and whether greedy decoding gives it."""
        spans = []
        for request in requests:
            context, continuation = request.args
            spans.append(
                continuation_span(
                    context, continuation, self._model.tokenizer, max_length=self._max_length
                )
            )
        return [(one.value, one.is_greedy) for one in log_likelihoods(spans, self._runner)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """How probable each text is, however long."""
        totals = []
        for request in requests:
            [text] = request.args
            spans = rolling_spans(text, self._model.tokenizer, max_length=self._max_length)
            totals.append(sum(one.value for one in log_likelihoods(list(spans), self._runner)))
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """How each prompt goes on, up to its stop strings."""
        texts = []
        for request in requests:
            prompt, options = request.args
            sampling = self._sampling(options)
            prompt_ids = self._model.tokenizer.encode_prompt(prompt)
            room = max(1, self._max_length - sampling.max_new_tokens)
            texts += continue_texts(self._generator, [prompt_ids[-room:]], sampling)
        return texts

    def _sampling(self, options: dict[str, Any]) -> SamplingParameters:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        max_new_tokens = int(options.get("max_gen_toks", _MAX_NEW_TOKENS))
        return SamplingParameters(
            # Half of the context stays for the prompt.
            max_new_tokens=min(max_new_tokens, self._max_length // 2),
            temperature=temperature,
            top_p=options.get("top_p", 1.0),
            stop=tuple(text for text in until if text),
            seed=0,
        )

    # Opened when they are first needed; most tasks ask one kind of question.
    @cached_property
    def _runner(self) -> Runner:
        return open_scoring_runner(
            self._model.backbone,
            weights_dtype=self._weights_dtype,
            kv_dtype=self._kv_dtype,
            max_length=self._max_length,
        )

    @cached_property
    def _generator(self) -> TextGenerator:
        engine = open_engine(
            self._model.backbone,
            num_slots=self._num_slots,
            weights_dtype=self._weights_dtype,
            kv_dtype=self._kv_dtype,
        )
        return TextGenerator(self._model, engine=engine)
