"""Sources: rows of published records, splits, prepared tasks."""

import csv
import hashlib
import json
import re
import runpy
from dataclasses import replace

import datasets
import pytest
from conftest import ROOT

from support import sources, tasks
from support.files import UserError, write_jsonl
from support.harness import read_answer_harness
from support.own import SPLITS, OwnRows
from support.reading import GRADER_VERSION
from support.settings import SearchSettings, TaskFlags
from support.tasks import TASKS, get_task


def bbh_file(folder, name, count, target="(A)", question="Which?\nOptions:\n(A) a\n(B) b"):
    target = "Yes" if name == "causal_judgement" else target
    (folder / "bbh").mkdir(exist_ok=True, parents=True)
    examples = [{"input": f"{n}. {question}", "target": target} for n in range(count)]
    (folder / "bbh" / f"{name}.json").write_text(json.dumps({"canary": "x", "examples": examples}))


@pytest.mark.parametrize(
    ("name", "count", "sizes"),
    [
        ("hyperbaton", 250, (50, 100, 100)),
        ("snarks", 178, (50, 64, 64)),
        ("penguins_in_a_table", 146, (50, 48, 48)),
        ("causal_judgement", 187, (50, 68, 69)),
    ],
)
def test_bbh_splits_follow_the_file_s_order_and_halve_what_is_short(tmp_path, name, count, sizes):
    bbh_file(tmp_path, name, count)
    splits = sources.split_rows(TASKS[f"bbh/{name}"], tmp_path)
    assert tuple(map(len, splits.values())) == sizes
    assert [row["question"].split(".")[0] for rows in splits.values() for row in rows] == list(map(str, range(count)))
    assert {row["answer"] for row in splits["train"]} == {"Yes" if name == "causal_judgement" else "A"}


def test_gsm8k_and_folio_splits_come_from_their_files(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    record = {"question": "Q?", "answer": "Because.\n#### 1,234"}
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", [record] * 7473)
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", [record] * 1319)
    splits = sources.split_rows(TASKS["gsm8k"], tmp_path)
    assert [len(rows) for rows in splits.values()] == [100, 100, 1319]
    assert splits["dev"][0] == {"id": "gsm8k-train-100", "question": "Q?", "answer": "1234"}
    (tmp_path / "folio").mkdir()
    record = {"premises": ["All cats purr.", "Tom is a cat. "], "conclusion": "Tom purrs.", "label": "Unknown"}
    write_jsonl(tmp_path / "folio" / "folio-train.jsonl", [record] * 1004)
    text = record | {"premises": "All cats purr.\nTom is a cat.", "label": "Uncertain"}
    write_jsonl(tmp_path / "folio" / "folio-validation.jsonl", [text] * 204)
    splits = sources.split_rows(TASKS["folio"], tmp_path)
    assert [len(rows) for rows in splits.values()] == [100, 100, 204]
    row = splits["train"][0]
    assert row["answer"] == splits["test"][0]["answer"] == "C"
    assert row["question"] == splits["test"][0]["question"]
    assert row["question"].startswith("Premises:\nAll cats purr.\nTom is a cat.\nConclusion: Tom purrs.")


def test_a_file_of_another_size_or_an_impossible_answer_is_an_error(tmp_path):
    bbh_file(tmp_path, "hyperbaton", 249)
    with pytest.raises(UserError, match="has 249 rows, expected \\[250\\]"):
        sources.split_rows(TASKS["bbh/hyperbaton"], tmp_path)
    bbh_file(tmp_path, "hyperbaton", 250, target="(C)")
    with pytest.raises(UserError, match="impossible answer 'C'"):
        sources.split_rows(TASKS["bbh/hyperbaton"], tmp_path)
    with pytest.raises(UserError, match="cannot read.*snarks.json"):
        sources.split_rows(TASKS["bbh/snarks"], tmp_path)


# Invented records in the form of the authors' files and in that of the hub: (files, what `load_dataset` returns).


def multiarith_files(solution=9.0):
    records = [
        {"iIndex": n, "sQuestion": f" {n} eggs? ", "lEquations": ["X=(4.0+5.0)"], "lSolutions": [solution]}
        for n in range(600)
    ]
    hub = [{"question": r["sQuestion"], "final_ans": "9"} for r in records]
    return {"multiarith/MultiArith.json": records}, {"train": hub[:420], "test": hub[420:]}


def aqua_files():
    def record(part, n):
        options = [f"{letter}){n + k} cm" for k, letter in enumerate("ABCDE")]
        return {"question": f"{part} {n}?", "options": options, "rationale": "So B.", "correct": "B"}

    parts = {"train": 97467, "dev": 254, "test": 254}
    parts = {part: [record(part, n) for n in range(size)] for part, size in parts.items()}
    hub = {"train": parts["train"], "validation": parts["dev"], "test": parts["test"]}
    return {f"aqua/{part}.json": records for part, records in parts.items()}, hub


def mmlu_files(subject="anatomy", val=14, test=135):
    question = 'Of "bones", hinges\nand\ttooth, {} which is {} a bone?'
    files, hub = {}, {"auxiliary_train": [{"question": "?", "choices": ["1"] * 4, "answer": 0}]}
    for part, size in {"dev": 5, "val": val, "test": test}.items():
        lines = [[question.format(part, n), "rib", "ulna, or radius", "a  door\nhinge", "12", "C"] for n in range(size)]
        files[f"mmlu/{part}/{subject}_{part}.csv"] = lines
        hub["validation" if part == "val" else part] = [
            {"question": line[0], "subject": subject, "choices": line[1:5], "answer": 2} for line in lines
        ]
    return files, hub


def wsc_files():
    def record(n):
        text = f"Ann thanked Eve for the help that she, in row {n}, had given."
        spans = {"span1_index": 0, "span1_text": "Ann", "span2_index": 7, "span2_text": "she"}
        return {"idx": n, "text": text, "target": spans, "label": bool(n % 2)}

    def flat(record):
        return record["target"] | {"idx": record["idx"], "text": record["text"], "label": int(record["label"])}

    train, val = [record(n) for n in range(554)], [record(n) for n in range(104)]
    unlabelled = [flat(record(n)) | {"label": -1} for n in range(146)]
    hub = {"train": list(map(flat, train)), "validation": list(map(flat, val)), "test": unlabelled}
    return {"wsc/train.jsonl": train, "wsc/val.jsonl": val}, hub


MADE = {"multiarith": multiarith_files, "aqua": aqua_files, "mmlu/anatomy": mmlu_files, "wsc": wsc_files}


def write_files(folder, files):
    for name, records in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            with open(path, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(records)
        elif name == "multiarith/MultiArith.json":
            path.write_text(json.dumps(records))
        else:
            write_jsonl(path, records)


@pytest.mark.parametrize(
    ("name", "sizes", "first_ids", "question", "answer"),
    [
        ("multiarith", (50, 50, 500), ("all-0", "all-6", "all-1"), "1 eggs?", "9"),
        (
            "aqua",
            (100, 100, 254),
            ("train-0", "dev-0", "test-0"),
            "test 0?\nOptions:\n(A) 0 cm\n(B) 1 cm\n(C) 2 cm\n(D) 3 cm\n(E) 4 cm",
            "B",
        ),
        (
            "mmlu/anatomy",
            (9, 10, 135),
            ("dev-0", "val-4", "test-0"),
            'Of "bones", hinges\nand\ttooth, test which is 0 a bone?\n'
            "Options:\n(A) rib\n(B) ulna, or radius\n(C) a door hinge\n(D) 12",
            "C",
        ),
        (
            "wsc",
            (100, 100, 104),
            ("train-0", "train-454", "val-0"),
            "Ann thanked Eve for the help that *she*, in row 0, had given.\n"
            'In the text above, does the pronoun "she" refer to "Ann"?',
            "No",
        ),
    ],
)
def test_files_and_hub_give_the_same_rows(tmp_path, monkeypatch, name, sizes, first_ids, question, answer):
    files, hub = MADE[name]()
    write_files(tmp_path, files)
    splits = sources.split_rows(TASKS[name], tmp_path)
    assert tuple(map(len, splits.values())) == sizes
    assert tuple(rows[0]["id"] for rows in splits.values()) == tuple(f"{name}-{i}" for i in first_ids)
    assert splits["test"][0] == {"id": f"{name}-{first_ids[2]}", "question": question, "answer": answer}
    assert len({row["id"] for rows in splits.values() for row in rows}) == sum(sizes)
    parts = {part: datasets.Dataset.from_list(records) for part, records in hub.items()}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or datasets.DatasetDict(parts))
    assert sources.split_rows(TASKS[name]) == splits
    assert asked == [(TASKS[name].hub[0], TASKS[name].hub[1] or None)]


def test_the_hub_s_failures_are_user_errors_even_without_a_message(monkeypatch):
    def fail(*_):
        raise OSError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="cannot load cais/mmlu from the hub .*--source DIR"):
        sources.split_rows(TASKS["mmlu/anatomy"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict())
    with pytest.raises(UserError, match="cais/mmlu, dev has 0 rows, expected \\[5\\]"):
        sources.split_rows(TASKS["mmlu/anatomy"])


def test_every_mmlu_subject_is_prepared_with_enough_rows_to_search_on(tmp_path, monkeypatch, capsys):
    assert [sum(sizes) for sizes in zip(*tasks.MMLU_SIZES.values())] == [1531, 14042]
    for subject, (val, test) in tasks.MMLU_SIZES.items():
        write_files(tmp_path, mmlu_files(subject, val, test)[0])
    script, data = ROOT / "01_prepare_data.py", tmp_path / "data"
    monkeypatch.setattr("sys.argv", [str(script), "--task", "mmlu", "--source", str(tmp_path), "--data-dir", str(data)])
    runpy.run_path(str(script), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) == 57
    needed = SearchSettings().sampled_rows
    for subject, (val, test) in tasks.MMLU_SIZES.items():
        counts = json.loads((data / "mmlu" / subject / "task.json").read_text())["counts"]
        assert counts["train"] + counts["dev"] == 5 + val and counts["test"] == test
        assert needed < TASKS[f"mmlu/{subject}"].defaults["train_rows"] <= counts["train"] <= counts["dev"]


@pytest.mark.parametrize(
    ("name", "file", "number", "change", "message"),
    [
        ("multiarith", "MultiArith.json", 7, {"lSolutions": [1.0, 2.0]}, "record 7: a field.*too many values"),
        ("multiarith", "MultiArith.json", 8, {"lSolutions": None}, "record 8: a field.*TypeError"),
        ("multiarith", "MultiArith.json", 9, {"lSolutions": ["nine"]}, "record 9: .*impossible answer 'nine'"),
        ("multiarith", "MultiArith.json", 9, {"sQuestion": " "}, "record 9: it has no question"),
        ("aqua", "dev.json", 100, {"correct": "F"}, "record 100: .*impossible answer 'F'"),
        ("wsc", "train.jsonl", 454 + 1, {"target": {"span1_text": "Ann"}}, "record 455: a field.*span2_text"),
        ("wsc", "val.jsonl", 104, {"label": None}, "record 104: .*impossible answer 'None'"),
        ("wsc", "val.jsonl", 1, {"label": "true"}, "record 1: .*impossible answer 'true'"),
    ],
)
def test_a_record_of_another_form_is_named_with_its_file(tmp_path, monkeypatch, name, file, number, change, message):
    files, _ = MADE[name]()
    file = f"{name}/{file}"
    files[file][number - 1] = files[file][number - 1] | change
    write_files(tmp_path, files)
    with pytest.raises(UserError, match=f"^{tmp_path}/{file}, {message}.*as its authors publish it$"):
        sources.split_rows(TASKS[name], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ["A)1", "B)2"]}, "a field.*ValueError"),
        ({"options": list("123456")}, "a field.*ValueError"),
        ({"options": [1, 2, 3, 4, 5]}, "a field.*AttributeError"),
        ({"options": None}, "a field.*TypeError"),
        ({"question": ""}, "it has no question"),
    ],
)
def test_a_question_without_its_options_or_text_is_refused(change, message):
    record = {"question": "q", "options": list("12345"), "correct": "A"}
    assert sources.checked_row(TASKS["aqua"], "id", "place", record)["answer"] == "A"
    with pytest.raises(UserError, match=f"place: {message}"):
        sources.checked_row(TASKS["aqua"], "id", "place", record | change)
    with pytest.raises(UserError, match="place: a field.*ValueError"):
        three = {"question": "q", "choices": list("123"), "answer": 0}
        sources.checked_row(TASKS["mmlu/anatomy"], "id", "place", three)


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (1, ["q", "1", "2", "3", "4", "E"], "test.csv, record 1: .*impossible answer 'E'"),
        (1, ["q", "1", "2", "3", "4", "3"], "test.csv, record 1: .*impossible answer '3'"),
        (2, ["q", "1", "2", "3", "A"], "test.csv, line 4: 5 columns, not question, A, B, C, D and the letter"),
        (135, [], "test.csv has 134 rows, expected \\[135\\]"),
    ],
)
def test_a_line_of_an_mmlu_file_that_is_no_question_is_named(tmp_path, number, line, message):
    files, _ = mmlu_files()  # a whole record takes three lines
    files["mmlu/test/anatomy_test.csv"][number - 1] = line
    write_files(tmp_path, files)
    with pytest.raises(UserError, match=message):
        sources.split_rows(TASKS["mmlu/anatomy"], tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("multiarith", "MultiArith.json", b"[{", "cannot read .*MultiArith.json as a JSON file"),
        ("multiarith", "MultiArith.json", b'"text"', "MultiArith.json: not a list of records"),
        ("multiarith", "MultiArith.json", b'{"rows": [], "more": []}', "MultiArith.json: not a list of records"),
        ("aqua", "train.json", b'{"question": "a"}\n[', "train.json, line 2: not a JSON object"),
        ("mmlu/anatomy", "dev/anatomy_dev.csv", b"\xff,1,2,3,4,A\n", "cannot read .*anatomy_dev.csv"),
        ("wsc", "val.jsonl", None, "cannot read .*train.jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, file, content, message):
    path = tmp_path / name.partition("/")[0] / file
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        sources.split_rows(TASKS[name], tmp_path)


@pytest.mark.parametrize("label", [-1, 4, None, "E"])
def test_a_hub_label_outside_the_choices_is_an_impossible_answer(label):
    _, answer = sources.make_row(TASKS["mmlu/anatomy"], {"question": "q", "choices": list("wxyz"), "answer": label})
    assert not sources.gold_is_possible(TASKS["mmlu/anatomy"], answer)
    spans = {"span1_text": "Ann", "span2_text": "she", "span2_index": 1}
    _, answer = sources.make_row(TASKS["wsc"], spans | {"text": "Ann she", "label": label})
    assert not sources.gold_is_possible(TASKS["wsc"], answer)


@pytest.mark.parametrize(
    ("text", "index", "marked"),
    [
        ("It fell since it was wet.", 3, "It fell since *it* was wet."),
        ('He said:  "it, it." Twice', 2, 'He said:  "*it*, it." Twice'),
        ("it", 0, "*it*"),
        ("With items it rolls", 1, "With items it rolls"),  # no pronoun at the place: nothing is marked
        ("it rolls", 9, "it rolls"),
    ],
)
def test_only_the_pronoun_at_its_place_is_marked(text, index, marked):
    record = {"text": text, "span1_text": "rock", "span2_text": "it", "span2_index": index, "label": 1}
    question, answer = sources.make_row(TASKS["wsc"], record)
    assert question.split("\n")[0] == marked and answer == "Yes"


@pytest.mark.parametrize(("name", "gold"), [("aqua", "B"), ("mmlu/anatomy", "C")])
def test_the_harness_reading_finds_an_option_s_text_in_the_question_we_make(name, gold):
    record = {"aqua": {"question": "q", "options": ["A)1", "B)two cm", "C)3", "D)4", "E)5"], "correct": "B"}}.get(
        name, {"question": "q", "choices": ["1", "2", "two cm", "4"], "answer": 2}
    )
    question, answer = sources.make_row(TASKS[name], record)
    assert answer == gold == read_answer_harness(TASKS[name], question, "It must be the two cm, I think")


def test_a_gold_text_cut_into_several_options_becomes_the_letter_where_it_begins():
    question = "Similar?\nOptions:\n(A) Shrek\n(B) Monsters\n(C) Inc\n(D) Up"
    assert sources.bbh_answer({"input": question, "target": "Monsters, Inc"}) == "B"
    assert sources.bbh_answer({"input": question, "target": "(D)"}) == "D"
    assert sources.bbh_answer({"input": "Sort", "target": "a b"}) == "a b"


def test_prepared_files_have_the_same_bytes_every_time_and_task_json_comes_last(tmp_path, monkeypatch):
    def contents(folder):
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    task = get_task("demo")
    first = contents(sources.prepare(task, tmp_path))
    assert contents(sources.prepare(task, tmp_path)) == first
    assert set(first) == {"train.jsonl", "dev.jsonl", "test.jsonl", "task.json"}
    record = json.loads(first["task.json"])
    assert record["counts"] == {"train": 200, "dev": 100, "test": 400}
    assert record["grader_version"] == GRADER_VERSION

    def fail(path, content):
        raise OSError("disk full")

    monkeypatch.setattr(sources, "write_whole", fail)
    sources.prepare(task, tmp_path)  # equal files are left alone
    (tmp_path / "demo" / "dev.jsonl").write_text("")
    with pytest.raises(OSError):
        sources.prepare(task, tmp_path)
    assert not sources.is_prepared(task, tmp_path)


def test_the_demo_s_splits_share_no_row(demo_data):
    ids = [{row["id"] for row in rows} for rows in demo_data.values()]
    assert [len(i) for i in ids] == [200, 100, 400] and len(set.union(*ids)) == 700


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_is_checked_and_an_older_grader_is_refused(tmp_path, split):
    task = get_task("demo")
    folder = sources.prepare(task, tmp_path)
    (folder / f"{split}.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
    with pytest.raises(UserError, match="changed since"):
        sources.load_split(task, tmp_path, split)
    sources.prepare(task, tmp_path)
    record = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(record | {"grader_version": 0}))
    with pytest.raises(UserError, match="grader version"):
        sources.load_split(task, tmp_path, split)


@pytest.mark.parametrize(("label", "letter"), [("True", "A"), ("False", "B"), ("Uncertain", "C"), ("Unknown", "C")])
def test_folio_s_labels_are_the_options_of_its_question(label, letter):
    record = {"premises": "P.", "conclusion": "C.", "label": label}
    question, answer = sources.make_row(TASKS["folio"], record)
    option = {"Unknown": "Uncertain"}.get(label, label)
    assert answer == letter and f"({letter}) {option}" in question


def test_gsm8k_s_answer_is_behind_the_last_marker_and_must_be_a_number(tmp_path):
    assert sources.make_row(TASKS["gsm8k"], {"question": " q ", "answer": "#### 1 ####  2,000 "}) == ("q", "2000")
    (tmp_path / "gsm8k").mkdir()
    records = [{"question": "Q?", "answer": "#### x"}]
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", records * 7473)
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", records * 1319)
    with pytest.raises(UserError, match="impossible answer 'x'"):
        sources.split_rows(TASKS["gsm8k"], tmp_path)


@pytest.mark.parametrize(
    "content",
    ["[]", "1", "{}", '{"sha256": 3}', '{"sha256": {"train": "a"}}', "[" * 100_000, '"', "null", '{"name": "demo"}'],
)
def test_a_task_json_of_another_shape_is_refused_with_the_command_that_makes_it(tmp_path, content):
    task = get_task("demo")
    path = sources.prepare(task, tmp_path) / "task.json"
    path.write_text(content)
    with pytest.raises(UserError, match="task.json is not what stage 01 writes: run python 01_prepare_data.py"):
        sources.load_split(task, tmp_path, "dev")


def test_a_split_that_changed_since_stage_01_is_refused(tmp_path):
    task = get_task("demo")
    folder = sources.prepare(task, tmp_path)
    assert len(sources.load_split(task, tmp_path, "dev")) == 100
    path = folder / "dev.jsonl"
    path.write_text(path.read_text().replace("apples", "pears"))
    with pytest.raises(UserError, match="changed since stage 01"):
        sources.load_split(task, tmp_path, "dev")
    with pytest.raises(UserError, match="01_prepare_data.py"):
        sources.load_split(task, tmp_path / "nowhere", "dev")


def test_own_rows_are_halved_and_quartered_and_an_empty_split_is_an_error(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [{"question": f"{n}?", "answer": str(n)} for n in range(8)])
    task = get_task(str(path), "So it is")
    folder = sources.prepare(task, tmp_path / "data", own=OwnRows(str(path)))
    assert json.loads((folder / "task.json").read_text())["counts"] == {"train": 4, "dev": 2, "test": 2}
    write_jsonl(path, [{"question": "1?", "answer": "1"}])
    with pytest.raises(UserError, match="the train split is empty"):
        sources.prepare(task, tmp_path / "data", own=OwnRows(str(path)))


def test_the_demo_s_rows_are_the_published_700_and_unique():
    rows = tasks.read_rows(ROOT / "demo" / "rows.jsonl")
    assert len(rows) == len({row["question"] for row in rows}) == 700


def test_task_json_is_byte_for_byte_the_same_for_every_known_task(tmp_path, monkeypatch):
    """So that a prepared folder is not another one for a change elsewhere."""
    rows = {split: [{"id": f"{split}-1", "question": "1?", "answer": "1"}] for split in SPLITS}
    monkeypatch.setattr(sources, "split_rows", lambda task, source: rows)
    older = [task for task in TASKS.values() if task.name != "webnlg"]
    written = [(sources.prepare(task, tmp_path) / "task.json").read_bytes() for task in older]
    assert len(written) == 90
    digest = "c3a9af1af5c9d190589b528ab3b461f0d46f7f062c37232f244c9ae0fe93e975"
    assert hashlib.sha256(b"".join(written)).hexdigest() == digest


def test_task_json_of_the_demo_is_byte_for_byte_the_same(tmp_path):
    written = (sources.prepare(get_task("demo"), tmp_path) / "task.json").read_bytes()
    assert hashlib.sha256(written).hexdigest() == "81efc23913e36e895322a234dd28feafeab19678a46733082747a30d0d90ee66"


OWN_TASK_JSON = """{
  "name": "own/yes",
  "kind": "boolean",
  "extractor": "So:",
  "choices": [
    "No",
    "Yes"
  ],
  "template": "{question} and {prompt}",
  "initial_prompt": "proper logical reasoning and think step by step. Finally give the actual correct answer.",
  "chain_of_thought": "Let's think step by step.",
  "hub": [
    "",
    ""
  ],
  "split_rule": "in file order: dev 0.25, test 0.25 of the rows, the rest train",
  "defaults": {},
  "answer_prefix": " ",
  "counts": {
    "train": 4,
    "dev": 2,
    "test": 3
  },
  "source": "yes.jsonl",
  "sha256": {
    "train": "ffc19c4148663f4f403bf3b7f782aed397a8facd7871b96fda79f7eea52185eb",
    "dev": "faec4c0d99e31673b095a19315ffeab14ad45a6fa2a0e07d6a1dd955f6a9a69f",
    "test": "f765c72628cf4ff0011a76515444ff6b06fd4b9f131e569288843cb083ab3ffd"
  },
  "grader_version": 3
}
"""


def test_task_json_of_own_rows_is_byte_for_byte_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("yes.jsonl", [{"question": f"{n}?", "answer": ["Yes", "No"][n % 2]} for n in range(9)])
    task = get_task("yes.jsonl", "So:", "", "{question} and {prompt}")
    folder = sources.prepare(task, "data", own=OwnRows("yes.jsonl", split_seed=-1))
    assert (folder / "task.json").read_text(encoding="utf-8") == OWN_TASK_JSON


# --- Opening a task ------------------------------------------------------------------------------------


def test_opening_prepares_what_lies_here_every_time_and_gives_all_splits(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    flags = TaskFlags(task=str(path), extractor="So it is", data_dir=str(tmp_path / "data"))
    for count in (8, 12):  # own rows may have changed since
        write_jsonl(path, [{"question": f"{n}?", "answer": str(n)} for n in range(count)])
        task, splits = sources.open_task(flags)
        printed = capsys.readouterr().out
        assert re.match(rf"preparing own/mine in {tmp_path}/data/own/mine-\w{{8}}\n", printed)
        assert f"{count // 2} train, {count // 4} dev, {count // 4} test rows; answers: number" in printed
        assert task == get_task(str(path), "So it is")
        assert [len(splits[split]) for split in SPLITS] == [count // 2, count // 4, count // 4]
    for _ in range(2):
        task, splits = sources.open_task(TaskFlags(task="demo", data_dir=str(tmp_path)))
        assert capsys.readouterr().out == f"preparing demo in {tmp_path}/demo\n"
        assert task == TASKS["demo"] and splits == sources.split_rows(task)


def test_opening_a_published_task_prepares_it_once(tmp_path, capsys):
    bbh_file(tmp_path, "hyperbaton", 250)
    flags = TaskFlags(task="bbh/hyperbaton", source=str(tmp_path), data_dir=str(tmp_path / "data"))
    first = sources.open_task(flags)
    assert capsys.readouterr().out == f"preparing bbh/hyperbaton in {tmp_path}/data/bbh/hyperbaton\n"
    (tmp_path / "bbh" / "hyperbaton.json").unlink()
    assert sources.open_task(flags) == first and capsys.readouterr().out == ""
    assert first[1] == {split: sources.load_split(first[0], tmp_path / "data", split) for split in SPLITS}


def test_a_kind_that_does_not_fit_the_answers_is_named_and_a_known_task_is_prepared_as_the_table_has_it(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"{n}?", "answer": "blue"} for n in range(8)]
    write_jsonl(path, rows)
    flags = TaskFlags(str(path), extractor="So it is", kind="number", data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match="--kind number: the answer 'blue' of row"):
        sources.open_task(flags)
    sources.open_task(TaskFlags("demo", extractor="hence", data_dir=str(tmp_path / "data")))
    assert json.loads((tmp_path / "data/demo/task.json").read_text())["extractor"] == TASKS["demo"].extractor


# --- WebNLG: texts to be generated ---------------------------------------------------------------------------------

ENTRY = """<entry category="City" eid="Id{n}" shape="(X (X))" shape_type="NA" size="1">
  <originaltripleset><otriple>Town_{n} | land | "Here &amp; there"@en</otriple></originaltripleset>
  <modifiedtripleset>
    <mtriple>Town_{n} | country | "Here &amp; there"</mtriple>
    <mtriple>Town_{n} | leader | Ann_Ö.</mtriple>
  </modifiedtripleset>
  <lex comment="good" lid="Id1" lang="en">Ann Ö. leads  town {n},
    which is here &amp; there.</lex>
  <lex comment="bad" lid="Id2" lang="en">Town.</lex>
  <lex comment="" lid="Id3" lang="ru">Город.</lex>
  <lex comment="" lid="Id4" lang="en">Town {n} is led by Ann Ö.</lex>
</entry>"""
TEST_FILE = "test/rdf-to-text-generation-test-data-with-refs-en.xml"
WEBNLG_ROW = {
    "question": 'Town_0 | country | "Here & there"\nTown_0 | leader | Ann_Ö.',
    "answer": "Ann Ö. leads town 0, which is here & there.",
    "references": ["Ann Ö. leads town 0, which is here & there.", "Town 0 is led by Ann Ö."],
}


def webnlg_xml(numbers):
    entries = "".join(ENTRY.format(n=n) for n in numbers)
    return f'<?xml version="1.0" encoding="utf-8"?>\n<benchmark><entries>{entries}</entries></benchmark>\n'


WEBNLG_SIZES = {"train": 1321, "dev": 167, "test": 178}  # a tenth of the published ones


@pytest.fixture
def smaller_webnlg(monkeypatch):
    """The release with so many entries only."""
    published = sources.PUBLISHED["webnlg"]
    assert {name: part.sizes for name, part in published.parts.items()} == {
        "train": {13211},
        "dev": {1667},
        "test": {1779},
    }
    parts = {name: replace(part, sizes={WEBNLG_SIZES[name]}) for name, part in published.parts.items()}
    monkeypatch.setitem(sources.PUBLISHED, "webnlg", replace(published, parts=parts))


def webnlg_files(folder):
    """Files in the form of the release, of invented entries, numbered in each part in the order of the files' names."""
    train, dev, test = WEBNLG_SIZES.values()
    files = {
        "train/1triples/Airport.xml": range(train // 2),
        "train/7triples/City.xml": range(train // 2, train),
        "dev/1triples/Airport.xml": range(dev),
        TEST_FILE: range(test),
    }
    for name, numbers in files.items():
        path = folder / "webnlg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(webnlg_xml(numbers), encoding="utf-8")


def webnlg_hub_record(n, test_category=""):
    """The same entry in the form of the hub."""
    lex = {
        "comment": ["good", "bad", "", ""],
        "lid": ["Id1", "Id2", "Id3", "Id4"],
        "text": [f"Ann Ö. leads town {n}, which is here & there.", "Town.", "Город.", f"Town {n} is led by Ann Ö."],
        "lang": ["en", "en", "ru", "en"],
    }
    triples = [f'Town_{n} | country | "Here & there"', f"Town_{n} | leader | Ann_Ö."]
    return {
        "category": "City",
        "size": 1,
        "eid": f"Id{n}",
        "modified_triple_sets": {"mtriple_set": [triples, triples[::-1]]},
        "lex": lex,
        "test_category": test_category,
    }


def test_webnlg_s_files_and_hub_give_the_same_rows_from_all_over_the_files(tmp_path, monkeypatch, smaller_webnlg):
    webnlg_files(tmp_path)
    task = TASKS["webnlg"]
    splits = sources.split_rows(task, tmp_path)
    assert [len(rows) for rows in splits.values()] == [100, 100, 178]
    assert splits["train"][0] == {"id": "webnlg-train-0"} | WEBNLG_ROW
    assert splits["train"][99]["question"].startswith("Town_1307 |")  # 99 * 1321 // 100, of the second file
    assert len({row["id"] for rows in splits.values() for row in rows}) == 378
    without = webnlg_hub_record(1) | {"lex": {"comment": [], "lid": [], "text": [], "lang": []}}
    data_to_text = "rdf-to-text-generation-test-data-with-refs-en"
    test = [webnlg_hub_record(n, "semantic-parsing-test-data-with-refs-en") for n in range(3)]
    test += [webnlg_hub_record(n, data_to_text) for n in range(178)] + [without] * 2
    hub = {
        "train": [webnlg_hub_record(n) for n in range(1321)],
        "validation": [webnlg_hub_record(n) for n in range(167)],
        "test": test,
    }
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: asked.append((args, more)) or hub)
    assert sources.split_rows(task) == splits
    conversion = {"data_dir": "release_v3.0_en", "revision": "refs/convert/parquet"}
    assert asked == [(("webnlg-challenge/web_nlg",), conversion)]


def test_the_hub_s_conversion_is_read_by_the_names_that_the_task_expects(tmp_path):
    """Its files lie in a folder for each configuration and in it one for each split."""
    for split in ("train", "dev", "test"):
        (tmp_path / "hub" / "release_v3.0_en" / split).mkdir(parents=True)
        part = datasets.Dataset.from_list([webnlg_hub_record(0)])
        part.to_parquet(tmp_path / "hub" / "release_v3.0_en" / split / "0000.parquet")
    loaded = datasets.load_dataset(str(tmp_path / "hub"), data_dir="release_v3.0_en", cache_dir=str(tmp_path / "cache"))
    expected = {name for part in sources.PUBLISHED["webnlg"].parts.values() for name in part.hub.split("+")}
    assert set(loaded) <= expected | {"train", "test"} and set(loaded) & {"dev", "validation"}
    question, references = sources.make_row(TASKS["webnlg"], loaded["test"][0])
    assert (question, references) == (WEBNLG_ROW["question"], WEBNLG_ROW["references"])


def test_an_xml_file_with_a_doctype_or_of_another_form_is_refused(tmp_path):
    path = tmp_path / "a.xml"
    bomb = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><benchmark><entries>&c;</entries></benchmark>'
    path.write_text(bomb)
    with pytest.raises(UserError, match="a.xml has a DOCTYPE"):
        sources.read_webnlg(path)
    for content in (b"<benchmark>", b"\xff\xfe", b"[]"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot read .*a.xml"):
            sources.read_webnlg(path)
    path.write_text("<benchmark><entries/></benchmark>")
    assert sources.read_webnlg(path) == []
    with pytest.raises(UserError, match="cannot read .*none"):
        sources.read_webnlg(tmp_path / "none")


def test_a_webnlg_file_of_another_size_or_an_entry_without_texts_is_an_error(tmp_path, smaller_webnlg):
    webnlg_files(tmp_path)
    (tmp_path / "webnlg" / "train" / "7triples" / "City.xml").unlink()
    with pytest.raises(UserError, match="webnlg/train has 660 rows, expected .1321."):
        sources.split_rows(TASKS["webnlg"], tmp_path)
    webnlg_files(tmp_path)
    path = tmp_path / "webnlg" / TEST_FILE
    path.write_text(path.read_text(encoding="utf-8").replace('lang="en"', 'lang="de"'), encoding="utf-8")
    with pytest.raises(UserError, match="with-refs-en.xml, record 1: .*impossible answer ''"):
        sources.split_rows(TASKS["webnlg"], tmp_path)


def test_prepared_webnlg_rows_keep_their_references_and_need_the_package(tmp_path, monkeypatch, smaller_webnlg):
    webnlg_files(tmp_path)
    flags = TaskFlags(task="webnlg", source=str(tmp_path), data_dir=str(tmp_path / "data"))
    task, splits = sources.open_task(flags)
    assert task == TASKS["webnlg"] and splits == sources.split_rows(task, tmp_path)

    def missing():
        raise UserError("pip install it")

    monkeypatch.setattr(sources, "require_package", missing)
    with pytest.raises(UserError, match="pip install it"):
        sources.open_task(flags)


def test_own_texts_come_with_their_references_from_a_table_and_must_hold_words_that_count(tmp_path, capsys):
    path = tmp_path / "facts.csv"
    lines = [f'{n}?,"[""it is {n}"", ""{n} it is""]"' for n in range(12)]
    path.write_text("question,answer\n" + "\n".join(lines) + "\n")
    flags = TaskFlags(task=str(path), kind="generation", data_dir=str(tmp_path / "data"))
    _, splits = sources.open_task(flags)
    assert "answers: generation; the whole reply" in capsys.readouterr().out
    for row in [row for rows in splits.values() for row in rows]:
        number = row["question"].rstrip("?")
        assert row["answer"] == f"it is {number}" and row["references"] == [f"it is {number}", f"{number} it is"]
    path.write_text("question,answer\n" + "\n".join(f"{n}?,да" for n in range(12)) + "\n")
    with pytest.raises(UserError, match="ROUGE-L reads no others"):
        sources.open_task(flags)
