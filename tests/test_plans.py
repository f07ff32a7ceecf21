"""What a text method takes, as numbers known before it begins: those of the publications at their settings."""

from dataclasses import replace

import pytest
from conftest import text_settings

from support.plans import Calls, planned, rounds_within


def published(method, seeds=1, **changes):
    """The `Calls` of a whole run at a method's published settings."""
    settings = text_settings(method, preset="published", **changes)
    return planned(settings, seeds, settings.rounds)[-1]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("opro", Calls(1 + 200 * 8, 200, 200 * 8)),  # on the 261 rows of GSM8K 417,861 generations
        ("textgrad", Calls(1 + 12, 84, 84)),
        ("pe2", Calls(37, 72, 72)),
        ("apo", Calls(1 + 8 + 5 * 4 * 8, 273, 21 * (8 + 10))),
        ("ape", Calls(1 + 90 + 3 * 16, 3 + 3 * 4, 90 + 3 * 16)),
    ],
)
def test_a_run_at_published_settings_takes_the_published_number_of_calls(method, expected):
    assert published(method) == expected


@pytest.mark.parametrize(("rows", "rounds"), [(48, 18), (35, 12), (27, 9), (33, 12), (100, 39)])
def test_gpo_runs_three_epochs_of_batches_of_eight(rows, rounds):
    settings = text_settings("gpo", preset="published", train_rows=rows)
    assert settings.rounds == rounds and published("gpo", train_rows=rows) == Calls(1 + 8 * rounds, rounds, 8 * rounds)


@pytest.mark.parametrize("method", ["evoprompt-ga", "evoprompt-de"])
def test_evoprompt_begins_with_half_a_population_of_a_given_pool_and_rewords_it(method):
    assert published(method, seeds=20) == Calls(20 + 5 + 100, 105, 105)
    assert published(method, seeds=1) == Calls(10 + 100, 9 + 100, 9 + 100)  # of one prompt nine rewordings


def test_the_notes_of_the_sgdm_variant_are_a_request_more_each_round():
    assert published("gpo-sgdm", train_rows=48) == Calls(1 + 8 * 18, 2 * 18, 9 * 18)


def test_rounds_that_a_budget_holds_are_whole_and_at_least_one():
    settings = replace(text_settings("opro"), budget=1000)
    assert rounds_within(settings, 1, 40) == 3  # 25 prompts are the initial one and three times 8
    assert rounds_within(replace(settings, budget=999), 1, 40) == 2
    assert rounds_within(replace(settings, budget=81), 1, 40) == 1


def test_default_settings_score_about_80_prompts_but_for_textgrad():
    for method in ("opro", "gpo", "ape", "apo", "pe2", "evoprompt-ga", "evoprompt-de", "random"):
        settings = text_settings(method)
        assert 65 <= planned(settings, 1, settings.rounds)[-1].prompts <= 85
