"""The text optimizers: their schedules, what each asks and keeps, how many calls it takes, and each on the demo."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, own_task, text_settings

from support.answerers import Answerer, local_answerer, server_answerer
from support.engine import load_engine
from support.evaluation import Generation, Written, evaluate
from support.files import text_hash
from support.plans import planned
from support.proposals import Judge
from support.runs import Scored
from support.settings import TEXT_METHODS, ServerFlags
from support.trials import Search, Trials
from text_optimizers import METHODS, optimize, word_limit

ASKING = [method for method in TEXT_METHODS if method != "random"]

# --- An optimizer and a task model that do what the test wants ---------------------------------------------------

ROWS = [{"id": f"r{n}", "question": f"question {n}", "answer": "yes" if n % 2 else "no"} for n in range(10)]


def in_letters(number):
    """A word for a number, since a digit could be an answer."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


class Fakes:
    """An optimizer that always writes another prompt, and a task model that is right on some rows, few prompts on most.
    Both keep what they are asked."""

    def __init__(self, replies=None):
        self.numbers = itertools.count()
        self.replies = replies or (lambda chat, number: f"<prompt>prompt {in_letters(number)}.</prompt>")
        self.chats, self.scored = [], []
        self.optimizer = Answerer("o", ("o",), None, write=self.write)
        self.answerer = Answerer("t", ("t",), self.generate)

    def write(self, chats, sampling):
        self.chats += [(chat, sampling) for chat in chats]
        return [
            [Written(self.replies(chat, next(self.numbers)), 5, 0 if k else 50) for k in range(sampling.samples)]
            for chat in chats
        ]

    def generate(self, task, rows, prompt, settings, done):
        self.scored.append(prompt)
        for row in rows:
            right = share_of(prompt) ** 4 * 9 > int(row["id"][1:])
            yield [Generation(row, "because", row["answer"] if right else "neither", 4, False)]


SALT = "c"  # with which no prompt is the best at once


def share_of(text):
    """A number from 0 to 1 for a text, none for two alike."""
    return int(text_hash(f"{SALT}{text}")[:8], 16) / 16**8


def search_of(method, folder, fakes, seeds=("start.",), **changes):
    settings = text_settings(method, **changes)
    task = own_task("text", "So")
    trials = Trials(fakes.answerer, fakes.optimizer, task, ROWS, settings, Path(folder))
    if method == "random":
        trials.draw_prompts = lambda rows, temperature, tokens: [[f"draw {in_letters(next(fakes.numbers))}. More"]] * 8
    trials.similarities = lambda prompt, others: [-abs(len(prompt) - len(other)) for other in others]
    judge = Judge(task, ROWS, settings.longest_prompt, METHODS[method].meta_prompts)
    return Search(trials, judge, list(seeds), settings.rounds or 10)


def steps_of(method, folder, fakes, **more):
    search = search_of(method, folder, fakes, **more)
    return list(optimize(METHODS[method], search)), search


# --- Schedules ---------------------------------------------------------------------------------------------------


def test_the_cosine_word_limit_is_the_released_one():
    released = [49, 48, 47, 45, 42, 40, 36, 33, 30, 26, 23, 20, 17, 14, 12, 11, 10, 10]
    assert [word_limit("cosine", step, 18) for step in range(1, 19)] == released
    assert word_limit("cosine", 25, 18) == 10  # a budget may hold more rounds than were planned


def test_the_other_word_limits_fall_evenly_stay_or_are_none():
    assert [word_limit("linear", step, 4) for step in range(1, 5)] == [40, 30, 20, 10]
    assert {word_limit("fixed", step, 4) for step in range(1, 5)} == {50}
    assert word_limit("none", 1, 4) is None


# --- The loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ASKING)
def test_a_run_takes_exactly_the_calls_that_were_planned(tmp_path, method):
    fakes = Fakes()
    steps, search = steps_of(method, tmp_path, fakes)
    whole = planned(search.settings, 1, search.settings.rounds)
    for step, calls in zip(steps, whole, strict=True):
        assert step.totals["scored_generations"] == calls.prompts * len(ROWS)
        assert step.totals.get("optimizer_requests", 0) == calls.requests == step.totals.get("optimizer_requests", 0)
        assert step.totals.get("optimizer_samples", 0) == calls.samples
    assert len(fakes.chats) == whole[-1].requests and len(set(fakes.scored)) == len(fakes.scored) == whole[-1].prompts
    assert steps[-1].totals["optimizer_tokens"] == 5 * whole[-1].samples
    assert steps[-1].totals["optimizer_prompt_tokens"] == 50 * whole[-1].requests


@pytest.mark.parametrize("method", [method for method in TEXT_METHODS if not method.startswith("gpo")])
def test_the_best_kept_prompt_never_gets_worse(tmp_path, method):
    steps, search = steps_of(method, tmp_path, Fakes())
    best = [max(search.archive[prompt].accuracy for prompt in step.pool) for step in steps]
    assert best == sorted(best) and best[0] < best[-1] == steps[-1].best.accuracy


def test_gpo_moves_to_a_new_prompt_in_each_round_also_downhill(tmp_path):
    steps, search = steps_of("gpo", tmp_path, Fakes(), rounds=12)
    winners = steps[-1].pool
    assert len(set(winners)) == len(winners) == 13
    for step in steps[1:]:
        assert step.pool[-1] == max(step.proposed, key=lambda one: one.accuracy).prompt
    accuracies = [search.archive[prompt].accuracy for prompt in winners]
    assert accuracies != sorted(accuracies)
    assert steps[-1].best.accuracy == max(one.accuracy for one in search.archive.values())


def test_in_differential_evolution_no_slot_gets_worse_and_a_tie_keeps_the_old_prompt(tmp_path):
    steps, search = steps_of("evoprompt-de", tmp_path, Fakes())
    for before, after in itertools.pairwise(steps):
        for old, new in zip(before.pool, after.pool, strict=True):
            assert search.archive[new].accuracy > search.archive[old].accuracy or new == old
    assert steps[0].pool != steps[-1].pool


def test_textgrad_keeps_its_prompt_against_a_worse_one_and_takes_an_equal_one(tmp_path):
    search = search_of("textgrad", tmp_path, Fakes())
    old, worse, equal = (Scored(prompt, accuracy, 1, 0) for prompt, accuracy in (("a", 0.5), ("b", 0.4), ("c", 0.5)))
    search.pool, search.step = [old], 1
    for child, kept in [(worse, old), (None, old), (equal, equal)]:
        assert METHODS["textgrad"].keep(search, [child]) == [kept]
    steps, search = steps_of("textgrad", tmp_path, Fakes())
    for before, after in itertools.pairwise(steps):
        (old,), (new,), (child,) = before.pool, after.pool, after.proposed
        assert new == (child.prompt if child.accuracy >= search.archive[old].accuracy else old)


@pytest.mark.parametrize("method", TEXT_METHODS)
def test_a_budget_is_never_exceeded_and_all_but_used_up(tmp_path, method):
    steps, _ = steps_of(method, tmp_path, Fakes(), budget=335, rounds=None)
    assert steps[-1].totals["scored_generations"] == 330
    assert [step.step for step in steps] == list(range(len(steps)))


@pytest.mark.parametrize("method", TEXT_METHODS)
def test_with_all_replies_empty_the_run_goes_on_and_ends_with_what_it_has(tmp_path, method):
    fakes = Fakes(lambda chat, number: "")
    search = search_of(method, tmp_path, fakes)
    search.trials.draw_prompts = lambda rows, temperature, tokens: [[""]] * 8
    steps = list(optimize(METHODS[method], search))
    assert steps[-1].best.prompt == "start." and len(steps) == search.settings.rounds + 1
    assert steps[-1].replies["all"] == steps[-1].replies["empty"] > 0 and fakes.scored == ["start."]


@pytest.mark.parametrize("method", TEXT_METHODS)
def test_an_optimizer_that_repeats_itself_ends_a_run_that_only_a_budget_would_end(tmp_path, method):
    fakes = Fakes(lambda chat, number: "<prompt>always this.</prompt>")
    search = search_of(method, tmp_path, fakes, budget=10**6)
    search.trials.draw_prompts = lambda rows, temperature, tokens: [["always this."]] * 8
    steps = list(optimize(METHODS[method], search))
    assert 10 <= len(steps) <= 13 and sorted(fakes.scored) == ["always this.", "start."]
    assert steps[-1].replies["repeated"] == steps[-1].replies["all"] - 1


@pytest.mark.parametrize("method", ["apo", "pe2", "textgrad"])
def test_a_prompt_without_mistakes_gives_no_error_and_no_reason_is_asked_for(tmp_path, method):
    fakes = Fakes()
    fakes.answerer = Answerer("t", ("t",), all_right)
    steps, _ = steps_of(method, tmp_path, fakes, rounds=2)
    assert steps[-1].best.accuracy == 1 and steps[-1].best.prompt == "start."
    asked = "\n".join(message["content"] for chat, _ in fakes.chats for message in chat)
    assert "got these questions wrong" not in asked and "counts as wrong" not in asked
    assert steps[-1].proposed and asked


def all_right(task, rows, prompt, settings, done):
    return ([Generation(row, "because", row["answer"], 4, False)] for row in rows)


@pytest.mark.parametrize("method", TEXT_METHODS)
def test_given_prompts_are_where_a_method_starts(tmp_path, method):
    seeds = ["start.", "one.", "another one.", "third of them."]
    steps, search = steps_of(method, tmp_path, Fakes(), seeds=seeds, rounds=1)
    assert [one.prompt for one in steps[0].proposed[:4]] == seeds
    best = max((search.archive[seed] for seed in seeds), key=lambda one: one.accuracy)
    assert best.prompt in steps[0].pool


class Killed(Fakes):
    """Is killed at a call, in the middle of what it writes or generates."""

    def __init__(self, last_call):
        super().__init__()
        self.left = last_call

    def write(self, chats, sampling):
        """What depends on the chats and the seed alone, as of a model."""
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        written = []
        for chat, k in itertools.product(chats, range(sampling.samples)):
            word = in_letters(int(text_hash(f"{sampling.seed}{chat}{k}")[:6], 16))
            written.append(Written(f"<prompt>{word}.</prompt>", 5, 9))
        return [written[start : start + sampling.samples] for start in range(0, len(written), sampling.samples)]

    def generate(self, task, rows, prompt, settings, done):
        self.left -= 1
        missing = [row for row in rows if row["id"] not in done]
        for number, group in enumerate(super().generate(task, missing, prompt, settings, done)):
            if self.left < 0 and number == 3:
                raise KeyboardInterrupt
            yield group


@pytest.mark.parametrize("method", ASKING)
def test_a_run_that_was_killed_anywhere_ends_as_if_it_never_stopped(tmp_path, method):
    (tmp_path / "whole").mkdir()
    whole, _ = steps_of(method, tmp_path / "whole", Killed(10**9), rounds=3)
    for last_call in (0, 1, 2, 3, 5, 8):
        folder = tmp_path / str(last_call)
        folder.mkdir()
        with pytest.raises(KeyboardInterrupt):
            steps_of(method, folder, Killed(last_call), rounds=3)
        again, _ = steps_of(method, folder, Killed(10**9), rounds=3)
        assert [replace(step, seconds={}) for step in again] == [replace(step, seconds={}) for step in whole]
        for name in ("optimizer.jsonl", "train_predictions.jsonl"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- What the optimizer is shown ---------------------------------------------------------------------------------


def asked_by(method, folder, round_number=2, **changes):
    """The text of the first chat of a round, and the search."""
    fakes = Fakes()
    search = search_of(method, folder, fakes, **changes)
    for step in optimize(METHODS[method], search):
        if step.step == round_number - 1:
            before = len(fakes.chats)
        elif step.step == round_number:
            return fakes.chats[before][0][-1]["content"], search, step
    raise AssertionError("no such round")


def test_opro_shows_the_best_prompts_in_rising_order_with_whole_percents_and_the_place_of_the_prompt(tmp_path):
    text, _, step = asked_by("opro", tmp_path, 4, shown=5)
    blocks = [block for block in text.split("\n\n") if block.startswith("Instruction: ")]
    accuracies = [int(block.rsplit(" ", 1)[1]) for block in blocks]
    assert len(blocks) == 5 and accuracies == sorted(accuracies) and accuracies[-1] > accuracies[0]
    assert text.count("[INSTRUCTION]\nRight answer: ") == 3 and text.endswith("</prompt>")


def test_opro_hides_prompts_below_the_threshold_unless_all_are(tmp_path):
    counts = {}
    for threshold in (0.0, 0.3, 1.1):
        folder = tmp_path / str(threshold)
        folder.mkdir()
        text, *_ = asked_by("opro", folder, 3, least_accuracy=threshold)
        shown = [int(line.split()[-1]) for line in text.splitlines() if line.startswith("Accuracy: ")]
        counts[threshold] = len(shown)
        assert threshold > 1 or min(shown) >= 100 * threshold
    assert 0 < counts[0.3] < counts[0.0] == counts[1.1]


def gpo_search(folder, retrieval):
    """A search with a trajectory of five prompts of different length, the current one last."""
    search = search_of("gpo", folder, Fakes(), retrieval=retrieval)
    lengths = {"aaaa": 0.9, "bbbbbbbb": 0.1, "c": 0.5, "dddddd": 0.3, "eeeee": 0.2}
    search.pool = [Scored(prompt, accuracy, 1, n) for n, (prompt, accuracy) in enumerate(lengths.items())]
    return search


@pytest.mark.parametrize(
    ("retrieval", "expected"),
    [
        ("relevance", [{"aaaa", "dddddd"}, "eeeee"]),
        ("recency", ["c", "dddddd", "eeeee"]),
        ("importance", ["c", "aaaa", "eeeee"]),
        ("none", ["eeeee"]),
    ],
)
def test_gpo_shows_the_current_prompt_behind_the_earlier_ones_of_the_retrieval(tmp_path, retrieval, expected):
    shown = [one.prompt for one in METHODS["gpo"].retrieve(gpo_search(tmp_path, retrieval))]
    assert shown == expected or (retrieval == "relevance" and [set(shown[:2]), shown[2]] == expected)


def test_gpo_tells_how_many_words_may_change_and_its_sgdm_variant_shows_notes_and_edits(tmp_path):
    (tmp_path / "gpo").mkdir()
    text, *_ = asked_by("gpo", tmp_path / "gpo", 5)
    assert "Up to 30 words may differ" in text and "write a new one that does better" in text and "Accuracy: " in text
    (tmp_path / "sgdm").mkdir()
    fakes = Fakes(
        lambda chat, number: "a lesson" if "Notes so far" in chat[-1]["content"] else f"try {in_letters(number)}"
    )
    steps_of("gpo-sgdm", tmp_path / "sgdm", fakes, rounds=2)
    notes, first, again, second = [chat[-1]["content"] for chat, _ in fakes.chats]
    assert "Notes so far: none" in notes and "Notes so far: a lesson" in again
    assert "so far: a lesson" in first and "Improve the current instruction" in second and "Earlier instr" not in second


def test_apo_gives_each_edit_its_mistakes_and_the_reason_for_them(tmp_path):
    fakes = Fakes(lambda chat, number: f"reason {in_letters(number)}")
    steps_of("apo", tmp_path, fakes, rounds=1)
    texts = [chat[-1]["content"] for chat, _ in fakes.chats]
    reasons, edits, rewordings = texts[:4], texts[4:8], texts[8:]
    for number, (reason, edit) in enumerate(zip(reasons, edits)):
        mistakes = reason[: reason.index("Name one weakness")]
        assert edit.startswith(mistakes) and f"reason {in_letters(number)}" in edit
        assert reason.count("Right answer: ") == 4 and "Its answer: neither" in reason
    assert len(rewordings) == 1 + 4 and len({sampling.seed for _, sampling in fakes.chats}) == 3


def test_pe2_goes_on_with_its_own_conversation(tmp_path):
    fakes = Fakes()
    steps_of("pe2", tmp_path, fakes, rounds=1)
    chats = [chat for chat, _ in fakes.chats]
    for examined, refined in zip(chats[:4], chats[4:], strict=True):
        assert refined[:3] == examined and len(refined) == 5
        assert [message["role"] for message in refined] == ["user", "assistant", "user", "assistant", "user"]
        assert refined[3]["content"].startswith("<prompt>prompt ")  # what it wrote on the cases
    assert [sampling.temperature for _, sampling in fakes.chats] == [0.5] * 4 + [0.7] * 4


def test_evoprompt_draws_parents_by_accuracy_and_no_prompt_with_itself(tmp_path):
    fakes = Fakes()
    search = search_of("evoprompt-ga", tmp_path, fakes)
    search.pool = [Scored("good one", 0.9, 1, 0), Scored("bad one", 0.0, 1, 0), Scored("fair one", 0.5, 1, 0)]
    search.step = 1
    METHODS["evoprompt-ga"].propose(search)
    texts = [chat[-1]["content"] for chat, _ in fakes.chats]
    assert len(texts) == 8 and not any("bad one" in text for text in texts)
    assert all("good one" in text and "fair one" in text for text in texts)


# --- On the demo, with an optimizer behind a server -----------------------------------------------------------------


@pytest.mark.parametrize("method", TEXT_METHODS)
def test_every_method_improves_the_demo_s_prompt(method, demo_engine, demo_task, demo_data, demo_server, tmp_path):
    # Most of so small a budget would go into guesses, which here are drawn without looking at anything.
    few = {"guesses": 2} if method == "ape" else {}
    settings = text_settings(method, budget=16 * 36, **few)
    answerer = local_answerer(demo_engine, str(ROOT / "demo" / "model"))
    optimizer = server_answerer(ServerFlags(answer_turn="ask"), demo_server, "scripted")
    rows = demo_data["train"][:16]
    trials = Trials(answerer, optimizer, demo_task, rows, settings, tmp_path, demo_engine)
    judge = Judge(demo_task, rows, settings.longest_prompt, METHODS[method].meta_prompts, demo_engine.tokenizer)
    *_, last = optimize(METHODS[method], Search(trials, judge, [demo_task.initial_prompt], 8))
    accuracy = {}
    for prompt in (demo_task.initial_prompt, last.best.prompt):
        found = evaluate(answerer, demo_task, demo_data["dev"][:40], prompt, settings)
        accuracy[prompt] = sum(prediction["correct"] for prediction in found) / 40
    assert accuracy[last.best.prompt] > accuracy[demo_task.initial_prompt] + 0.1
    assert last.replies["new"] + last.replies.get("repeated", 0) == last.replies["all"]


# --- With a real model as optimizer --------------------------------------------------------------------------------

# The folder of an instruction-tuned model: GREATER_OPTIMIZER=path/to/Qwen2.5-0.5B-Instruct pytest -m slow
REAL_MODEL = os.environ.get("GREATER_OPTIMIZER", "")


@pytest.mark.slow
@pytest.mark.skipif(not REAL_MODEL, reason="GREATER_OPTIMIZER names no model")
@pytest.mark.parametrize("method", ["opro", "gpo"])
def test_a_real_small_model_is_an_optimizer_whose_replies_can_be_read(method, tmp_path):
    engine = load_engine(REAL_MODEL, "cpu", "float32")
    rows = [{"id": f"{n}", "question": f"Is {n} an even number?", "answer": "no" if n % 2 else "yes"} for n in range(6)]
    task = own_task("boolean", "So the answer is", ("yes", "no"))
    settings = text_settings(method, rounds=3, samples=4, max_new_tokens=48, optimizer_tokens=128)
    answerer = local_answerer(engine, REAL_MODEL)
    results = []
    for folder in ("first", "again"):
        (tmp_path / folder).mkdir()
        trials = Trials(answerer, answerer, task, rows, settings, tmp_path / folder, engine)
        judge = Judge(task, rows, settings.longest_prompt, METHODS[method].meta_prompts, engine.tokenizer)
        steps = list(optimize(METHODS[method], Search(trials, judge, ["think step by step."], 3)))
        results.append([replace(step, seconds={}) for step in steps])
    assert results[0] == results[1]  # the same seed draws the same texts
    replies = results[0][-1].replies
    assert replies["all"] == 12 and replies["new"] >= 4
    assert results[0][-1].totals["optimizer_requests"] == 3
