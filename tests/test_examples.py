"""The examples: a scripted writer solves OPRO's mathematical demonstrations, and the references are right."""

import itertools
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from support.answerers import Answerer
from support.evaluation import Written

sys.path.insert(0, str(ROOT / "examples"))
import opro_math  # noqa: E402


def flags_of(problem, **changes):
    return opro_math.Flags(problem=problem, **changes)


class Writer:
    """Writes what `replies(meta-prompt, number)` gives; keeps what it is asked."""

    def __init__(self, replies):
        self.replies, self.asked, self.numbers = replies, [], itertools.count()
        self.answerer = Answerer("w", ("w",), None, write=self.write)

    def write(self, chats, sampling):
        written = []
        for chat in chats:
            self.asked.append(chat[-1]["content"])
            texts = [self.replies(self.asked[-1], next(self.numbers)) for _ in range(sampling.samples)]
            written.append([Written(text, 5, 50) for text in texts])
        return written


def solved(flags, replies, folder):
    """(the problem, the steps of its search, the writer)."""
    writer, problem = Writer(replies), opro_math.PROBLEMS[flags.problem](flags)
    return problem, list(opro_math.solve(problem, writer.answerer, flags, folder)), writer


def shown_best(text, parse):
    """The last solution that a meta-prompt shows, as numbers."""
    lines = [line for line in text.splitlines() if re.search(parse, line)]
    return [int(number) for number in re.search(parse, lines[-1]).group(1).split(", ")]


def step_down(text, number):
    w, b = shown_best(text, r"w, b = (.*): \d")
    dw, db = [(1, 0), (-1, 0), (0, 1), (0, -1)][number % 4]
    return f"I try <answer>w = {w + dw}, b = {b + db}</answer>"


def swap_two(text, number):
    trip = shown_best(text, r"^(0, .*): length")
    pairs = list(itertools.combinations(range(1, len(trip)), 2))
    i, j = pairs[number % len(pairs)]
    trip[i : j + 1] = reversed(trip[i : j + 1])
    return f"<answer>{', '.join(map(str, trip))}, 0</answer>"


def test_regression_ends_at_the_best_integers(tmp_path):
    problem, steps, _ = solved(flags_of("regression", rounds=60), step_down, tmp_path)
    assert steps[-1].best.prompt.startswith("15, ") and len(steps) < 61
    assert -steps[-1].best.accuracy == pytest.approx(problem.references()["optimum"])
    assert steps[0].best.accuracy < steps[-1].best.accuracy


def test_the_best_integers_are_those_of_all_in_a_wide_square():
    problem = opro_math.Regression(flags_of("regression", seed=3))
    everywhere = min(problem.cost(f"{w}, {b}") for w in range(5, 26) for b in range(-60, 90))
    assert problem.references()["optimum"] == everywhere == problem.cost("15, 14") or everywhere < problem.cost(
        "15, 14"
    )


def test_a_trip_ends_at_the_shortest_one_and_never_gets_longer(tmp_path):
    problem, steps, writer = solved(flags_of("tsp", cities=6, rounds=40), swap_two, tmp_path)
    lengths = [-step.best.accuracy for step in steps]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < lengths[0]
    assert lengths[-1] == pytest.approx(problem.references()["optimum"]) and len(steps) < 41
    for text in writer.asked:
        shown = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if ": length" in line]
        assert 5 <= len(shown) <= 10 and shown == sorted(shown, reverse=True)


@pytest.mark.parametrize("cities", [3, 4, 7])
def test_the_shortest_trip_is_that_of_all_orders_and_no_heuristic_beats_it(cities):
    for seed in range(5):
        problem = opro_math.Tsp(flags_of("tsp", cities=cities, seed=seed))
        lengths = [problem.length([0, *order]) for order in itertools.permutations(range(1, cities))]
        known = problem.references()
        assert known["optimum"] == pytest.approx(min(lengths))
        for heuristic in (problem.nearest_neighbour(), problem.farthest_insertion()):
            assert sorted(heuristic) == list(range(cities)) and heuristic[0] == 0
        assert min(known["nearest neighbour"], known["farthest insertion"]) >= known["optimum"] - 1e-9


def test_beyond_a_dozen_cities_no_optimum_is_claimed():
    assert "optimum" in opro_math.Tsp(flags_of("tsp", cities=8)).references()
    assert "optimum" not in opro_math.Tsp(flags_of("tsp", cities=13)).references()


@pytest.mark.parametrize(
    "reply",
    ["", "no idea", "<answer>0, 1, 2, 3, 4, 5</answer>", "<answer>1, 0, 2, 3, 4, 5, 6</answer>"]
    + ["<answer>0, 1, 1, 3, 4, 5, 6</answer>", "<answer>0, 1, 2, 3, 4, 5, 7</answer>"]
    + ["<answer>0, 1, 2, 3, 4, 5, -6</answer>", f"<answer>{'9' * 6000}</answer>"],
)
def test_what_is_no_trip_is_counted_and_asked_for_again_only_so_often(reply, tmp_path):
    flags = flags_of("tsp", cities=7, rounds=3, samples=2, requests=2)
    problem = opro_math.Tsp(flags)
    writer = Writer(lambda text, number: reply)
    search = opro_math.solve(problem, writer.answerer, flags, tmp_path)
    first = next(search)
    *_, last = search
    assert last.replies == {"all": 3 * 2 * 2, "invalid": 12} and len(writer.asked) == 3 * 2
    assert last.best == first.best and last.proposed == []


@pytest.mark.parametrize(
    ("reply", "solution"),
    [("<answer>[15, 14]</answer>", "15, 14"), ("<answer>w=-2.6, b=7</answer>", "-3, 7"), ("15, 14", "15, 14")]
    + [("<answer>1</answer> <answer>2, 3</answer>", "2, 3"), ("<answer>1, 2, 3</answer>", None)]
    + [(f"<answer>1, {'9' * 400}</answer>", None), ("w is good", None)],
)
def test_a_pair_is_read_from_the_last_answer(reply, solution, tmp_path):
    problem = opro_math.Regression(flags_of("regression"))
    assert problem.parse((opro_math.ANSWER.findall(reply) or [reply])[-1]) == solution


def test_the_same_seed_gives_the_same_problem_and_another_one_another():
    points = [opro_math.Tsp(flags_of("tsp", seed=seed)).points for seed in (0, 0, 1)]
    assert points[0] == points[1] != points[2]


def test_the_report_has_all_references_and_counts(tmp_path):
    flags = flags_of("tsp", cities=6, rounds=2)
    problem, steps, _ = solved(flags, swap_two, tmp_path)
    lines = list(opro_math.report(problem, steps, flags))
    assert [line[:20].strip() for line in lines[:6]] == [
        *("start", "found", "random, as many", "nearest neighbour", "farthest insertion", "optimum")
    ]
    assert lines[5].split()[-2:] == ["+0.0", "%"] and f"replies: {steps[-1].replies['all']} all" in lines[-1]


def call(*words):
    command = [sys.executable, str(ROOT / "examples" / "opro_math.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_script_asks_a_server_and_refuses_a_folder_that_holds_a_run(demo_server, tmp_path):
    words = ["--problem", "tsp", "--cities", "6", "--rounds", "2", "--out", str(tmp_path / "run")]
    words += ["--optimizer-endpoint", demo_server, "--model", "scripted"]
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert "replies: 32 all, 0 new, 0 repeated, 32 invalid" in done.stdout  # that server knows no trips
    assert len((tmp_path / "run" / "optimizer.jsonl").read_text().splitlines()) == 4
    again = call(*words)
    assert again.returncode == 2 and again.stderr.strip().endswith("holds a run: choose another")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--problem", "sudoku"], "--problem must be one of regression, tsp, not 'sudoku'"),
        (["--cities", "2"], "--cities must be at least 3"),
        (["--requests", "0"], "--requests must be at least 1"),
    ],
)
def test_a_wrong_flag_is_one_line(words, message):
    done = call(*words)
    assert done.returncode == 2 and done.stderr.strip() == f"error: {message}"
