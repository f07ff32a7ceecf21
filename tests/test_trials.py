"""What a text optimizer asks and tries: recorded before it is used, and taken from the record by a run that goes on."""

from dataclasses import replace

import pytest
from conftest import ROOT, own_task, text_settings

from support.answerers import Answerer, local_answerer
from support.evaluation import Generation, Written
from support.files import UserError, read_jsonl, write_jsonl
from support.proposals import Judge, unknown_tokens
from support.rouge import rouge_l
from support.trials import FOR_SCORES, PULL, Search, Trials, promising, shortened, show_cases
from text_optimizers import METHODS

ROWS = [{"id": "a", "question": "1 + 1", "answer": "2"}, {"id": "b", "question": "2 + 1", "answer": "3"}]


class Model:
    """Writes and answers what it is given, and keeps what it was asked."""

    def __init__(self, replies=("<prompt>think .</prompt>",), answers=("2", "4")):
        self.replies, self.answers, self.asked, self.generated = replies, answers, [], []
        self.answerer = Answerer("m", ("m",), self.generate, write=self.write)

    def write(self, chats, sampling):
        self.asked.append((chats, sampling))
        return [[Written(text, 3, 7 if not k else 0) for k, text in enumerate(self.replies)] for _ in chats]

    def generate(self, task, rows, prompt, settings, done):
        for row, answer in zip(rows, self.answers):
            if row["id"] not in done:
                self.generated.append((prompt, row["id"]))
                yield [Generation(row, "so", answer, 5, False)]


def trials_of(model, folder, **changes):
    return Trials(model.answerer, model.answerer, own_task(), ROWS, text_settings("opro", **changes), folder)


def test_a_reply_is_on_disk_and_a_run_that_goes_on_does_not_ask_again(tmp_path):
    model = Model(replies=("x", "y"))
    first = trials_of(model, tmp_path)
    assert first.ask([["hello"], ["one", "two", "three"]], 2, 0.7) == [["x", "y"], ["x", "y"]]
    ((chats, sampling),) = model.asked
    assert [message["role"] for message in chats[1]] == ["user", "assistant", "user"]
    assert (sampling.samples, sampling.temperature, sampling.seed) == (2, 0.7, "0/0")
    again = trials_of(model, tmp_path)
    assert again.ask([["hello"], ["one", "two", "three"]], 2, 0.7) == [["x", "y"], ["x", "y"]]
    assert len(model.asked) == 1 and again.totals == first.totals
    assert first.totals == {
        "optimizer_requests": 2,
        "optimizer_samples": 4,
        "optimizer_tokens": 12,
        "optimizer_prompt_tokens": 14,
    }
    again.ask([["hello"]])
    assert model.asked[1][1].seed == "0/1"  # another call, another seed


def test_replies_of_a_server_that_counts_no_tokens_are_used_and_said_to_be_uncounted(tmp_path):
    model = Model()
    model.write = lambda chats, sampling: [[Written("x", None, None), Written("y", None, 0)] for _ in chats]
    model.answerer = replace(model.answerer, write=model.write)
    for _ in range(2):  # the second time from the record
        trials = trials_of(model, tmp_path)
        assert trials.ask([["hello"]], 2, 0.7) == [["x", "y"]]
        assert trials.totals["optimizer_uncounted"] == trials.totals["optimizer_samples"] == 2
        assert trials.totals["optimizer_tokens"] == 0
    (line,) = unknown_tokens(trials.totals)
    assert "of 2 replies the server counted no tokens" in line and unknown_tokens({}) == []


@pytest.mark.parametrize("changed", [{"samples": 3}, {"temperature": 0.5}, {"chats": [["other"]]}])
def test_a_run_that_goes_on_and_asks_something_else_is_an_error(tmp_path, changed):
    asked = {"chats": [["hello"]], "samples": 1, "temperature": 0.7}
    trials_of(Model(), tmp_path).ask(**asked)
    with pytest.raises(UserError, match="optimizer.jsonl, line 1: .*something else"):
        trials_of(Model(), tmp_path).ask(**asked | changed)


def test_a_prompt_is_scored_once_and_its_rows_are_on_disk_as_they_come(tmp_path):
    model = Model()
    trials = trials_of(model, tmp_path)
    assert trials.accuracy("think .") == 0.5 and trials.accuracy("think .") == 0.5
    assert model.generated == [("think .", "a"), ("think .", "b")]
    assert trials.totals == {"scored_generations": 2, "generated_tokens": 10}
    lines = read_jsonl(tmp_path / "train_predictions.jsonl")
    assert [(line["id"], line["correct"], line["split"]) for line in lines] == [
        ("a", True, "train"),
        ("b", False, "train"),
    ]
    write_jsonl(tmp_path / "train_predictions.jsonl", lines[:1])  # killed behind the first row
    again = trials_of(model, tmp_path)
    assert again.accuracy("think .") == 0.5 and model.generated[2:] == [("think .", "b")]
    assert [row["id"] for row, _ in again.mistakes("think .")] == ["b"] and len(again.cases("think .")) == 2


def test_rows_of_another_version_of_the_grader_are_refused(tmp_path):
    trials_of(Model(), tmp_path).accuracy("think .")
    lines = read_jsonl(tmp_path / "train_predictions.jsonl")
    write_jsonl(tmp_path / "train_predictions.jsonl", [line | {"grader_version": 0} for line in lines])
    with pytest.raises(UserError, match="another version of the grader"):
        trials_of(Model(), tmp_path)


def test_a_budget_holds_whole_prompts_and_what_was_scored_costs_nothing(tmp_path):
    trials = trials_of(Model(), tmp_path, budget=5)
    for prompt in ("one .", "two ."):
        assert trials.affords(prompt)
        trials.accuracy(prompt)
    assert trials.affords("one .") and not trials.affords("three .")


def test_replies_are_counted_by_what_became_of_them(tmp_path):
    trials = trials_of(Model(), tmp_path)
    search = Search(trials, Judge(own_task(), ROWS, 20), ["start ."], 1)
    replies = ["<prompt>think .</prompt>", "think .", "", "<prompt>1 .</prompt>", "z" * 21, "<prompt>two .</prompt>"]
    assert search.accept(replies) == ["think .", "think .", None, None, None, "two ."]
    expected = {"all": 6, "new": 2, "repeated": 1, "empty": 1, "leaking": 1, "too long": 1, "in tags": 3}
    assert search.replies == expected


def test_draws_of_a_step_depend_on_seed_step_and_purpose_alone(tmp_path):
    trials = trials_of(Model(), tmp_path)
    search = Search(trials, None, [], 1)
    assert search.rng("x").random() == search.rng("x").random() != search.rng("y").random()
    before = search.rng("x").random()
    search.step += 1
    assert search.rng("x").random() != before
    assert sorted(row["id"] for row in search.draw_rows(5, "x")) == ["a", "b"]


def test_long_texts_are_shown_with_head_and_tail():
    text = "h" * 400 + "t" * 400
    assert shortened(text).startswith("h" * 300) and shortened(text).endswith("t" * 300) and len(shortened(text)) < 620
    shown = show_cases([(ROWS[0], {"text": text, "answer": "7", "correct": False})])
    assert shortened(text) in shown and shown.endswith("Its answer: 7\nRight answer: 2")


# --- Texts to be generated ----------------------------------------------------------------------------------------


def of_texts(folder, texts):
    """Trials of a task whose reference is "a b c d" for each row, under a prompt with which these texts are written."""
    rows = [{"id": str(n), "question": f"q{n}", "answer": "a b c d"} for n in range(len(texts))]

    def generate(task, rows, prompt, settings, done):
        for row, text in zip(rows, texts):
            if row["id"] not in done:
                yield [Generation(row, text, "", 5, False)]

    answerer = Answerer("m", ("m",), generate)
    return Trials(answerer, answerer, own_task("generation", ""), rows, text_settings("apo"), folder)


@pytest.mark.parametrize(
    ("texts", "ids"),
    [
        (["a b c d", "a b", "a", "x"], ["2", "3"]),
        (["a b c d", "a b c", "a b c"], ["1", "2"]),
        (["a b", "a b", "a b"], ["0", "1", "2"]),
        (["a b c d"] * 3, []),
        (["a b c d", "a b c d", "a"], ["2"]),
    ],
)
def test_of_scores_the_mistakes_are_the_worse_half_without_perfect_rows(tmp_path, texts, ids):
    trials = of_texts(tmp_path, texts)
    assert [row["id"] for row, _ in trials.mistakes("p")] == ids and len(trials.cases("p")) == len(texts)
    scores = [rouge_l(["a b c d"], text) for text in texts]
    assert trials.accuracy("p") == pytest.approx(sum(scores) / len(scores))
    assert of_texts(tmp_path, []).kept  # on disk, and read again as they were


def test_an_optimizer_reads_of_scores_and_good_texts_where_texts_are_generated(tmp_path):
    trials = of_texts(tmp_path, ["a b"])
    (case,) = trials.cases("p")
    assert trials.outcome(case) == "67 in 100, by how much it agrees with a reference text"
    assert show_cases([case]) == "Question: q0\nThe model wrote: a b\nAccuracy: 67\nA good text: a b c d"
    assert trials.show_rows(trials.rows).endswith("A good text: a b c d")


def test_each_part_of_a_meta_prompt_that_is_worded_anew_for_texts_is_there(tmp_path):
    trials = of_texts(tmp_path, ["a b"])
    templates = [template for method in METHODS.values() for template in method.meta_prompts]
    for part, other in FOR_SCORES.items():
        with_part = [template for template in templates if part in template]
        assert with_part and all(other in trials.worded(template) for template in with_part)
    worded = " ".join(map(trials.worded, templates)).lower()
    assert "right answer" not in worded and "questions wrong" not in worded
    others = trials_of(Model(), tmp_path / "number")
    assert [others.worded(template) for template in templates] == templates


# --- With the demo's model --------------------------------------------------------------------------------------


@pytest.fixture
def of_the_demo(demo_engine, demo_task, demo_data, tmp_path):
    answerer = local_answerer(demo_engine, str(ROOT / "demo" / "model"))
    settings = text_settings("random")
    return Trials(answerer, answerer, demo_task, demo_data["train"][:6], settings, tmp_path, demo_engine)


def test_random_prompts_are_the_task_model_s_own_words_where_the_prompt_stands(of_the_demo, demo_engine):
    drawn = of_the_demo.draw_prompts(of_the_demo.rows, 1.0, 12)
    texts = [text for [text] in drawn]
    assert len(set(texts)) > 3 and all(text.split()[-1] == "." or len(text.split()) == 12 for text in texts)
    assert of_the_demo.totals["optimizer_samples"] == 6 and not of_the_demo.totals["optimizer_requests"]
    again = replace(of_the_demo, totals=of_the_demo.totals.copy(), engine=None)  # from the record, without a model
    again.engine = demo_engine
    assert again.draw_prompts(of_the_demo.rows, 1.0, 12) == drawn


def test_prompts_of_like_words_are_more_alike_than_others_to_the_model(of_the_demo):
    likeness = of_the_demo.similarities(
        "check each step .", ["check each step .", "check each sum .", "rush hastily ."]
    )
    assert likeness[0] == pytest.approx(1) and likeness[0] > likeness[1] > likeness[2]


# --- The bandit --------------------------------------------------------------------------------------

MANY = [{"id": str(n), "question": f"{n} + 1", "answer": str(n + 1)} for n in range(40)]


class Known(Model):
    """Answers right in so many of forty rows under each prompt."""

    def __init__(self, right):
        super().__init__()
        self.right = right

    def generate(self, task, rows, prompt, settings, done):
        self.generated.append((prompt, [row["id"] for row in rows]))
        for row in rows:
            if row["id"] not in done:
                right = int(row["id"]) < self.right[prompt]
                yield [Generation(row, "so", row["answer"] if right else "99", 5, False)]


def bandit_search(model, folder, **changes):
    settings = text_settings("apo", **changes)
    return Search(Trials(model.answerer, model.answerer, own_task(), MANY, settings, folder), None, [], 1)


def test_a_bandit_lets_the_best_through_and_asks_less_than_all_rows(tmp_path):
    right = {f"prompt {n} .": n * 8 for n in range(6)}  # of 40 rows
    search = bandit_search(Known(right), tmp_path, bandit=96, beam=2)
    kept = promising(search, list(right))
    assert set(kept) == {"prompt 5 .", "prompt 4 ."} and search.trials.totals["scored_generations"] == 96
    assert search.score(kept[0]).accuracy == 40 / 40 or kept[0] == "prompt 4 ."
    before = search.trials.totals["scored_generations"]
    answered = len(search.trials.answered["prompt 3 ."])
    search.score("prompt 3 .")  # only the rows that the bandit did not ask
    assert 0 < answered < 40 and search.trials.totals["scored_generations"] == before + 40 - answered


def test_without_a_bandit_all_go_on_and_one_keeps_to_the_budget(tmp_path):
    right = {"one .": 40, "two .": 0}
    assert promising(bandit_search(Known(right), tmp_path), list(right)) == list(right)
    search = bandit_search(Known(right), tmp_path, bandit=80, beam=1, budget=3 * PULL + 1)
    assert promising(search, list(right)) == ["one ."]
    assert search.trials.totals["scored_generations"] == 3 * PULL


def test_a_bandit_that_was_killed_makes_the_same_pulls_in_the_same_batches(tmp_path):
    right = {"one .": 30, "two .": 20, "three .": 10}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    whole = Known(right)
    kept = promising(bandit_search(whole, tmp_path / "a", bandit=64, beam=2), list(right))
    lines = read_jsonl(tmp_path / "a" / "train_predictions.jsonl")
    write_jsonl(tmp_path / "b" / "train_predictions.jsonl", lines[: 3 * PULL + 3])  # killed in the fourth pull
    again = Known(right)
    assert promising(bandit_search(again, tmp_path / "b", bandit=64, beam=2), list(right)) == kept
    assert again.generated == whole.generated[3:]
    assert read_jsonl(tmp_path / "b" / "train_predictions.jsonl") == lines
