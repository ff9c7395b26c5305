import collections
import hashlib

import numpy as np
import paraphrases
import pytest
import run_demo
from sklearn.metrics import roc_auc_score
from transformers import BertTokenizer

PAIRS = paraphrases.generate(run_demo.NUM_TRAIN + run_demo.NUM_VALIDATION, seed=0)
TRAIN, VALIDATION = PAIRS[: run_demo.NUM_TRAIN], PAIRS[run_demo.NUM_TRAIN :]


def test_the_set_is_the_same_everywhere():
    text = "\n".join("\t".join(map(str, pair)) for pair in PAIRS)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "40a32ab60216ce68b46e9231a4258afb9277c2a021a9abe858a89b07e7228933"
    )
    assert paraphrases.generate(50, seed=1) != paraphrases.generate(50, seed=2)


def test_labels_are_balanced_and_questions_differ():
    assert np.mean([pair.label for pair in PAIRS]) == 0.5
    assert abs(np.mean([pair.label for pair in VALIDATION]) - 0.5) < 0.05
    assert all(pair.question1 != pair.question2 for pair in PAIRS)


def test_no_validation_pair_was_trained_on_in_either_order():
    train = {frozenset(pair[:2]) for pair in TRAIN}
    assert not any(frozenset(pair[:2]) in train for pair in VALIDATION)


def meaning(question):
    """Parses a question into subject, row of the verb, object and negation."""
    words = question.removesuffix(" ?").split()
    negated = "not" in words
    words = [word for word in words if word != "not"]
    if words[0] == "does":
        _, subject, verb, object_ = words
    else:
        _, object_, verb, _, subject = words
        verb = verb.removesuffix("d")
    row = next(i for i, verbs in enumerate(paraphrases.VERBS) if verb in verbs)
    if row == 1:  # The opposite of row 0.
        row, negated = 0, not negated
    return subject, row, object_, negated


def test_labels_tell_whether_the_meanings_are_the_same():
    for question1, question2, label in PAIRS:
        assert (meaning(question1) == meaning(question2)) == label


def kind_of_change(a, b):
    """Returns how two meanings differ: in one thing, or by swapped persons."""
    persons, others = (a[0], a[2]), (b[0], b[2])
    if persons == others:
        return "polarity" if a[1] == b[1] else "verb"
    assert (a[1], a[3]) == (b[1], b[3])
    if persons == others[::-1]:
        return "swap"
    assert sum(x != y for x, y in zip(persons, others, strict=True)) == 1
    return "person"


def test_each_kind_of_change_occurs():
    kinds = collections.Counter(
        kind_of_change(meaning(pair.question1), meaning(pair.question2))
        for pair in PAIRS
        if not pair.label
    )
    assert kinds.keys() == {"person", "swap", "polarity", "verb"}
    assert min(kinds.values()) > 500


def test_shared_words_do_not_tell_the_label():
    overlap = []
    for question1, question2, _ in PAIRS:
        first, second = set(question1.split()), set(question2.split())
        overlap.append(len(first & second) / len(first | second))
    auc = roc_auc_score([pair.label for pair in PAIRS], overlap)
    assert 0.45 < auc < 0.55


def test_the_bag_of_words_beats_chance_but_does_not_solve_the_task():
    accuracy = run_demo.bag_of_words(TRAIN, VALIDATION)["eval_accuracy"]
    assert 0.6 < accuracy < 0.8


def test_the_vocabulary_covers_the_set(tmp_path):
    run_demo.write_model(tmp_path)
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    encoded = tokenizer(*map(list, list(zip(*PAIRS, strict=True))[:2]))["input_ids"]
    assert tokenizer.unk_token_id not in {token for ids in encoded for token in ids}
    assert max(map(len, encoded)) == run_demo.MAX_LENGTH
    assert tokenizer.tokenize("is alice disliked by bruno ?") == [
        *("is", "alice", "dislike", "##d", "by", "bruno", "?")
    ]


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_the_demo_fails_where_the_baseline_wins(
    tmp_path, monkeypatch, capsys, accuracy
):
    def fine_tune(output_dir, name):
        (output_dir / name).mkdir()
        lines = '{"step": 1, "loss": 0.5}\n{"step": 250, "eval_accuracy": 0.5}\n'
        (output_dir / name / "metrics.jsonl").write_text(lines)
        return {"eval_accuracy": accuracy, "eval_f1": accuracy, "eval_loss": 0.1}

    monkeypatch.setattr(run_demo, "fine_tune", fine_tune)
    if accuracy:
        run_demo.main(tmp_path)
    else:
        with pytest.raises(run_demo.UserError, match="M-FAC does not beat"):
            run_demo.main(tmp_path)
    output = capsys.readouterr().out
    assert "bag of words" in output
    assert (tmp_path / "curves.png").exists()
