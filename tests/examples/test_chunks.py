import datasets
import numpy as np
import pytest
import toy_bert
from bert_finetune.errors import UserError
from bert_finetune.model import pretrained
from bert_finetune.squad import chunks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return pretrained.read_tokenizer(toy_bert.write_model(tmp_path_factory.mktemp("m")))


def generated(num, seed):
    """Returns questions and contexts with unknown words, punctuation and odd spaces."""
    rng = np.random.default_rng(seed)
    words = [*toy_bert.WORDS, "Good", "Café", "unknown", "red,", "(blue)", "cat's"]
    spaces = [" ", "  ", "\n", "\u00a0"]

    def text(size):
        drawn = zip(rng.choice(words, size), rng.choice(spaces, size), strict=True)
        return "".join(word + space for word, space in drawn)

    return {
        "question": [text(rng.integers(1, 7)) for _ in range(num)],
        "context": [text(rng.integers(1, 60)) for _ in range(num)],
    }


def cut(columns, tokenizer, max_length, stride):
    return chunks.cut(
        datasets.Dataset.from_dict(columns), tokenizer, max_length, stride
    )


def expected_chunks(columns, tokenizer, max_length, stride):
    """Yields tokens and offsets by definition, from separately tokenized texts."""
    alone = {"add_special_tokens": False, "return_offsets_mapping": True}
    for row, (question, context) in enumerate(zip(*columns.values(), strict=True)):
        asked, told = tokenizer(question, **alone), tokenizer(context, **alone)
        size = max_length - 3 - len(asked["input_ids"])
        start, total = 0, len(told["input_ids"])
        while True:
            piece = slice(start, start + size)
            tokens = [
                *(tokenizer.cls_token_id, *asked["input_ids"], tokenizer.sep_token_id),
                *(*told["input_ids"][piece], tokenizer.sep_token_id),
            ]
            no_context = [(-1, -1)] * (len(asked["input_ids"]) + 2)
            offsets = [*no_context, *told["offset_mapping"][piece], (-1, -1)]
            yield row, tokens, offsets
            if start + size >= total:
                break
            start += size - stride


@pytest.mark.parametrize(
    ("max_length", "stride"), [(32, 0), (32, 5), (24, 1), (30, 9), (200, 50)]
)
def test_chunks_match_the_definition(tokenizer, max_length, stride):
    columns = generated(80, seed=max_length + stride)
    found = cut(columns, tokenizer, max_length, stride)
    starts = found.features.starts
    assert found.features.num_examples == len(found.questions)
    for i, (row, tokens, offsets) in enumerate(
        expected_chunks(columns, tokenizer, max_length, stride)
    ):
        span = slice(starts[i], starts[i + 1])
        assert found.questions[i] == row
        assert found.features.tokens[span].tolist() == tokens
        assert found.first_chars[span].tolist() == [first for first, _ in offsets]
        assert found.end_chars[span].tolist() == [end for _, end in offsets]
        in_second = np.cumsum(np.array(tokens) == tokenizer.sep_token_id) == 1
        in_second[-1], in_second[tokens.index(tokenizer.sep_token_id)] = True, False
        assert found.features.token_types[span].tolist() == in_second.tolist()
    assert i == len(found.questions) - 1
    sizes = np.diff(starts)
    assert sizes.max() <= max_length
    if max_length == 200:
        assert len(found.questions) == 80


def test_every_answer_is_recovered_from_its_tokens(tokenizer):
    columns = generated(150, seed=7)
    rng, answers = np.random.default_rng(8), []
    for context in columns["context"]:
        first = int(rng.integers(0, len(context)))
        end = int(min(first + rng.integers(1, 20), len(context)))
        answers.append(None if rng.random() < 0.2 else (first, end))
    stride = 9
    found = cut(columns, tokenizer, 32, stride)
    positions = chunks.answer_positions(found, answers)
    starts, recovered = found.features.starts, set()
    for i, (row, first, last) in enumerate(
        zip(found.questions, *positions.values(), strict=True)
    ):
        tokens = slice(starts[i], starts[i + 1])
        firsts, ends = found.first_chars[tokens], found.end_chars[tokens]
        [inside] = np.nonzero(firsts >= 0)
        answer = answers[row]
        is_inside = (
            answer and firsts[inside[0]] <= answer[0] and answer[1] <= ends[inside[-1]]
        )
        if not is_inside:
            assert first == last == 0
            continue
        recovered.add(row)
        assert first in inside
        assert last in inside
        assert firsts[first] <= answer[0]
        assert answer[1] <= ends[last]
        # No narrower span contains it.
        assert first == inside[-1] or firsts[first + 1] > answer[0]
        assert last == inside[0] or ends[last - 1] < answer[1]
    for row, answer in enumerate(answers):
        context = columns["context"][row]
        # Whitespace at either end of a context has no token.
        if answer and context[: answer[0]].strip() and context[answer[1] :].strip():
            assert row in recovered


def test_an_answer_of_complete_words_is_recovered_exactly(tokenizer):
    rows = toy_bert.questions(60, with_negative=True)
    columns = {name: [row[name] for row in rows] for name in ("question", "context")}
    found = cut(columns, tokenizer, 20, 4)
    starts = [row["answers"]["answer_start"] for row in rows]
    spans = [(s[0], s[0] + len("Good film")) if s else None for s in starts]
    positions = chunks.answer_positions(found, spans)
    recovered = set()
    for i, row in enumerate(found.questions):
        first, last = (positions[f"{end}_positions"][i] for end in ("start", "end"))
        if first:
            begin = found.features.starts[i]
            text = rows[row]["context"][
                found.first_chars[begin + first] : found.end_chars[begin + last]
            ]
            assert text == "Good film"
            recovered.add(row)
    assert recovered == {i for i, span in enumerate(spans) if span}


def test_the_last_word_of_a_chunk_can_be_the_answer(tokenizer):
    """Hugging Face's script searches on into [SEP] and padding, with offsets 0."""
    columns = {"question": ["yes"], "context": ["red blue cat dog film"]}
    found = cut(columns, tokenizer, 7, 1)  # Three tokens of context in each.
    positions = chunks.answer_positions(found, [(9, 12)])
    assert found.questions.tolist() == [0, 0]
    assert positions["start_positions"].tolist() == [5, 3]
    assert positions["end_positions"].tolist() == [5, 3]


@pytest.fixture
def jamo_tokenizer(tmp_path):
    """Splits a Hangul syllable into three tokens that share one character."""
    toy_bert.write_model(tmp_path)
    with open(tmp_path / "vocab.txt", "a") as file:
        file.write("\u1112\n##\u1161\n##\u11ab\n")
    return pretrained.read_tokenizer(tmp_path)


def test_several_tokens_can_share_one_character(jamo_tokenizer):
    columns = {"question": ["yes"], "context": ["red \ud55c blue"]}
    found = cut(columns, jamo_tokenizer, 12, 2)
    assert found.first_chars.tolist() == [-1, -1, -1, 0, 4, 4, 4, 6, -1]
    positions = chunks.answer_positions(found, [(4, 5)])
    assert (positions["start_positions"], positions["end_positions"]) == (4, 6)
    columns["question"] = ["\ud55c " * 30]
    found = cut(columns, jamo_tokenizer, 16, 4)
    # Eight question tokens would fit: two syllables and two thirds of the next.
    assert found.first_chars.tolist() == [-1] * 8 + [0, 4, 4, 4, 6, -1]


def test_a_context_without_text_has_one_chunk_without_answer(tokenizer):
    columns = {"question": ["yes", "no"], "context": [" \n", "red"]}
    found = cut(columns, tokenizer, 12, 2)
    assert found.questions.tolist() == [0, 1]
    positions = chunks.answer_positions(found, [(0, 1), (0, 3)])
    assert positions["start_positions"].tolist() == [0, 3]


def test_a_question_too_long_is_cut_off(tokenizer):
    columns = {"question": ["red blue " * 20, "yes"], "context": ["cat dog " * 4] * 2}
    found = cut(columns, tokenizer, 16, 4)
    starts, tokens = found.features.starts, found.features.tokens
    words = tokenizer.convert_ids_to_tokens(tokens[: starts[1]])
    assert (
        words
        == (
            "[CLS] red blue red blue red blue red blue [SEP] cat dog cat dog cat [SEP]"
        ).split()
    )
    assert found.questions.tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(("max_length", "stride"), [(20, 16), (20, 40), (5, 1)])
def test_a_stride_without_room_is_rejected(tokenizer, max_length, stride):
    columns = {"question": ["yes"], "context": ["red"]}
    with pytest.raises(
        UserError, match=rf"--doc_stride {stride} is too large .*must hold"
    ):
        cut(columns, tokenizer, max_length, stride)
