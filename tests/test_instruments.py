"""What a search says about its own signal: against values worked out by hand and slow references."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from made_runs import AUDITED, OTHER_ROWS, START_ROWS, STEPS, TAKEN_ROWS, finalist, make_run, rows_of, step

from support import instruments, pictures
from support.evaluation import wilson
from support.files import UserError
from support.instruments import Gain, Interval, Wins
from support.runs import as_step
from support.settings import KNOWN_VALUES

# --- Correlations ------------------------------------------------------------------------------------


def test_a_gradient_point_is_the_candidate_minus_the_incumbent_in_gradient_and_objective():
    # Step 4 grows the prompt, so that it has no incumbent.
    assert instruments.gradient_points(STEPS) == [
        (-2.5, -3.0, True, 1),
        (-2.0, 1.0, False, 1),
        (-0.75, 0.5, False, 2),
        (-0.25, -0.5, True, 3),
    ]
    random_shortlist = [STEPS[0], step(1, 0, (4, 2, 3), 5.0, {4: None, 1: None}, [(4, (4, 2, 3), 5.0)])]
    assert instruments.gradient_points(random_shortlist) == []


def test_the_rank_correlation_is_spearmans():
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24) = 0.8.
    assert instruments.spearman([1, 2, 3, 4, 50], [0.2, 0.1, 7, 6, 8]) == pytest.approx(0.8)
    # Two share ranks 1 and 2: from the means -1 -1 0.5 1.5 and -1.5 -0.5 0.5 1.5, so 4.5 / sqrt(4.5 * 5).
    assert instruments.spearman([5, 5, 6, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert instruments.spearman([1, 2, 3], [9, 4, -1]) == pytest.approx(-1)
    assert instruments.spearman([1, 1, 1], [1, 2, 3]) is None


def test_the_correlation_within_steps_is_the_mean_over_steps_and_not_what_all_points_together_say():
    # Within each step the order is the other way round, but the second step is all above the first.
    points = [
        instruments.GradientPoint(predicted + 100 * step, 100 * step - predicted, False, step)
        for step in (1, 2)
        for predicted in (1, 2, 3)
    ]
    assert instruments.within_steps(points) == (pytest.approx(-1), 2)
    assert "within steps -1.00 (mean of 2), over all 6 candidates 0.54" in pictures.correlations(points)
    alone = [instruments.GradientPoint(1.0, 1.0, True, 1), instruments.GradientPoint(2.0, 1.0, False, 2)]
    assert instruments.within_steps(alone) == (None, 0) and "within steps not defined" in pictures.correlations(alone)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_equal_values_share_the_mean_of_their_ranks(values):
    slow = [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]
    assert instruments.mean_ranks(values).tolist() == slow


def test_points_of_another_measure_and_of_the_random_shortlist_are_taken_from_their_fields():
    first = instruments.gradient_points(AUDITED[:2], "fixed_loss")
    assert first == [(-2.5, -1.0, True, 1), (-1.5, 1.0, False, 1)]
    assert instruments.gradient_points(AUDITED[:2], "objective", shortlist="random") == [(-1.5, -1.5, False, 1)]
    assert instruments.gradient_points(STEPS, "fixed_loss") == []
    assert instruments.gradient_points(STEPS, shortlist="random") == []


def test_both_shortlists_are_those_of_audited_steps_with_what_is_in_both_counted_once():
    own, random, both = (instruments.gradient_points(AUDITED[:2], shortlist=name) for name in instruments.SHORTLISTS)
    assert [point.predicted for point in both] == [-2.5, -1.5] and len(own) + len(random) == 3  # of two tokens
    assert instruments.gradient_points(STEPS, shortlist="both") == []


def test_a_bootstrap_of_a_mean_has_the_interval_of_normal_theory_and_is_the_same_each_time():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400).tolist()
    found = instruments.bootstrap(values, instruments.mean_of)
    half = 1.96 * np.std(values, ddof=1) / 20
    assert found.value == pytest.approx(np.mean(values)) and found.steps == 400
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.15)
    assert instruments.bootstrap(values, instruments.mean_of) == found
    assert instruments.bootstrap(values[:1], instruments.mean_of) is None


def test_a_bootstrap_draws_whole_steps():
    """Ten equal points in each of two steps: the interval is as wide as that of two numbers."""
    groups = [[0.0] * 10, [1.0] * 10]
    found = instruments.bootstrap(groups, lambda drawn: float(np.mean(sum(drawn, []))))
    assert (found.value, found.low, found.high, found.steps) == (0.5, 0.0, 1.0, 2)


# --- Wins, changes, gains -----------------------------------------------------------------------------


def test_wins_are_counted_by_gradient_and_not_by_the_order_of_the_records():
    start = step(0, None, (1, 2, 3), 8.0)
    gradients = {4: -1.0, 5: -2.0, 1: 0.0}  # token 5 has rank 1
    taken = step(1, 0, (4, 2, 3), 5.0, gradients, [(4, (4, 2, 3), 5.0), (5, (5, 2, 3), 9.0)])
    kept = step(2, 0, (4, 2, 3), 5.0, gradients | {4: 0.0, 1: -3.0}, [(1, (1, 2, 3), 8.0), (5, (5, 2, 3), 8.0)])
    assert instruments.wins_of([start, taken, kept]) == Wins(
        best=[0, 1], taken=[0, 1], kept=1, steps=2
    )  # equals have no best
    assert instruments.wins_of([start, step(1, 0, (4, 2, 3), 5.0, {4: None}, [(4, (4, 2, 3), 5.0)])]) is None


def test_growing_steps_and_shortlists_of_another_length_do_not_count():
    # Steps 2 and 3 have one token, step 1 has two, step 4 grows.
    assert instruments.wins_of(STEPS) == Wins(best=[2], taken=[1], kept=1, steps=2)


def test_changed_rows_are_shares_of_other_reasonings_and_other_outcomes():
    assert instruments.changed_rows(START_ROWS, TAKEN_ROWS) == (0.5, 0.5)
    assert instruments.changed_rows(START_ROWS, OTHER_ROWS) == (0.25, 0.25)
    assert instruments.changed_rows(TAKEN_ROWS, OTHER_ROWS) == (0.75, 0.25)


def test_a_paired_gain_is_the_mean_difference_and_its_standard_error_without_broken_rows():
    after = rows_of("0000", [3.0, 4.0, None, 10.0], "abcd")
    gain = instruments.paired_gain(START_ROWS, after)  # differences 1, 2, 0
    assert gain == (pytest.approx(1.0), pytest.approx(1 / math.sqrt(3)), 3) and gain.size == pytest.approx(3**0.5)
    assert instruments.paired_gain(START_ROWS, TAKEN_ROWS) == (3.0, 0.0, 4)
    assert instruments.paired_gain(rows_of("0", [1.0], "a"), rows_of("0", [2.0], "a")) is None  # --train-rows 1
    assert Gain(3.0, 0.0, 4).size == math.inf and Gain(-3.0, 0.0, 4).size == -math.inf and Gain(0.0, 0.0, 4).size == 0


# --- All of it ------------------------------------------------------------------------------------------------


def test_searches_together_count_the_steps_of_each_and_none_between_them():
    one, two = instruments.signal_of(AUDITED), instruments.signal_of_all([AUDITED, AUDITED])
    assert (two.steps, two.audits, two.audit_generations) == (6, 6, 48)
    assert two.wins == Wins(best=[6, 0], taken=[6, 0], kept=0, steps=6) and two.ahead == (4, 2)
    assert two.advantage.value == pytest.approx(one.advantage.value) and two.advantage.steps == 6
    for place, (within, _) in one.correlations.items():
        twice = two.correlations[place][0]
        assert (within and within.value) == (twice and twice.value) and (
            twice is None or twice.steps == 2 * within.steps
        )
    assert two.again.flips.value == one.again.flips.value and two.again.flips.steps == 2 * one.again.flips.steps
    assert two.gain is None is two.optimism


def test_the_signal_of_a_run_is_the_one_worked_out_by_hand():
    signal = instruments.signal_of(AUDITED)
    assert (signal.steps, signal.audits, signal.audit_generations) == (3, 3, 24)
    assert signal.wins == Wins(best=[3, 0], taken=[3, 0], kept=0, steps=3)
    # The random shortlist is lower by 0.5 once and higher by 0.5 twice.
    assert signal.advantage.value == pytest.approx(0.5 / 3) and signal.ahead == (2, 1)
    # Step 1 compares the start with both prompts, steps 2 and 3 the taken rows with themselves and the others.
    assert signal.tried.reasoning.value == pytest.approx((0.5 + 0.25 + 2 * 0.75) / 6)
    assert signal.tried.flips.value == pytest.approx((0.5 + 0.25 + 2 * 0.25) / 6)
    assert signal.drawn.flips.value == pytest.approx(0.25)
    assert signal.again.flips == (0, 0, 0, 3) and signal.again.objective.value == 0.25
    assert signal.accepted == (1, 3)  # behind step 1 the rows stay as they are
    assert signal.gain == (3.0, 0.0, 4)
    assert signal.correlations["objective", "own"][0] == pytest.approx((1.0, 1.0, 1.0, 3))
    # Losses 6 and 8 behind the old reasoning; anew the second is lower in step 1 and higher in the others.
    assert signal.fixed.value == pytest.approx((-1 + 1 + 1) / 3) and signal.fixed.steps == 3


def test_an_older_run_says_what_it_did_not_record():
    signal = instruments.signal_of(STEPS, [finalist((4, 2, 3), 0.9), finalist((1, 2, 3), 0.5, initial=True)], 50)
    assert signal.tried is signal.drawn is signal.again is signal.advantage is signal.gain is signal.optimism is None
    text = instruments.signal_text(signal)
    assert "training rows against dev: not recorded" in text and "--audit-every" in text
    assert "is not recorded" in instruments.gain_sentence(signal)


def test_optimism_is_the_accuracy_on_the_rows_that_chose_less_that_on_dev():
    chosen = finalist((4, 2, 3), 0.75) | {"error": 0.1, "objective": 1.0, "dev_low": 0.65, "dev_high": 0.83}
    initial = finalist((1, 2, 3), 0.5, initial=True) | {"error": 0.4, "objective": 2.0}
    found = instruments.optimism_of([chosen, initial], 50)
    low, high = wilson(45, 50)
    assert (found.train, found.dev, found.train_gain, found.dev_gain) == pytest.approx((0.9, 0.75, 0.3, 0.25))
    assert found.low == pytest.approx(0.15 - math.hypot(0.9 - low, 0.08))
    assert found.high == pytest.approx(0.15 + math.hypot(high - 0.9, 0.1))
    assert found.order == pytest.approx(1.0) and found.finalists == 2


# --- The verdict ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "ahead", "verdict"),
    [
        (Interval(0.3, 0.1, 0.5, 20), (16, 2), "The gradient helped: "),
        (Interval(-0.3, -0.5, -0.1, 20), (2, 16), "The gradient hurt: "),
        (Interval(0.3, -0.1, 0.5, 20), (16, 2), "That the gradient helped cannot be told: "),
        (Interval(0.3, 0.1, 0.5, 9), (9, 0), "That the gradient helped cannot be told: "),  # of so few steps
        (Interval(0.3, 0.1, 0.5, 20), (6, 1), "That the gradient helped cannot be told: "),  # p = 0.125
    ],
)
def test_the_gradient_helped_only_where_interval_and_count_of_enough_audits_say_so(interval, ahead, verdict):
    signal = replace(instruments.signal_of(AUDITED), advantage=interval, ahead=ahead)
    assert instruments.gradient_sentence(signal).startswith(verdict)


def test_the_verdict_names_what_made_the_shortlist():
    signal = replace(instruments.signal_of(AUDITED, shortlist="likeliest"), advantage=Interval(0.3, 0.1, 0.5, 20))
    assert instruments.gradient_sentence(replace(signal, ahead=(16, 2))).startswith("The likelihood helped: ")
    assert set(instruments.RANKED_BY) == set(KNOWN_VALUES["shortlist"])


@pytest.mark.parametrize(
    ("within", "order"),
    [
        (Interval(0.3, 0.1, 0.5, 20), "better than chance"),
        (Interval(-0.3, -0.5, -0.1, 20), "worse than chance"),
        (Interval(0.1, -0.1, 0.3, 20), "in a way that cannot be told from chance"),
    ],
)
def test_without_audits_the_verdict_says_how_the_shortlist_was_ordered_and_no_more(within, order):
    signal = instruments.signal_of(STEPS)
    signal = replace(signal, correlations=signal.correlations | {("objective", "own"): (within, None)})
    sentence = instruments.gradient_sentence(signal)
    assert f"ordered the shortlist {order}:" in sentence and "--audit-every" in sentence


def test_a_run_without_gradients_has_no_verdict_on_them():
    steps = [STEPS[0], step(1, 0, (4, 2, 3), 5.0, {4: None, 1: None}, [(4, (4, 2, 3), 5.0)])]
    assert "is not recorded" in instruments.gradient_sentence(instruments.signal_of(steps))


@pytest.mark.parametrize(
    ("mean", "floor", "beyond"), [(2.0, 0.5, True), (1.9, 0.5, False), (2.0, 2.5, False), (-3.0, 0.5, False)]
)
def test_a_gain_is_beyond_the_noise_if_above_the_paired_error_and_the_re_roll(mean, floor, beyond):
    signal = instruments.signal_of(AUDITED)
    again = replace(signal.again, objective=Interval(floor, 0, 9, 20))
    sentence = instruments.gain_sentence(replace(signal, gain=Gain(mean, 1.0, 40), again=again))
    assert ("is beyond the noise" in sentence) is beyond and ("is not beyond the noise" in sentence) is not beyond


# --- Reading a run ------------------------------------------------------------------------------------------------


def test_the_records_of_an_audit_are_read_as_they_were_written():
    assert tuple(as_step(json.loads(json.dumps(asdict(one)))) for one in AUDITED) == AUDITED


def test_an_unfinished_run_is_read_without_the_line_that_is_being_written(tmp_path):
    folder = make_run(tmp_path / "run", steps=AUDITED)
    (folder / "prompts.jsonl").unlink()
    path = folder / "steps.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 4, "prom')
    run = instruments.load_search(folder)
    assert tuple(run.steps) == AUDITED and run.prompts == []
    assert path.read_bytes() == whole + b'{"step": 4, "prom'
    path.write_bytes(whole + b'{"step": 4, "prom\n')
    with pytest.raises(UserError, match="steps.jsonl, line 5"):
        instruments.load_search(folder)


def test_a_run_of_another_method_or_without_steps_is_refused_in_words(tmp_path):
    with pytest.raises(UserError, match="only GReaTer takes gradients"):
        instruments.load_search(make_run(tmp_path / "opro", method="OPRO"))
    with pytest.raises(UserError, match="no step behind its start"):
        instruments.load_search(make_run(tmp_path / "short", steps=STEPS[:1]))
    folder = make_run(tmp_path / "none")
    (folder / "steps.jsonl").unlink()
    with pytest.raises(UserError, match="has not begun"):
        instruments.load_search(folder)


def test_stage_3_prints_the_signal_and_draws_it(tmp_path):
    folder = make_run(tmp_path / "run", steps=AUDITED)
    command = [sys.executable, str(ROOT / "03_evaluate.py"), "--signal", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert instruments.signal_verdict(instruments.signal_of(AUDITED)).splitlines()[0] in done.stdout
    assert (folder / "signal.png").exists() and "signal.png" in done.stdout.splitlines()[-1]
