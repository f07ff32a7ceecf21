"""A user's own rows: every usual form of a file, what is wrong with them, splits."""

import json
from collections import Counter
from dataclasses import replace

import datasets
import pytest

from support import own
from support.files import UserError, write_jsonl
from support.own import SPLITS, OwnRows

RECORDS = [{"message": f"It is {n}, really?", "team": ["Billing", "Account access"][n % 2]} for n in range(12)]
KEYS = OwnRows(question_key="message", answer_key="team")


def rows_in(path, flags=KEYS):
    """All rows of a file, in its order, whatever their ids."""
    rows = own.rows_of(own.read_records(path), path, flags)
    return [(row["question"], row["answer"]) for row in rows]


# --- Forms of files ---------------------------------------------------------------------------------------------


def csv_text(separator=",", line_end="\n"):
    cells = [["message", "team"], *(['"It is ' + r["message"][6:] + '"', r["team"]] for r in RECORDS)]
    return "".join(separator.join(line) + line_end for line in cells)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "".join(json.dumps(record) + "\n" for record in RECORDS) + "\n\n"),
        ("a.json", json.dumps(RECORDS)),
        ("a.json", json.dumps({"version": 1, "rows": RECORDS})),
        ("a.csv", csv_text()),
        ("a.CSV", csv_text()),
        ("a.csv", "\ufeff" + csv_text(";", "\r\n") + "\r\n;\r\n"),  # as a spreadsheet writes it
        ("a.csv", csv_text("\t")),
        ("a.tsv", csv_text("\t")),
    ],
)
def test_the_same_rows_come_from_every_form_of_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert rows_in(path) == [(record["message"], record["team"]) for record in RECORDS]


def test_cells_of_a_table_stay_text_over_several_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('message,team\n"one\n\n""two"", three",007\nNA,null\n')
    assert rows_in(path) == [('one\n\n"two", three', "007"), ("NA", "null")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"message,team\nx,Billing,more\n", "a.csv, line 2: not 2 columns"),
        ("a.csv", b"message,team\nx,Billing\n\ny\n", "a.csv, line 4: not 2 columns"),
        ("a.csv", b"team,team\nx,y\n", "two columns are called 'team'"),
        ("a.csv", b'message,team\n"x,Billing\ny,Billing\n', "a quotation mark that is never closed"),
        ("a.csv", b"message,team\nx,\n", "record 1: the row has no answer"),
        ("a.csv", "message,team\nü,Billing\n".encode("cp1252"), "save it as UTF-8"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"message,team\n", "has no rows"),
        ("a.json", b"{}", "not a list of records"),
        ("a.json", b"[1]", "not a list of records"),
        ("a.json", b"[" * 100_000, "cannot read .*a.json"),
        ("a.jsonl", b'{"a": ' * 100_000, "a.jsonl, line 1: not a JSON object"),
        ("a.jsonl", b'{"message": "x", "team": NaN}', "line 1: the row has no answer"),
        ("a.jsonl", b'{"message": "x", "team": -Infinity}', "line 1: the row has no answer"),
        ("a.jsonl", b'{"message": "x", "team": null}', "line 1: the row has no answer"),
        ("a.jsonl", b'{"id": "\\ud800", "message": "x", "team": "y"}', "line 1: its id is no text"),
        ("a.jsonl", b'{"id": [1], "message": "x", "team": "y"}', "line 1: its id is no text"),
        ("a.xlsx", b"", "own rows are a file that ends in .jsonl, .json, .csv, .tsv, or hub:NAME"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows_in(path)


def test_a_missing_key_lists_those_that_are_there_and_the_flag(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(UserError, match="no question under 'question', but: message, team. --question-key says which"):
        rows_in(tmp_path / "a.jsonl", OwnRows())
    with pytest.raises(UserError, match="no answer under 'label', but: message, team. --answer-key says which"):
        rows_in(tmp_path / "a.jsonl", OwnRows(question_key="message", answer_key="label"))


def test_a_question_may_be_made_of_several_columns(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"subject": "Hi {team}", "body": "{prompt} ?", "stars": 3, "team": "x"}])
    flags = OwnRows(question_key="{subject}\n{body} ({stars})", answer_key="team")
    assert rows_in(tmp_path / "a.jsonl", flags) == [("Hi {team}\n{prompt} ? (3)", "x")]
    with pytest.raises(UserError, match="no question under 'title', but: subject, body, stars, team"):
        rows_in(tmp_path / "a.jsonl", OwnRows(question_key="{title}: {body}", answer_key="team"))


@pytest.mark.parametrize(
    ("template", "key", "rest"),
    [
        ("{subject}\n{body}\nUse {prompt}", "{subject}\n{body}", "{question}\nUse {prompt}"),
        ("Sort this: {body} now. {prompt}", "{body}", "Sort this: {question} now. {prompt}"),
        ("Use {prompt}\nFrom {a} to {b}.", "{a} to {b}", "Use {prompt}\nFrom {question}."),
        ("{question}\nUse {prompt}", "", "{question}\nUse {prompt}"),
        ("", "", ""),
    ],
)
def test_a_template_s_columns_are_the_question(template, key, rest):
    assert own.columns_into_key(template) == (key, rest)


def test_a_prompt_between_columns_is_refused():
    with pytest.raises(UserError, match="must not stand between columns"):
        own.columns_into_key("{subject} {prompt} {body}")


# --- Names ------------------------------------------------------------------------------------------------------


def test_a_name_finds_the_one_file_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert own.beside("tickets") == "tickets"
    (tmp_path / "tickets.csv").touch()
    assert own.beside("tickets") == "tickets.csv" and own.beside("tickets.csv") == "tickets.csv"
    (tmp_path / "tickets.jsonl").touch()
    with pytest.raises(UserError, match="which of tickets.jsonl, tickets.csv"):
        own.beside("tickets")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data/tickets.csv", "own/tickets"),
        ("tickets", "own/tickets"),
        ("a/v1.2", "own/v1.2"),
        ("hub:fancyzhx/ag_news", "own/ag_news"),
        ("hub:a/b:main", "own/b-main"),
    ],
)
def test_a_task_is_called_after_its_file_or_data_set(name, expected):
    assert own.own_name(name) == expected


# --- The hub ----------------------------------------------------------------------------------------------------


def on_hub(monkeypatch, **splits):
    """Let the hub have a data set of these splits, {split: [(text, number of its class)]}."""
    kind = datasets.ClassLabel(names=["World", "Sports"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    made = {
        name: datasets.Dataset.from_dict({"text": [t for t, _ in rows], "label": [n for _, n in rows]}, features)
        for name, rows in splits.items()
    }
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or datasets.DatasetDict(made))
    return asked


OF_HUB = OwnRows(question_key="text", answer_key="label")


def test_the_hub_s_splits_are_kept_and_its_classes_named(monkeypatch):
    rows = {split: [(f"{split} {n}", n % 2) for n in range(4)] for split in ("train", "validation", "test")}
    asked = on_hub(monkeypatch, **rows, unsupervised=[("x", 0)])
    splits = own.own_splits(replace(OF_HUB, task="hub:a/news:en"))
    assert asked == [("a/news", "en")] and tuple(splits) == SPLITS
    assert [row["question"] for row in splits["dev"]] == [f"validation {n}" for n in range(4)]
    assert [row["answer"] for row in splits["test"]] == ["World", "Sports"] * 2


def test_splits_that_the_hub_lacks_come_from_its_training_rows(monkeypatch):
    on_hub(monkeypatch, train=[(f"t{n}", n % 2) for n in range(12)], test=[("a", 0), ("b", 1)])
    splits = own.own_splits(replace(OF_HUB, task="hub:news"))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 8, "dev": 4, "test": 2}


def test_a_row_of_the_hub_without_its_class_or_a_data_set_without_rows_to_train_on_is_an_error(monkeypatch):
    on_hub(monkeypatch, train=[("a", 0)], test=[("b", -1)])
    with pytest.raises(UserError, match="hub:news, test, record 1: the row has no answer"):
        own.own_splits(replace(OF_HUB, task="hub:news"))
    on_hub(monkeypatch, test=[("b", 1)])
    with pytest.raises(UserError, match="no split called train"):
        own.own_splits(replace(OF_HUB, task="hub:news"))


# --- Splits -----------------------------------------------------------------------------------------------------


def rows_of_answers(**counts):
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    return [{"id": str(n), "question": f"{n}?", "answer": answer} for n, answer in enumerate(answers)]


def test_each_split_has_its_share_of_each_answer_though_the_file_is_sorted_by_them():
    rows = rows_of_answers(a=40, b=20, c=20)
    splits = own.share(rows, {}, OwnRows())
    assert {split: Counter(row["answer"] for row in part) for split, part in splits.items()} == {
        "train": {"a": 20, "b": 10, "c": 10},
        "dev": {"a": 10, "b": 5, "c": 5},
        "test": {"a": 10, "b": 5, "c": 5},
    }
    assert sorted(row["id"] for part in splits.values() for row in part) == sorted(row["id"] for row in rows)
    first = Counter(row["answer"] for row in splits["dev"][:8])  # what --eval-rows 8 takes
    assert first["a"] == 4


def test_the_seed_shuffles_and_a_negative_one_keeps_the_order():
    rows = rows_of_answers(**{f"answer {n}": 1 for n in range(40)})
    first, again, other = (own.share(rows, {}, OwnRows(split_seed=seed)) for seed in (0, 0, 1))
    assert first == again and first != other
    kept = own.share(rows, {}, OwnRows(split_seed=-1))
    assert kept == {"train": rows[:20], "dev": rows[20:30], "test": rows[30:]}


@pytest.mark.parametrize(
    ("count", "dev", "test", "sizes"),
    [
        (8, 0.25, 0.25, (4, 2, 2)),
        (9, 0.25, 0.25, (4, 2, 3)),
        (30, 0.25, 0.25, (15, 7, 8)),
        (10, 0.1, 0.2, (7, 1, 2)),
        (10, 0.3, 0.6, (1, 3, 6)),
    ],
)
def test_fractions_say_how_many_rows_each_split_has(count, dev, test, sizes):
    splits = own.share(rows_of_answers(a=count), {}, OwnRows(dev_fraction=dev, test_fraction=test))
    assert tuple(map(len, splits.values())) == sizes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dev_fraction": 0.0}, "must be above 0"),
        ({"dev_fraction": 0.5, "test_fraction": 0.5}, "together below 1"),
        ({"test_fraction": float("nan")}, "must be above 0"),
        ({"answer_key": ""}, "--answer-key must not be empty"),
    ],
)
def test_flags_that_leave_nothing_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        own.own_splits(OwnRows("none.csv", **flags))


def test_files_of_their_own_are_whole_splits_and_the_others_share_the_rest(tmp_path):
    paths = {}
    for name, count in (("main", 9), ("test", 3), ("dev", 2)):
        paths[name] = str(tmp_path / f"{name}.jsonl")
        write_jsonl(paths[name], [{"question": f"{name} {n}", "answer": "x"} for n in range(count)])
    splits = own.own_splits(OwnRows(paths["main"], test_file=paths["test"]))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6, "dev": 3, "test": 3}
    assert [row["question"] for row in splits["test"]] == ["test 0", "test 1", "test 2"]
    flags = OwnRows("a name alone", train_file=paths["main"], dev_file=paths["dev"], test_file=paths["test"])
    splits = own.own_splits(flags)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 9, "dev": 2, "test": 3}
    ids = [row["id"] for rows in splits.values() for row in rows]
    assert len(set(ids)) == len(ids)


# --- Warnings ---------------------------------------------------------------------------------------------------


def many(beginning, answers=("a", "b"), count=20):
    return [{"question": f"{beginning} {n}", "answer": answers[n % len(answers)]} for n in range(count)]


def test_rows_without_anything_odd_give_no_warning():
    assert own.split_warnings({split: many(split) for split in SPLITS}, ("a", "b")) == []


def test_repeated_questions_a_missing_label_and_few_rows_are_told():
    splits = {"train": many("x"), "dev": many("x", "ba", 3) + many("y", "a", 17), "test": many("z", "a", 19)}
    found = own.split_warnings(splits, ("a", "b", "c"))
    assert [warning.split(":")[0] for warning in found] == [
        "3 questions are in more than one split, so test rows are not new",
        "3 questions are there with different answers",
        "no row of the train split has the answer 'c'",
        "no row of the dev split has the answer 'c'",
        "no row of the test split has the answer 'b', 'c'",
        "the test split has only 19 rows",
    ]


@pytest.mark.parametrize(("count", "low", "high"), [(25, 32, 68), (4, 15, 85)])
def test_what_few_rows_leave_open_is_the_wilson_interval(count, low, high):
    assert own.doubt(count) == f"an accuracy of 50 % means anything from {low} to {high} %"


# --- Texts to be generated ----------------------------------------------------------------------------------------


def test_a_list_of_answers_is_one_of_references_the_first_of_which_is_the_answer(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": [" one way ", "another"]}])
    (row,) = own.rows_of(own.read_records(tmp_path / "a.jsonl"), "a.jsonl")
    assert (row["answer"], row["references"]) == ("one way", ["one way", "another"])
    for bad in ([], [1], ["a", None], [""], ["a", " "]):
        with pytest.raises(UserError, match="line 1: (the row has no|one of its) answer"):
            own.rows_of([{"question": "q", "answer": bad}], "a.jsonl")


@pytest.mark.parametrize(
    ("answer", "references"),
    [('["one", "another"]', ["one", "another"]), ("one", None), ("[1, 2]", None), ("[]", None), ('["one"', None)],
)
def test_a_table_s_cell_may_spell_a_list_of_references(answer, references):
    row = {"id": "1", "question": "q", "answer": answer}
    expected = row | {"answer": references[0], "references": references} if references else row
    assert own.with_references(row) == expected
