"""From what an optimizer wrote to a prompt, or why it is none."""

from dataclasses import replace

import pytest
from conftest import own_task

from support.proposals import COPIED, EMPTY, LEAKING, TAG_LEFT, TOO_LONG, UNKNOWN_WORDS, Judge, in_place, parse, summary
from support.runs import Scored, TextStep
from support.tasks import get_task

ROWS = [
    {
        "id": "a",
        "question": "Tom buys three red apples at the market and sells two of them",
        "answer": "carbon dioxide",
    },
    {"id": "b", "question": "Is it?", "answer": "no"},
    {"id": "c", "question": "Is it so or not?", "answer": "no"},
]
TEMPLATE = """Here is what was tried for one task so far: {earlier}
Reply with the prompt alone, in this form: <prompt>text of the prompt</prompt>"""


@pytest.mark.parametrize(
    ("reply", "prompt", "in_tags"),
    [
        ("<prompt>Think.</prompt>", "Think.", True),
        ("First <prompt>a b</prompt>, better: <PROMPT> Think\n twice. </Prompt> Good.", "Think twice.", True),
        ("<prompt>Think hard.", "Think hard.", False),  # cut, or the end was forgotten
        ("Think hard.</prompt> It is short.", "Think hard.", False),
        ('"Think **hard**."', "Think hard.", False),
        ("```\nThink hard.\n```", "Think hard.", False),
        ("Here is the improved prompt: “Think hard.”", "Think hard.", False),
        ("<think>They want <prompt>x</prompt></think><prompt>Think hard.</prompt>", "Think hard.", True),
        ("<think>It goes on and on", "", False),
        ("<new prompt>Think hard.</new prompt>", "Think hard.", False),
        ("<b>Think</b> hard.", "<b>Think</b> hard.", False),
        ("", "", False),
        ('"', '"', False),
    ],
)
def test_a_prompt_is_found_in_whatever_form_it_comes(reply, prompt, in_tags):
    assert parse(reply) == (prompt, in_tags)


def judge(task, **more):
    return Judge(task, ROWS, 100, (TEMPLATE,), **more)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("Think hard.", ""),
        ("", EMPTY),
        ("...", EMPTY),
        ("z" * 101, TOO_LONG),
        ("z" * 100, ""),
        ("Put it at [INSTRUCTION].", TAG_LEFT),
        ("Here is what was tried for one task so far.", COPIED),
        ("text of the prompt", COPIED),  # the reply repeated what it was asked for
        ("Sum: text of the prompt", COPIED),
        ("<b>Think</b> hard.", TAG_LEFT),
        ("<not (True and False) is>", TAG_LEFT),
        ("If 3 < 4 and 5 > 2, think.", TAG_LEFT),
        ("Think of a < b.", ""),
        ("Remember that Tom buys three red apples at the market!", LEAKING),
        ("Tom buys three red apples.", ""),
        ("Say: is it so or not?", LEAKING),  # a whole question
        ("Is it so?", ""),
    ],
)
def test_what_cannot_be_a_prompt_is_refused_with_the_reason(prompt, reason):
    assert judge(own_task("text")).refusal(prompt) == reason


@pytest.mark.parametrize(
    ("kind", "choices", "leaking", "good"),
    [
        ("number", (), "Carry the 1.", "Carry the one."),
        ("text", (), "It is Carbon Dioxide.", "Say no to haste."),
        ("boolean", ("yes", "no"), "The answer is no.", "The answer is yes or no."),
        ("boolean", ("yes", "no"), "Say that the answer: Yes", "No guessing: the answer is not known."),
        ("choice", ("A", "B", "C"), "Conclude that the answer is (B).", "A careful look, then answer: A, B or C."),
    ],
)
def test_a_prompt_that_gives_an_answer_is_leaking(kind, choices, leaking, good):
    of_kind = judge(own_task(kind, choices=choices))
    assert of_kind.refusal(leaking) == LEAKING and of_kind.refusal(good) == ""


def test_a_prompt_with_words_or_marks_that_the_task_model_does_not_know_is_refused(demo_tokenizer):
    of_the_demo = judge(own_task(), tokenizer=demo_tokenizer)
    assert of_the_demo.refusal("check each step .") == ""
    for prompt in ("cheque each step .",):
        assert of_the_demo.refusal(prompt) == UNKNOWN_WORDS
    assert judge(own_task(), tokenizer=Marks()).refusal("check each [end] step .") == UNKNOWN_WORDS


class Marks:
    """A tokenizer with a special token that is no tag."""

    all_special_ids = (7,)

    def encode(self, text, add_special_tokens):
        return [7] if "[end]" in text else [1]

    def get_added_vocab(self):
        return {}


def step(replies, number=3, proposed=()):
    best = Scored("x", 0.5, 10, 0)
    totals = {"scored_generations": 90, "optimizer_requests": 3, "optimizer_tokens": 7, "optimizer_prompt_tokens": 8}
    return TextStep(number, list(proposed), ["x"], best, replies, totals, {})


def test_the_summary_warns_of_an_optimizer_that_is_unfit():
    good = step({"all": 10, "new": 8, "repeated": 1, "empty": 1, "in tags": 9}, proposed=[Scored("y", 0.5, 9, 3)])
    text = "\n".join(summary([step({}, 0), good], "OPRO"))
    assert "9 of 10 replies gave a prompt (90 %), 9 in tags" in text and "1 repeated, 1 empty" in text
    assert "warning" not in text
    for replies, warning in [
        ({"all": 10, "empty": 9, "new": 1}, "most replies gave no prompt"),
        ({"all": 10, "repeated": 9, "new": 1}, "mostly repeated"),
        ({"all": 10, "new": 10, "in tags": 4}, "most replies lack the tags"),
        ({"all": 10, COPIED: 9, "new": 1}, "mostly copied the meta-prompt"),
        ({"all": 10, "repeated": 10}, "no round gave a new prompt"),
    ]:
        assert warning in "\n".join(summary([step({}, 0), step(replies)], "OPRO"))
    assert "no reply of an optimizer" in summary([replace(good, replies={})], "GPO")[0]


def test_six_words_leak_where_one_question_alone_has_them_and_not_where_all_have():
    about = "Is the following sentence about sports plausible to you? "
    rows = [{"question": about + rest, "answer": "yes"} for rest in ("Ann Lee called for the screen.", "Bo Ray ran.")]
    of_rows = Judge(own_task("text"), rows, 100, ())
    assert of_rows.refusal('Translate "Ann Lee called for the screen."') == LEAKING
    assert of_rows.refusal("Ann Lee called for the ball.") == ""  # five words
    assert (
        of_rows.refusal("Say if the following sentence about sports plausible to is.") == ""
    )  # of the task, not of a row


def test_a_first_word_that_already_stands_before_the_place_is_dropped():
    task = own_task()
    assert task.template.endswith("\nUse {prompt}")
    assert in_place("Use short steps.", task) == "short steps." and in_place("use short steps.", task) == "short steps."
    assert in_place("Used steps.", task) == "Used steps." and in_place("Use", task) == "Use"
    assert in_place("Use short steps.", task.bare) == "Use short steps."
    assert in_place("please check .", get_task("demo")) == "check ."
    assert in_place("Think.", replace(task, template="{prompt}\n{question}")) == "Think."
