"""Settings: ranges, presets, the paper's defaults."""

import pytest
from conftest import own_task, settings

from support.files import UserError
from support.settings import PRESETS, SearchSettings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "--steps"),
        ({"shortlist_size": 0}, "--shortlist-size"),
        ({"loss_temperature": 0.0}, "--loss-temperature"),
        ({"fluency_weight": -1.0}, "--lambda"),
        ({"objective": "err"}, "--objective must be one of loss, error"),
        ({"batch_size": -1}, "--batch-size"),
        ({"preset": "mine"}, "--preset must be one of paper, released"),
    ],
)
def test_a_setting_out_of_range_names_its_flag(change, message):
    with pytest.raises(UserError, match=message):
        settings(**change)


def test_the_released_preset_is_what_the_scripts_say():
    released = {"top_k": 40, "intersections": 6, "objective": "error", "ties": "last"}
    assert PRESETS == {"paper": {}, "released": released | {"force_sentence_end": True, "choose_on": "train"}}


@pytest.mark.parametrize(("kind", "tokens"), [("number", 12), ("choice", 8), ("boolean", 8), ("text", 128)])
def test_an_answer_may_take_as_many_tokens_as_its_kind_needs(kind, tokens):
    assert settings().answer_tokens(own_task(kind, choices=("A", "B"))) == tokens


def test_the_defaults_are_the_paper_s():
    s = SearchSettings()
    assert (s.min_candidates, s.max_prompt_tokens) == (6, 64)
    assert own_task().template == "{question}\nUse {prompt}"
    assert (s.steps, s.top_k, s.intersections, s.sampled_rows, s.shortlist_size) == (105, 10, 1, 5, 3)
    assert (s.fluency_weight, s.loss_temperature, s.train_rows, s.max_new_tokens) == (0.2, 0.2, 50, 1024)
    assert (s.objective, s.choose_on, s.ties, s.fluency) == ("loss", "dev", "first", "nll")
    assert set().union(*PRESETS.values()) <= set(vars(s))
