import collections
import threading

import datasets
import numpy as np
import pytest
import toy_bert
from bert_finetune.data.batches import (
    TrainData,
    batch_lengths,
    batch_of,
    eval_batches,
    max_distinct_tokens,
    prefetch,
    train_batches,
)
from bert_finetune.data.features import Features, tokenize
from bert_finetune.model import pretrained


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return pretrained.read_tokenizer(toy_bert.write_model(tmp_path_factory.mktemp("m")))


def tokenize_columns(tokenizer, columns, max_length, **options):
    dataset = datasets.Dataset.from_dict(columns)
    targets = {"labels": np.arange(len(dataset), dtype=np.int32)}
    return tokenize(dataset, tokenizer, list(columns), targets, max_length, **options)


def test_pairs_as_bert_sees_them(tokenizer):
    features = tokenize_columns(
        tokenizer, {"a": ["Good film", "red " * 9], "b": ["no", "blue cat"]}, 8
    )
    batch = batch_of(features, np.array([0, 1]), 2, [8])
    tokens = [tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"]]
    assert tokens == [
        "[CLS] good film [SEP] no [SEP] [PAD] [PAD]".split(),
        # The longer text is truncated.
        "[CLS] red red red [SEP] blue cat [SEP]".split(),
    ]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 8]
    assert batch["token_type_ids"].tolist() == [
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1],
    ]
    assert batch["labels"].tolist() == [0, 1]
    assert {column.dtype for name, column in batch.items() if name != "weights"} == {
        np.dtype(np.int32)
    }


def test_tokens_are_cached_until_something_changes(tmp_path, tokenizer):
    toy_bert.write_parquet(tmp_path / "data.parquet", {"a": ["good", "bad film"]})
    dataset = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "data.parquet"), split="train"
    )
    calls = []

    class Counting(type(tokenizer)):
        def __call__(self, *args, **kwargs):
            calls.append(args)
            return super().__call__(*args, **kwargs)

    counting = Counting.from_pretrained(toy_bert.write_model(tmp_path / "model"))
    targets = {"labels": np.zeros(2, np.int32)}

    def tokens_of(length, **options):
        return tokenize(dataset, counting, ["a"], targets, length, **options)

    first = tokens_of(8)
    again = tokens_of(8)
    assert len(calls) == 1
    np.testing.assert_array_equal(first.tokens, again.tokens)
    tokens_of(3)
    assert len(calls) == 2
    tokens_of(8, overwrite_cache=True)
    assert len(calls) == 3


def features_of(sizes, seed=0):
    """Returns examples of these sizes; the first token of each is its index."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    tokens = rng.integers(1, 50, starts[-1]).astype(np.int32)
    tokens[starts[:-1]] = np.arange(len(sizes))
    labels = np.arange(len(sizes), dtype=np.int32)
    return Features(tokens, (tokens % 2).astype(np.int8), starts, {"labels": labels}, 0)


def train_data_of(sizes, batch_size, num_steps, lengths=(8,), seed=1):
    return TrainData(features_of(sizes), batch_size, num_steps, lengths, seed)


def seen(batch):
    return batch["labels"][batch["weights"] > 0].tolist()


def test_every_epoch_has_every_example_once_in_another_order():
    sizes = [3] * 10
    batches = list(train_batches(train_data_of(sizes, 4, 6)))
    assert [len(seen(batch)) for batch in batches] == [4, 4, 2, 4, 4, 2]
    epochs = [sum(map(seen, batches[:3]), []), sum(map(seen, batches[3:]), [])]
    assert epochs[0] != epochs[1]
    assert all(collections.Counter(e) == collections.Counter(range(10)) for e in epochs)
    again = train_batches(train_data_of(sizes, 4, 6))
    assert list(map(seen, again)) == list(map(seen, batches))
    other = train_batches(train_data_of(sizes, 4, 6, seed=2))
    assert list(map(seen, other)) != list(map(seen, batches))
    for batch in batches:
        assert batch["input_ids"].shape == (4, 8)
        np.testing.assert_array_equal(batch["input_ids"][:, 0], batch["labels"])


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 6])
def test_the_order_resumes_where_it_stopped(start):
    train_data = train_data_of([3] * 10, 4, 7)
    uninterrupted = list(map(seen, train_batches(train_data)))
    resumed = list(map(seen, train_batches(train_data, start)))
    assert resumed == uninterrupted[start:]


@pytest.mark.parametrize("max_length", [17, 32, 100, 128, 512])
def test_lengths_rise_to_the_longest(max_length):
    lengths = batch_lengths(max_length)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == max_length
    assert max_length > 32 or len(lengths) == 1


def test_a_batch_is_padded_to_the_smallest_length_that_holds_it():
    sizes = np.random.default_rng(0).integers(1, 9, 40)
    short = train_data_of(sizes, 3, 30, lengths=(2, 4, 8))
    fixed = short._replace(lengths=(8,))
    lengths = set()
    batches = zip(train_batches(short), train_batches(fixed), strict=True)
    for batch, padded in batches:
        length = batch["input_ids"].shape[1]
        lengths.add(length)
        longest = padded["attention_mask"].sum(axis=1).max()
        assert longest <= length <= max(2, 2 * longest - 1)
        for name, column in batch.items():
            np.testing.assert_array_equal(
                column, padded[name][:, :length] if column.ndim > 1 else padded[name]
            )
        assert not np.any(padded["input_ids"][:, length:])
    assert len(lengths) > 1
    assert short.max_length == max(lengths) == 8
    assert fixed.max_length == 8


@pytest.mark.parametrize("num_steps", [1, 5, 13])
@pytest.mark.parametrize("lengths", [(8,), (2, 4, 8)])
def test_distinct_tokens_are_exact_if_all_batches_are_known(num_steps, lengths):
    sizes = np.random.default_rng(0).integers(1, 9, 23)
    train_data = train_data_of(sizes, 4, num_steps, lengths)
    batches = list(train_batches(train_data))
    expected = max(len(np.unique(batch["input_ids"])) for batch in batches)
    assert max_distinct_tokens(train_data, batches) == expected


def test_distinct_tokens_of_a_long_run_are_bounded_from_its_first_batches():
    sizes = np.random.default_rng(0).integers(1, 9, 230)
    train_data = train_data_of(sizes, 16, 200)
    counts = [len(np.unique(b["input_ids"])) for b in train_batches(train_data)]
    bound = max_distinct_tokens(train_data, list(train_batches(train_data))[:20])
    assert max(counts) <= bound < 2 * max(counts)


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_evaluation_sees_every_example_once_in_order(size):
    batches = list(eval_batches(features_of([3] * size), 4, [8]))
    assert all(batch["labels"].shape == (4,) for batch in batches)
    assert sum(map(seen, batches), []) == list(range(size))


def test_prefetching_changes_nothing_and_runs_ahead_a_little():
    made, main = [], threading.get_ident()

    def numbers():
        for i in range(20):
            made.append(threading.get_ident())
            yield i

    coming = prefetch(numbers())
    assert next(coming) == 0
    assert [0, *coming] == list(range(20))
    assert len(made) == 20
    assert main not in made


def test_an_error_while_prefetching_is_raised_in_order():
    def numbers():
        yield 1
        raise ValueError("the second")

    coming = prefetch(numbers())
    assert next(coming) == 1
    with pytest.raises(ValueError, match="the second"):
        next(coming)


def test_prefetching_ends_with_its_reader():
    before = threading.active_count()
    coming = prefetch(iter(range(100)))
    next(coming)
    coming.close()
    assert threading.active_count() == before
