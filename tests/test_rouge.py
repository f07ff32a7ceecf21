"""ROUGE-L: the installed package's own values, and those that a plain definition gives."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from support import rouge
from support.files import UserError
from support.rouge import has_words, rouge_l

REFERENCES = ["Trane, founded in 1913, is in Ireland.", "Ireland is where Trane (founded 1913) is located."]


def longest_common(first, second):
    """The length of the longest common subsequence: all subsequences tried, longest first."""
    for length in range(len(first), 0, -1):
        for kept in itertools.combinations(first, length):
            rest = iter(second)
            if all(word in rest for word in kept):
                return length
    return 0


def slow_rouge_l(reference, text):
    first, second = (re.findall("[a-z0-9]+", one.lower()) for one in (reference, text))
    common = longest_common(first, second)
    return 2 * common / (len(first) + len(second)) if common else 0.0


@pytest.mark.parametrize("text", ["Trane is in Ireland, founded 1913.", "trane", "", "...", "Dublin", REFERENCES[1]])
def test_the_score_is_the_package_s_own_with_the_best_reference(text):
    own = RougeScorer(["rougeL"])
    each = [own.score(reference, text)["rougeL"].fmeasure for reference in REFERENCES]
    assert rouge_l(REFERENCES, text) == max(each) == own.score_multi(REFERENCES, text)["rougeL"].fmeasure
    assert [rouge_l([reference], text) for reference in REFERENCES] == each
    assert isinstance(rouge_l(REFERENCES, text), float)  # a score, also where it is 0 or 1


@hypothesis_settings(deadline=None)
@given(*2 * [st.lists(st.sampled_from(["a", "B", "c7", "d-e", "."]), max_size=5).map(" ".join)])
def test_the_score_is_the_f_measure_of_the_longest_common_subsequence_of_words(reference, text):
    assert rouge_l([reference], text) == pytest.approx(slow_rouge_l(reference, text), abs=1e-12)


def test_words_are_not_stemmed():
    assert rouge_l(["the cats"], "the cat") == 0.5


@pytest.mark.parametrize(("text", "there"), [("Ähm", True), ("7", True), ("Привет", False), ("?!", False)])
def test_a_text_without_latin_letters_or_digits_has_no_words(text, there):
    assert has_words(text) == there == (rouge_l([text], text) == 1)


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    rouge.require_package()
    monkeypatch.setattr(rouge, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install rouge-score"):
        rouge.require_package()
