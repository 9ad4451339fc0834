"""How a request becomes shorter until the service takes it."""

from full_stack_transformer.serving.client import Turn, WantedAnswer
from full_stack_transformer.telegram.conversation.writing import Wanted, _shortened


def test_a_very_long_answer_becomes_shorter_before_earlier_turns_are_forgotten() -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    sampling = dict.fromkeys(("temperature", "top_k", "top_p", "repetition_penalty", "seed"))
    request: Wanted | None = WantedAnswer(
        model="m",
        messages=turns,
        max_tokens=8192,
        **sampling,
    )
    seen = []
    while request is not None:
        assert isinstance(request, WantedAnswer)
        seen.append((request.max_tokens, len(request.messages)))
        request = _shortened(request)
    assert seen[:5] == [(8192, 3), (4096, 3), (2048, 3), (1024, 3), (1024, 1)]
    assert seen[-1] == (16, 1)
