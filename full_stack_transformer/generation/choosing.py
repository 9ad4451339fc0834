"""From the logits of requests under way to their next tokens; one that fails does so alone."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from full_stack_transformer.errors import FullStackTransformerError, ModelError, RequestError
from full_stack_transformer.generation.sampling import (
    History,
    adjusted_scores,
    draw,
    draw_allowed,
    most_likely,
    score_tokens,
)
from full_stack_transformer.generation.token_requests import Running
from full_stack_transformer.machine import is_out_of_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What comes next in a request: a token, nothing as all are forbidden, or an end with a problem."""

    token_id: int | None
    problem: FullStackTransformerError | None = None


def choose(batch: Sequence[Running], logits: Tensor) -> list[Choice]:
    """One token for each request from its logits (requests, vocabulary)."""
    return _choose(batch, logits, torch.cat([one.next_uniform() for one in batch]))


def _choose(batch: Sequence[Running], logits: Tensor, uniforms: Tensor) -> list[Choice]:
    """The same with a random number for each; what fails together is drawn one by one."""
    parameters = [one.request.sampling for one in batch]
    try:
        scores = adjusted_scores(logits, parameters, list(map(_history, batch)))
        # NaN counts as the largest score; -inf is a token out of the question.
        likeliest, tops = _largest(scores)
        # Going through a large vocabulary once more takes its time.
        is_unchanged = scores.data_ptr() == logits.data_ptr()
        logit_tops = tops if is_unchanged else _largest(logits)[1]
        if not all(map(math.isfinite, tops)):
            are_finite = torch.tensor([math.isfinite(top) for top in tops], device=scores.device)
            scores = torch.where(are_finite[:, None], scores, 0.0)
        drawn = draw(scores, parameters, uniforms, likeliest).tolist()
    except Exception as error:
        if len(batch) == 1:
            return [Choice(None, problem_of(error))]
        rows = [slice(row, row + 1) for row in range(len(batch))]
        alone = [_choose(batch[row], logits[row], uniforms[row]) for row in rows]
        return [choice for some in alone for choice in some]
    choices = []
    for row, (one, top) in enumerate(zip(batch, tops, strict=True)):
        if not math.isfinite(logit_tops[row]):
            choices.append(Choice(None, _broken_model()))
        elif not top < math.inf:
            choices.append(Choice(None, _broken_parameters()))
        elif top == -math.inf:  # nothing is left
            choices.append(Choice(None))
        else:
            choices.append(_choose_allowed(one, drawn[row], scores[row]))
    return choices


def _largest(scores: Tensor) -> tuple[Tensor, list[float]]:
    """Ids (requests,) of the largest scores (requests, vocabulary), and those scores."""
    ids = most_likely(scores)
    return ids, scores.gather(-1, ids.to(scores.device)[:, None])[:, 0].tolist()


def _choose_allowed(one: Running, token_id: int, scores: Tensor) -> Choice:
    """A drawn token, or another one where it is forbidden."""
    try:
        return Choice(_allowed_token(token_id, scores, one))
    except Exception as error:  # such as one of what the caller forbids
        return Choice(None, problem_of(error))


def _allowed_token(token_id: int, scores: Tensor, running: Running) -> int | None:
    """`token_id`, or another draw from `scores` (vocabulary,) among those that the request allows.

    None when nothing is left.
    """
    forbids = running.request.forbids
    if forbids is None:
        return token_id
    new_ids = running.token_ids[running.num_prompt : running.num_tokens].tolist()

    def is_forbidden(candidate: int) -> bool:
        return forbids([*new_ids, candidate])

    if not is_forbidden(token_id):
        return token_id
    return draw_allowed(scores, running.request.sampling, is_forbidden, running.generator)


def _history(running: Running) -> History:
    request = running.request
    is_early = running.num_new < request.sampling.min_new_tokens
    return History(
        running.token_ids[: running.num_tokens],
        running.num_prompt,
        tuple(request.stop_ids) if is_early else (),
    )


def score_prompt(running: Running, start: int, logits: Tensor) -> None:
    """Remember the log-probabilities of the prompt's tokens that follow those from `start`.

    Args:
        running: whose prompt.
        start: position of the first of the logits.
        logits: (tokens, vocabulary) after each token of a chunk.

    Raises:
        ModelError: some are no numbers.
    """
    following = running.token_ids[start + 1 : min(start + 1 + len(logits), running.num_prompt)]
    num_alternatives = running.request.num_prompt_log_probabilities
    assert num_alternatives is not None
    running.scored_prompt += score_tokens(logits[: len(following)], following, num_alternatives)
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
        raise _broken_model()


def problem_of(error: Exception) -> FullStackTransformerError:
    """What to say of an error that ends a request; one of ours says it itself."""
    if isinstance(error, FullStackTransformerError):
        return error
    if is_out_of_memory(error):
        return ModelError("memory is short for this request; ask for less, or try again later")
    logger.error("a request failed and is ended; the others go on", exc_info=error)
    return ModelError(f"the model failed on this request ({type(error).__name__})")


def _broken_model() -> ModelError:
    return ModelError("the model computed scores that are NaN or infinite; its weights are broken")


def _broken_parameters() -> RequestError:
    return RequestError(
        "with these penalties and this logit_bias scores of tokens are no finite numbers; use smaller ones"
    )
