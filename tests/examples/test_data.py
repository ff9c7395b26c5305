import collections

import numpy as np
import pytest
import toy_bert
from bert_finetune import data, pretrained


@pytest.fixture
def tokenizer(tmp_path):
    return pretrained.read_tokenizer(toy_bert.write_model(tmp_path))


def test_pairs_as_bert_sees_them(tokenizer):
    features = data.tokenize(
        tokenizer, [["Good film", "red " * 9], ["no", "blue cat"]], [1, 0], 8
    )
    tokens = [tokenizer.convert_ids_to_tokens(row) for row in features.input_ids]
    assert tokens == [
        "[CLS] good film [SEP] no [SEP] [PAD] [PAD]".split(),
        # The longer text gives way.
        "[CLS] red red red [SEP] blue cat [SEP]".split(),
    ]
    assert features.attention_mask.tolist() == [[1] * 6 + [0] * 2, [1] * 8]
    assert features.token_type_ids.tolist() == [
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1],
    ]
    assert features.labels.tolist() == [1, 0]


def test_tokenised_in_pieces(tokenizer, monkeypatch):
    texts = [["good", "bad film", "no", "yes yes", "red"]]
    whole = data.tokenize(tokenizer, texts, [0, 1, 0, 1, 0], 6)
    monkeypatch.setattr(data, "_TOKENIZER_CHUNK", 2)
    for a, b in zip(
        whole, data.tokenize(tokenizer, texts, [0, 1, 0, 1, 0], 6), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def features_of(size):
    column = np.arange(size)
    matrix = column[:, None] * np.ones(3, int)
    return data.Features(matrix, matrix, matrix, column)


def seen(batch):
    return batch["labels"][batch["weights"] > 0].tolist()


def test_every_epoch_has_every_example_once_in_another_order():
    features = features_of(10)
    batches = list(data.train_batches(features, 4, 6, seed=1))
    assert [len(seen(batch)) for batch in batches] == [4, 4, 2, 4, 4, 2]
    epochs = [sum(map(seen, batches[:3]), []), sum(map(seen, batches[3:]), [])]
    assert epochs[0] != epochs[1]
    assert all(collections.Counter(e) == collections.Counter(range(10)) for e in epochs)
    again = list(data.train_batches(features, 4, 6, seed=1))
    assert list(map(seen, again)) == list(map(seen, batches))
    other = list(data.train_batches(features, 4, 6, seed=2))
    assert list(map(seen, other)) != list(map(seen, batches))
    for batch in batches:
        assert batch["input_ids"].shape == (4, 3)
        np.testing.assert_array_equal(batch["input_ids"][:, 0], batch["labels"])


def test_distinct_tokens_of_the_batches_to_come():
    tokens = np.random.default_rng(0).integers(0, 50, (23, 6))
    features = data.Features(tokens, tokens, tokens, np.arange(23))
    for num_steps in (1, 5, 13):
        batches = data.train_batches(features, 4, num_steps, seed=1)
        expected = max(len(np.unique(batch["input_ids"])) for batch in batches)
        assert data.max_distinct_tokens(features, 4, num_steps, seed=1) == expected


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_evaluation_sees_every_example_once_in_order(size):
    batches = list(data.eval_batches(features_of(size), 4))
    assert all(batch["labels"].shape == (4,) for batch in batches)
    assert sum(map(seen, batches), []) == list(range(size))
