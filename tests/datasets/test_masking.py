"""Hidden tokens: how many, which, by what; the same for a sample in every batch."""

from pathlib import Path

import numpy as np
import torch

from full_stack_transformer.datasets.batches import LengthBatches, SortedBatches
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.datasets.masking import (
    MaskedCollator,
    MaskedSamples,
    Masking,
    choose,
    hide,
    make_masking,
    word_continuations,
)
from full_stack_transformer.tokenization.document_tokenizer import (
    IGNORED_LABEL,
    TrainedTokenizer,
    open_saved_tokenizer,
)


def _masking(dataset: DatasetDirectory, *, whole_words: bool = False) -> Masking:
    tokenizer = open_saved_tokenizer(dataset.tokenizer_directory)
    return make_masking(
        tokenizer,
        mask_id=tokenizer.vocab_size,
        vocab_size=tokenizer.vocab_size + 1,
        probability=0.15,
        whole_words=whole_words,
    )


def test_of_the_chosen_80_10_10_are_masked_replaced_and_kept() -> None:
    masking = Masking(mask_id=999, vocab_size=1000, special_ids=frozenset())
    token_ids = np.arange(20_000) % 900
    hidden = hide(token_ids, masking, np.random.default_rng(0))
    masked, kept = (hidden == 999).mean(), (hidden == token_ids).mean()
    assert abs(masked - 0.8) < 0.02
    assert abs(kept - 0.1) < 0.02


def test_a_batch_hides_what_the_plan_counts(dataset: DatasetDirectory) -> None:
    for whole_words in (False, True):
        masking = _masking(dataset, whole_words=whole_words)
        plan = LengthBatches(MaskedSamples(dataset.train, masking), batch_size=8, seed=1)
        collate = MaskedCollator(dataset.train, masking, pad_id=2)
        for position in range(4):
            batch = collate(plan.batch(0, position))
            is_hidden = batch["labels"] != IGNORED_LABEL
            assert int(is_hidden.sum()) == plan.num_targets(0, position)
            # What was not chosen stands as it is in the corpus; marks and padding never were.
            spans = plan.batch(0, position)
            for row, (start, length) in enumerate(zip(spans.starts, spans.lengths, strict=True)):
                sample = torch.from_numpy(
                    dataset.train.tokens[start : start + length].astype(np.int64)
                )
                hidden = is_hidden[row, :length]
                assert torch.equal(batch["input_ids"][row, :length][~hidden], sample[~hidden])
                assert torch.equal(batch["labels"][row, :length][hidden], sample[hidden])
                assert not set(sample[hidden].tolist()) & masking.special_ids
                assert not is_hidden[row, length:].any()
                assert batch["attention_mask"][row].sum() == length


def test_a_sample_is_hidden_alike_in_every_batch_and_otherwise_in_every_epoch(
    dataset: DatasetDirectory,
) -> None:
    masking = _masking(dataset)
    collate = MaskedCollator(dataset.train, masking, pad_id=2)
    hidden: dict[int, dict[int, list[int]]] = {}
    for batch_size in (4, 7):
        plan = LengthBatches(MaskedSamples(dataset.train, masking), batch_size=batch_size, seed=1)
        for epoch in (0, 1):
            for position in range(plan.num_batches_per_epoch):
                spans = plan.batch(epoch, position)
                labels = collate(spans)["labels"]
                for row, start in enumerate(spans.starts.tolist()):
                    places = (labels[row] != IGNORED_LABEL).nonzero().flatten().tolist()
                    assert hidden.setdefault(epoch, {}).setdefault(start, places) == places
    assert hidden[0] != hidden[1]


def test_whole_words_are_hidden_as_long_as_they_fit() -> None:
    # Tokens of even number begin a word, odd ones go on with it.
    continues = np.arange(100) % 2 == 1
    masking = Masking(
        mask_id=99,
        vocab_size=100,
        special_ids=frozenset({0}),
        probability=0.25,
        continues_word=continues,
    )
    token_ids = np.array([0, *([2, 3] * 15), 0])
    for seed in range(20):
        chosen = sorted(choose(token_ids, masking, np.random.default_rng(seed)).tolist())
        assert len(chosen) == 8
        assert all(chosen[n] + 1 == chosen[n + 1] for n in range(0, 8, 2))
        assert all(token_ids[place] == 2 for place in chosen[::2])


def test_validation_hides_the_same_whatever_the_epoch(dataset: DatasetDirectory) -> None:
    masking = _masking(dataset)
    plan = SortedBatches(MaskedSamples(dataset.valid, masking), batch_size=4)
    collate = MaskedCollator(dataset.valid, masking, pad_id=2)
    first, again = (collate(plan.batch(epoch, 1))["labels"] for epoch in (0, 5))
    assert torch.equal(first, again)


def test_words_are_known_by_the_marks_of_their_tokenizer(
    dataset: DatasetDirectory, tmp_path: Path
) -> None:
    masking = _masking(dataset, whole_words=True)
    tokenizer = open_saved_tokenizer(dataset.tokenizer_directory)
    assert masking.continues_word is not None
    for token, is_continuation in (("Ġthe", False), ("e", True), (".", False), ("Ċ", False)):
        number = tokenizer.backend.token_to_id(token)
        assert number is not None
        assert masking.continues_word[number] == is_continuation


def test_hash_marks_of_a_text_are_no_marks_of_wordpiece() -> None:
    tokenizer = TrainedTokenizer.train(["## heading\n## heading\n" * 9], vocab_size=300)
    continues = word_continuations(tokenizer, tokenizer.vocab_size)
    tokens = [tokenizer.backend.id_to_token(number) for number in range(tokenizer.vocab_size)]
    assert "##" in tokens
    assert continues[tokens.index("h")]
    assert not continues[tokens.index("##")]
