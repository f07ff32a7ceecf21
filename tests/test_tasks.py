"""Tasks: the table, own tasks, rows."""

from dataclasses import replace

import pytest

from support import sources, tasks
from support.files import UserError, write_jsonl
from support.own import OwnRows
from support.tasks import TASKS, get_task
from support.tokens import answer_ids, extractor_ids

# --- The table ---------------------------------------------------------------------------------------


def test_the_table_holds_all_27_bbh_tasks_and_the_paper_s_21_all_57_mmlu_subjects_and_seven_others():
    names = [n for n in TASKS if n.startswith("bbh/")]
    assert len(names) == 27 and len(tasks.PAPER_BBH) == 21
    subjects = tasks.GROUPS["mmlu"]
    assert len(subjects) == 57 and subjects == sorted(subjects)
    others = {"demo", "gsm8k", "folio", "multiarith", "aqua", "wsc", "webnlg"}
    assert others == set(TASKS) - set(names) - set(subjects)
    assert sources.PUBLISHED.keys() == TASKS.keys() - {"demo"}
    choices = {name[4:]: TASKS[name].choices for name in tasks.PAPER_BBH}
    last = {name: letters[-1] for name, letters in choices.items() if letters and len(letters[0]) == 1}
    assert last == {
        "date_understanding": "F",
        "disambiguation_qa": "D",
        "geometric_shapes": "K",
        "hyperbaton": "B",
        "logical_deduction_five_objects": "E",
        "movie_recommendation": "E",
        "penguins_in_a_table": "E",
        "reasoning_about_colored_objects": "R",
        "ruin_names": "K",
        "salient_translation_error_detection": "F",
        "snarks": "B",
        "temporal_sequences": "D",
        "tracking_shuffled_objects_five_objects": "E",
    }
    words = {name: letters for name, letters in choices.items() if name not in last and letters}
    assert words == {
        "boolean_expressions": ("True", "False"),
        "causal_judgement": ("Yes", "No"),
        "formal_fallacies": ("valid", "invalid"),
        "navigate": ("Yes", "No"),
        "sports_understanding": ("yes", "no"),
        "web_of_lies": ("Yes", "No"),
    }
    assert choices.keys() - last.keys() - words.keys() == {"multistep_arithmetic_two", "object_counting"}


WITH_EXTRACTOR = [task for task in TASKS.values() if not task.is_generation]


@pytest.mark.parametrize("task", WITH_EXTRACTOR, ids=lambda task: task.name)
def test_every_extractor_ends_where_an_answer_can_begin(task):
    assert task.extractor == task.extractor.strip() and task.paper_extractor == task.paper_extractor.strip()
    assert task.template.endswith(" {prompt}") and task.template.count("{question}") == 1
    paper = task.paper_extractor or task.extractor
    assert all(choice in paper for choice in task.choices)
    assert paper.endswith(" is $") or task.name == "demo"


@pytest.mark.parametrize("form", ["extractor", "paper_extractor"])
@pytest.mark.parametrize("task", [t for t in WITH_EXTRACTOR if t.name != "demo"], ids=lambda t: t.name)
def test_the_answer_s_span_is_found_non_empty_and_minimal_for_every_task(subword_tokenizer, task, form):
    """What follows the extractor is the answer and nothing else: no shorter span of ids decodes to it."""
    task = replace(task, extractor=getattr(task, form) or task.extractor)
    gold = {"number": "-1234", "text": "] } )"}.get(task.kind) or task.choices[-1]
    extractor, answer = extractor_ids(subword_tokenizer, task), answer_ids(subword_tokenizer, task, gold)
    assert subword_tokenizer.decode(extractor + answer).strip().endswith(task.extractor + task.answer_prefix + gold)
    assert answer and subword_tokenizer.decode(answer).strip() == gold
    assert all(subword_tokenizer.decode(answer[n:]).strip() != gold for n in range(1, len(answer) + 1))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gsm8", "gsm8k"),
        ("navigat", "bbh/navigate"),
        ("bbh/snark", "bbh/snarks"),
        ("anatomi", "mmlu/anatomy"),
        ("mmlu/prehistori", "mmlu/prehistory"),
    ],
)
def test_an_unknown_task_lists_the_known_ones_and_suggests_the_nearest(name, near):
    with pytest.raises(UserError, match=f"Did you mean {near}\\?.*Known: demo, gsm8k"):
        get_task(name)


def test_a_user_s_own_parts_replace_those_of_a_known_task(tmp_path):
    task = get_task("bbh/navigate", extractor="Hence", template="{question} {prompt}")
    assert (task.extractor, task.template, task.choices) == ("Hence", "{question} {prompt}", ("Yes", "No"))
    assert task.ranks_choices and task.used_answer_space == "choices"
    assert not get_task("bbh/navigate", answer_space="vocabulary").ranks_choices
    free = get_task("bbh/navigate", kind="text")
    assert free.choices == () and free.used_answer_space == "vocabulary"
    assert get_task("gsm8k") == TASKS["gsm8k"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gsm8k", {"kind": "choice"}, "--kind choice: gsm8k has no closed set of answers"),
        ("gsm8k", {"answer_space": "choices"}, "--answer-space choices: gsm8k has no closed set"),
        ("bbh/navigate", {"answer_space": "all"}, "--answer-space must be one of choices, vocabulary"),
        ("bbh/navigate", {"extractor": "  "}, "--extractor must hold at least one word"),
        ("bbh/navigate", {"kind": "word"}, "--kind must be one of number"),
        ("bbh/navigate", {"template": "{prompt}"}, "--template"),
    ],
)
def test_parts_that_do_not_fit_a_known_task_name_their_flag(name, changes, message):
    with pytest.raises(UserError, match=message):
        get_task(name, **changes)


@pytest.mark.parametrize(
    ("answers", "message"),
    [(["Yes", "yes", "No"], "'Yes' and 'yes' count as the same"), (["A", "A"], "every answer is 'A'")],
)
def test_answers_of_a_closed_set_are_told_apart_and_more_than_one(tmp_path, answers, message):
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [{"question": "1?", "answer": answer} for answer in answers])
    with pytest.raises(UserError, match=message):
        get_task(str(path), "So it is")


def test_an_own_task_whose_answers_are_no_closed_set_needs_an_extractor(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    with pytest.raises(UserError, match="--extractor"):
        get_task(str(path))
    task = get_task(str(path), "The answer is $")
    assert (task.name, task.kind, task.answer_prefix) == ("own/mine", "number", "")
    with pytest.raises(UserError, match="--kind must be one of number"):
        get_task(str(path), "The answer is $", kind="digits")
    with pytest.raises(UserError, match="must be a .jsonl, .json, .csv or .tsv file"):
        get_task(str(tmp_path))
    for bad in ("{question}{prompt}", "{question} {prompt}ly", "{prompt} {question} {prompt}", "{question}"):
        with pytest.raises(UserError, match="--template"):
            get_task(str(path), "The answer is", template=bad)


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (["1", "-2.50"], "number"),
        (["A", "C"], "choice"),
        (["yes", "No"], "boolean"),
        (["blue", "1"], "text"),
        (["yes", "no", "maybe"] * 3, "label"),
        (["not sure", "refund of the price", "Refund"] * 4, "label"),
        (["yes", "no", "maybe"] * 2, "text"),
        (["the same"] * 9, "text"),
        (["3,4,5"] * 3, "text"),
    ],
)
def test_the_kind_of_own_answers_is_the_narrowest_that_fits(answers, kind):
    assert tasks.infer_kind(answers) == kind


# --- Rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a", "answer": "1"}\n{"question": ', "line 2: not a JSON object"),
        ("[1, 2]\n", "line 1: not a JSON object"),
        ('{"question": "a"}\n', "line 1: the row has no answer"),
        ('{"question": " ", "answer": "1"}\n', "line 1: the row has no question"),
        ('{"id": 1, "question": "a", "answer": "1"}\n{"id": 1, "question": "b", "answer": "1"}\n', "share an id"),
        ("", "has no rows"),
    ],
)
def test_a_malformed_file_of_rows_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        tasks.read_rows(path)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="cannot read"):
        tasks.read_rows(tmp_path / "none.jsonl")


def test_numbers_are_answers_and_other_json_is_not(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('\ufeff{"question": "1 - 1?", "answer": 0}\n{"question": "a", "answer": 19.0}\r\n\n')
    assert [(r["id"], r["answer"]) for r in tasks.read_rows(path)] == [("line-1", "0"), ("line-2", "19")]
    for bad in ("null", "[1]", '{"a": 1}', '"\\ud83d"'):
        path.write_text(f'{{"question": "a", "answer": {bad}}}\n')
        with pytest.raises(UserError, match="line 1: the row has no answer"):
            tasks.read_rows(path)


def test_line_separators_of_unicode_are_text(tmp_path):
    rows = [{"id": "1", "question": "a\u2028b\x85c", "answer": "1"}]
    write_jsonl(tmp_path / "r.jsonl", rows)
    assert tasks.read_rows(tmp_path / "r.jsonl") == rows


@pytest.mark.parametrize(
    "answers",
    [["1", "2", "nan"], ["4", "5", "6", "about 7"], ["1", "2", "3", "none", "5"] * 20],
)
def test_a_few_answers_that_are_no_numbers_do_not_make_text_of_all_others(answers):
    with pytest.raises(UserError, match=r"answers are numbers, '[a-z 7]+' is none: mend the row, or give --kind text"):
        tasks.infer_kind(answers)


@pytest.mark.parametrize(
    ("answers", "extractor"),
    [
        (["Billing", "Sales", "Account access"] * 3, "Out of Account access, Billing and Sales, the answer is"),
        (["A", "B"], "So the answer is ("),
        (["yes", "no"], "So the answer is"),
        ([f"label {n}" for n in range(21)] * 3, "So the answer is"),  # too many to be named each time
    ],
)
def test_own_rows_with_a_closed_set_of_answers_need_no_extractor(tmp_path, answers, extractor):
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [{"question": f"{n}?", "answer": answer} for n, answer in enumerate(answers)])
    task = get_task(str(path))
    assert task.extractor == extractor and task.ranks_choices
    assert get_task(str(path), "Hence").extractor == "Hence"


def test_two_files_of_one_name_are_one_name_but_two_folders(tmp_path):
    tasks_of = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "mine.jsonl", [{"question": "1?", "answer": "1"}] * 1)
        tasks_of.append(get_task(str(tmp_path / folder / "mine.jsonl"), "So"))
    first, second = tasks_of
    assert first.name == second.name == "own/mine" and first.folder != second.folder
    assert first == get_task(str(tmp_path / "a" / "mine.jsonl"), "So")
    other_split = get_task(OwnRows(str(tmp_path / "a" / "mine.jsonl"), split_seed=1), "So")
    assert other_split.folder != first.folder and TASKS["demo"].folder == "demo"


def test_labels_of_a_user_s_own_rows_are_the_only_possible_answers(tmp_path):
    path = tmp_path / "mine.jsonl"
    labels = ["very positive", "positive", "not sure"]
    write_jsonl(path, [{"question": f"{n}?", "answer": label} for n, label in enumerate(labels * 3)])
    task = get_task(str(path), "So it is")
    assert (task.kind, task.choices, task.ranks_choices) == ("label", ("not sure", "positive", "very positive"), True)


# --- Where the prompt stands ----------------------------------------------------------------------------


def said(task, prompt, question="How many {prompt}?"):
    return [(message["role"], message["content"]) for message in task.messages(question, prompt)]


def test_the_prompt_stands_where_template_or_system_message_say():
    question = "How many {prompt}?"
    behind = get_task("gsm8k")
    assert said(behind, "think.") == [("user", f"{question}\nUse think.")]
    before = get_task("gsm8k", template="{prompt} Here it is: {question}\nBe brief.")
    assert said(before, "Think.") == [("user", f"Think. Here it is: {question}\nBe brief.")]
    system = get_task("gsm8k", template="{question}", system="You are a clerk. {prompt} Be brief.")
    assert said(system, "Think.") == [("system", "You are a clerk. Think. Be brief."), ("user", question)]
    assert [task.before_prompt(question) for task in (behind, before, system)] == [
        f"{question}\nUse ",
        "",
        "You are a clerk. ",
    ]


def test_a_bare_prompt_stands_in_the_same_place_without_the_fixed_words_and_an_empty_one_leaves_no_trace():
    places = {
        "{question}\nUse {prompt} now": ("Q\nthink.", "Q"),
        "Do it. {prompt} Here: {question} End.": ("think. Q End.", "Q End."),
    }
    for template, (with_prompt, without) in places.items():
        bare = get_task("gsm8k", template=template).bare
        assert said(bare, "think.", "Q") == [("user", with_prompt)] and said(bare, "", "Q") == [("user", without)]
    bare = get_task("gsm8k", template="Say: {question}", system="Be good. {prompt}").bare
    assert said(bare, "think.", "Q") == [("system", "think."), ("user", "Say: Q")]
    assert said(bare, "", "Q") == [("user", "Say: Q")]


@pytest.mark.parametrize(
    ("template", "system"),
    [("{question}", ""), ("{prompt}", "{question}"), ("{question} {prompt}", "{prompt}")],
)
def test_a_place_that_is_missing_or_there_twice_is_one_line(template, system):
    with pytest.raises(UserError, match="--template must hold"):
        get_task("gsm8k", template=template, system=system)


# --- Texts to be generated ----------------------------------------------------------------------------------------


def test_rows_with_lists_of_references_are_of_texts_to_be_generated(tmp_path):
    path = tmp_path / "facts.jsonl"
    write_jsonl(path, [{"question": f"{n}?", "answer": [f"it is {n}", f"{n} it is"]} for n in range(8)])
    task = get_task(str(path))
    assert (task.kind, task.extractor, task.choices, task.is_generation) == ("generation", "", (), True)
    assert not task.ranks_choices and task.answer_prefix == ""
    assert task.messages("1?", "Say it.") == [{"role": "user", "content": "1?\nSay it."}]
    assert task.bare.messages("1?", "") == [{"role": "user", "content": "1?"}]
    with pytest.raises(UserError, match="--kind text: a row has a list of answers"):
        get_task(str(path), "The answer is", "text")
    with pytest.raises(UserError, match="--extractor: of the kind generation the whole reply is the answer"):
        get_task(str(path), "The answer is")
    with pytest.raises(UserError, match="--answer-space choices: own/facts has no closed set"):
        get_task(str(path), answer_space="choices")


def test_single_texts_are_generated_only_where_the_kind_says_so(tmp_path):
    path = tmp_path / "facts.jsonl"
    write_jsonl(path, [{"question": f"{n}?", "answer": f"it is {n}"} for n in range(8)])
    assert get_task(str(path), "So").kind == "text" and get_task(str(path), kind="generation").extractor == ""
    assert get_task("gsm8k", kind="generation").extractor == ""  # of a known task, too
    assert get_task("webnlg", "The text is", "text").extractor == "The text is"


def test_prepared_rows_keep_their_references(tmp_path):
    rows = [{"id": "1", "question": "q", "answer": "a b", "references": ["a b", "b a"]}]
    rows.append({"id": "2", "question": "q", "answer": "a"})
    write_jsonl(tmp_path / "r.jsonl", rows)
    assert tasks.read_rows(tmp_path / "r.jsonl") == rows
