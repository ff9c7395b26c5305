import itertools

import numpy as np
import pytest
from bert_finetune.data.features import Features
from bert_finetune.squad import answers, chunks

CONTEXTS = ["ab cd ef gh ij kl mn", "no pq rs", " "]
NUM_QUESTION_TOKENS = 3  # [CLS], a word, [SEP].


def chunks_of(pieces):
    """Returns chunks of the contexts, given as pairs (question, slice of words)."""
    firsts, ends, starts = [], [], [0]
    for question, piece in pieces:
        words = range(len(CONTEXTS[question].split()))[piece]
        firsts += [-1] * NUM_QUESTION_TOKENS + [3 * i for i in words] + [-1]
        ends += [-1] * NUM_QUESTION_TOKENS + [3 * i + 2 for i in words] + [-1]
        starts.append(len(firsts))
    tokens = np.zeros(len(firsts), np.int32)
    return chunks.Chunks(
        Features(tokens, tokens.astype(np.int8), np.array(starts), {}, 0),
        np.array([question for question, _ in pieces], np.int32),
        np.array(firsts, np.int32),
        np.array(ends, np.int32),
    )


PIECES = [(0, slice(0, 5)), (0, slice(3, 7)), (1, slice(0, 3)), (2, slice(0, 0))]


def random_logits(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 2, (2, chunks_of(PIECES).features.starts[-1])).astype("f")


def find(start_logits, end_logits, **options):
    options = {
        **{"n_best_size": 20, "max_answer_length": 3, "null_threshold": None},
        **options,
    }
    return answers.find_answers(
        CONTEXTS, chunks_of(PIECES), start_logits, end_logits, **options
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("null_threshold", [None, 0.0, 1.5, -1.5])
@pytest.mark.parametrize("n_best_size", [1, 3, 20])
def test_answers_are_the_best_of_all_spans(seed, null_threshold, n_best_size):
    start_logits, end_logits = random_logits(seed)
    starts = chunks_of(PIECES).features.starts
    found = find(
        start_logits,
        end_logits,
        null_threshold=null_threshold,
        n_best_size=n_best_size,
    )
    for question, context in enumerate(CONTEXTS):
        spans, nulls = [], []
        for i, (of, piece) in enumerate(PIECES):
            if of != question:
                continue
            start, end = (
                x[starts[i] : starts[i + 1]] for x in (start_logits, end_logits)
            )
            nulls.append(float(start[0]) + float(end[0]))
            words = context.split()[piece]
            top_starts, top_ends = (
                set(np.argsort(-x)[:n_best_size].tolist()) for x in (start, end)
            )
            for a, b in itertools.product(range(len(words)), repeat=2):
                s, e = a + NUM_QUESTION_TOKENS, b + NUM_QUESTION_TOKENS
                if s in top_starts and e in top_ends and a <= b < a + 3:
                    score = float(start[s]) + float(end[e])
                    spans.append((score, " ".join(words[a : b + 1])))
        spans.sort(reverse=True)
        best = spans[0] if spans else (0.0, "")
        answer = found[question]
        assert answer.best_text == best[1]
        listed = sorted(spans)[::-1]
        if null_threshold is None:
            assert answer.text == best[1]
            assert answer.null_odds is None
        else:
            odds = min(nulls) - best[0]
            assert answer.null_odds == pytest.approx(odds, rel=1e-6)
            assert answer.text == ("" if odds > null_threshold else best[1])
            listed = sorted([*spans, (min(nulls), "")], reverse=True)
        expected = listed[:n_best_size]
        if null_threshold is not None and not any(t == "" for _, t in expected):
            expected.append((min(nulls), ""))
        assert [entry["text"] for entry in answer.n_best] == [t for _, t in expected]
        scores = np.array([score for score, _ in expected])
        weights = np.exp(scores - scores.max()) if len(scores) else scores
        np.testing.assert_allclose(
            [entry["probability"] for entry in answer.n_best],
            weights / weights.sum() if len(scores) else [],
            rtol=1e-6,
        )


def test_the_question_is_never_the_answer():
    start_logits, end_logits = np.zeros((2, chunks_of(PIECES).features.starts[-1]), "f")
    start_logits[1] = end_logits[2] = 9.0
    start_logits[NUM_QUESTION_TOKENS] = end_logits[NUM_QUESTION_TOKENS + 1] = 5.0
    assert find(start_logits, end_logits)[0].text == "ab cd"


def test_a_long_answer_is_cut_from_the_list():
    start_logits, end_logits = np.zeros((2, chunks_of(PIECES).features.starts[-1]), "f")
    start_logits[NUM_QUESTION_TOKENS] = 5.0
    end_logits[NUM_QUESTION_TOKENS + 3] = 4.0
    assert find(start_logits, end_logits, max_answer_length=4)[0].text == "ab cd ef gh"
    assert find(start_logits, end_logits, max_answer_length=3)[0].text != "ab cd ef gh"


def test_the_lowest_score_of_no_answer_counts():
    """One chunk that has the answer is enough; the others rightly see none."""
    start_logits, end_logits = np.zeros((2, chunks_of(PIECES).features.starts[-1]), "f")
    second = chunks_of(PIECES).features.starts[1]
    start_logits[0] = end_logits[0] = 9.0
    start_logits[second + NUM_QUESTION_TOKENS] = 2.0
    end_logits[second + NUM_QUESTION_TOKENS] = 2.0
    answer = find(start_logits, end_logits, null_threshold=0.0)[0]
    assert (answer.text, answer.null_odds) == ("gh", -4.0)
