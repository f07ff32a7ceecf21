"""ROUGE-L: how much of a generated text agrees with a reference, from 0 to 1. Needs the package rouge-score, no torch.

The score is the F-measure of the longest common subsequence of words, of several references the best. Words are what
rouge-score takes for them, without a stemmer: runs of the letters a to z and digits, in lower case. A text in another
script has none.
"""

import re
from functools import lru_cache
from importlib.util import find_spec

from support.files import require


def require_package():
    """Errors: UserError if rouge-score is not installed."""
    installed = find_spec("rouge_score") is not None
    require(installed, "--kind generation: generated texts are scored by ROUGE-L: pip install rouge-score")


@lru_cache(maxsize=1)
def scorer():
    from rouge_score.rouge_scorer import RougeScorer  # takes a moment, and few tasks need it

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(references, text):
    """The best ROUGE-L F-measure, a float from 0 to 1, of the text against one of the references, at least one."""
    return float(scorer().score_multi(references, text)["rougeL"].fmeasure)


def has_words(text):
    """Whether ROUGE-L sees anything in the text."""
    return bool(re.search("[a-z0-9]", text.lower()))
