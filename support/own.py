"""A user's own rows: JSONL, JSON, CSV, TSV or a data set on the hub -> rows with their splits. Works without torch.

A record is what a file or the hub holds; a row is what the method needs of it: {"id", "question", "answer"}.
"""

import csv
import json
import math
import random
import re
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

from support.files import UserError, is_text, read_jsonl, require

SPLITS = ("train", "dev", "test")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
ON_HUB = "hub:"  # before the name of a data set, which a configuration may follow: hub:NAME:CONFIGURATION
COLUMN = re.compile(r"\{([^{}]+)\}")  # in a form that makes a question of several columns
FEW = 20  # rows of a dev or test split below which its accuracy says little


@dataclass(frozen=True)
class OwnRows:
    """Where a user's own rows are and how they are split."""

    task: str = ""  # --task: the file, the data set, or only a name where each split has a file
    question_key: str = "question"  # of a record; or a form of several: "{subject}: {body}"
    answer_key: str = "answer"
    train_file: str = ""  # files of their own for these splits; the others share the rows of the task's file
    dev_file: str = ""
    test_file: str = ""
    dev_fraction: float = 0.25  # of the rows
    test_fraction: float = 0.25
    split_seed: int = 0  # shuffles the rows before they are split; -1: they stay in their order

    @property
    def files(self):
        """{split: its own file}, as far as it has one."""
        named = {"train": self.train_file, "dev": self.dev_file, "test": self.test_file}
        return {split: path for split, path in named.items() if path}

    def check(self):
        """Errors: UserError for fractions that leave a split empty."""
        fractions = (self.dev_fraction, self.test_fraction)
        good = all(fraction > 0 for fraction in fractions) and sum(fractions) < 1
        require(good, "--dev-fraction and --test-fraction must be above 0, and together below 1: the rest is to train")
        require(self.question_key.strip() and self.answer_key, "--question-key and --answer-key must not be empty")


DEFAULT = OwnRows()
OWN_FLAGS = tuple(f.name for f in fields(OwnRows) if f.name != "task")  # which the run of a known task lacks


# --- Finding the file -------------------------------------------------------------------------------------------


def is_own(name):
    """Whether --task names own rows: a file of a known form, or a data set on the hub."""
    return name.startswith(ON_HUB) or Path(name).suffix.lower() in SUFFIXES


def beside(name):
    """The file of own rows that --task may mean: "tickets" for tickets.jsonl; the name itself if there is none."""
    found = [name + suffix for suffix in SUFFIXES if name and not is_own(name) and Path(name + suffix).is_file()]
    require(len(found) < 2, f"--task {name}: which of {', '.join(found)}? Name the file")
    return found[0] if found else name


def own_name(name):
    """The task's name: "own/tickets" for data/tickets.csv, "own/ag_news" for hub:fancyzhx/ag_news."""
    if name.startswith(ON_HUB):
        return "own/" + "-".join(name.removeprefix(ON_HUB).split("/")[-1].split(":"))
    return f"own/{Path(name).stem if is_own(name) else Path(name).name}"


def place_of(name):
    """The whole path of a file, or the name of a data set: what tells two of one name apart."""
    return str(Path(name).resolve()) if name and not name.startswith(ON_HUB) else name


# --- Reading records --------------------------------------------------------------------------------------------


def read_json(path):
    """The records of one JSON file: a list, or an object with one list in it, such as BBH's "examples"."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as a JSON file of records: {error!r}") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    good = isinstance(content, list) and all(isinstance(record, dict) for record in content)
    require(good, f"{path}: not a list of records, nor an object with one list of them")
    return content


def read_table(path):
    """The records of a CSV or TSV file whose first line names its columns. Values stay text ("007"); lines without any
    are left out. Errors: UserError that names the line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            separator = "\t" if Path(path).suffix.lower() == ".tsv" else max(",;\t", key=head.count)
            reader = csv.DictReader(file, delimiter=separator, strict=True)
            columns = reader.fieldnames or []
            twice = next((name for name in columns if columns.count(name) > 1), None)
            require(twice is None, f"{path}: two columns are called {twice!r}")
            records = []
            for record in reader:
                whole = None not in record and None not in record.values()
                require(whole, f"{path}, line {reader.line_num}: not {len(columns)} columns, as in the first line")
                if any(value.strip() for value in record.values()):
                    records.append(record)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: {error}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except csv.Error as error:
        raise UserError(f"cannot read {path}: {error} (a quotation mark that is never closed?)") from None
    return records


def read_records(path):
    """The records of a file, by the end of its name. Errors: UserError."""
    read = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_table, ".tsv": read_table}
    suffix = Path(path).suffix.lower()
    require(suffix in read, f"{path}: own rows are a file that ends in {', '.join(read)}, or {ON_HUB}NAME")
    return read[suffix](path)


def load_from_hub(name):
    """{split: records} of a data set on the hub, its classes as texts; its validation rows are dev.

    Errors: UserError if it cannot be loaded.
    """
    import datasets  # only here: it takes a second to import

    dataset, _, configuration = name.removeprefix(ON_HUB).partition(":")
    try:
        loaded = datasets.load_dataset(dataset, configuration or None)
    except Exception as error:  # the hub's errors have no common class
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"cannot load {dataset} from the hub ({reason})") from None
    names = {"train": "train", "validation": "dev", "dev": "dev", "test": "test"}
    return {names[split]: named_classes(rows) for split, rows in loaded.items() if split in names}


def named_classes(dataset):
    """The records of one split on the hub, with the name of a class where it holds its number."""
    classes = {key: kind for key, kind in dataset.features.items() if hasattr(kind, "int2str")}
    records = []
    for record in dataset:
        for key, kind in classes.items():
            known = record[key] is not None and record[key] >= 0  # -1: not told
            record[key] = kind.int2str(record[key]) if known else None
        records.append(record)
    return records


# --- Rows of records --------------------------------------------------------------------------------------------


def as_text(value):
    """A JSON text or number as text ("19" for 19.0), or "" if it is neither, no finite number, or cannot be written as
    UTF-8."""
    if isinstance(value, float):
        value = int(value) if value.is_integer() else value if math.isfinite(value) else ""
    text = str(value).strip() if isinstance(value, (str, int, float)) else ""
    return text if is_text(text) else ""


def rows_of(records, path, own=DEFAULT, beginning=""):
    """Rows of the records of a file; a missing id becomes the beginning and the record's number.

    Errors: UserError that names the file, and the record that is no row.
    """
    rows = []
    for number, record in enumerate(records, 1):
        place = f"{path}, line {number}" if str(path).endswith(".jsonl") else f"{path}, record {number}"
        row = {"id": as_text(record.get("id", f"{beginning}line-{number}"))}
        require(row["id"], f"{place}: its id is no text or number")
        row["question"] = question_of(record, own.question_key, place)
        row |= answer_of(record, own.answer_key, place)
        rows.append(row)
    require(rows, f"{path} has no rows")
    ids = set()
    for row in rows:
        require(row["id"] not in ids, f"{path}: two rows share an id: {row['id']!r} is called so twice")
        ids.add(row["id"])
    return rows


def question_of(record, key, place):
    """The question of a record: the value of a key, or a form with the values of several filled in."""
    if key in record or not COLUMN.search(key):
        return value_of(record, key, place, "question")
    return COLUMN.sub(lambda found: value_of(record, found[1], place, "question"), key).strip()


def answer_of(record, key, place):
    """{"answer"} of a record; where it has a list of texts also {"references"}, all of them, and the answer is the
    first. Errors: UserError as `value_of`."""
    answer = record.get(key)
    if not are_texts(answer):
        return {"answer": value_of(record, key, place, "answer")}
    references = list(map(as_text, answer))
    require(all(references), f"{place}: one of its answers is empty")
    return {"answer": references[0], "references": references}


def are_texts(value):
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def with_references(row):
    """The row; where its answer spells a JSON list of texts, as a table's cell may, with these as references."""
    try:
        answer = json.loads(row["answer"])
    except (ValueError, RecursionError):
        return row
    return row | answer_of({"answer": answer}, "answer", f"row {row['id']}") if are_texts(answer) else row


def value_of(record, key, place, what):
    """The text under a key. Errors: UserError that lists the keys there are."""
    text = as_text(record.get(key))
    if not text and key not in record:
        there = ", ".join(map(str, record))
        raise UserError(f"{place}: the row has no {what} under {key!r}, but: {there}. --{what}-key says which it is")
    require(text, f"{place}: the row has no {what} (a text or a number)")
    return text


def columns_into_key(template):
    """(question key, template) of a template with names of columns: from the first to the last is the question.

    "From: {sender}\\n{body}\\nUse {prompt}" -> ("{sender}\\n{body}", "From: {question}\\nUse {prompt}")
    """
    columns = [found for found in COLUMN.finditer(template) if found[1] not in ("question", "prompt")]
    if not columns or "{question}" in template:
        return "", template
    start, end = columns[0].start(), columns[-1].end()
    require(
        "{prompt}" not in template[start:end], "--template: {prompt} must not stand between columns of the question"
    )
    return template[start:end], template[:start] + "{question}" + template[end:]


# --- Splits -----------------------------------------------------------------------------------------------------


def own_splits(own):
    """{split: rows} of a user's own rows. Those of --task are shared among the splits that have none of their own.

    Errors: UserError for what cannot be read.
    """
    name = own.task
    own.check()
    given = {}
    for split, path in own.files.items():
        given[split] = rows_of(read_records(path), path, own, f"{split}-")
    if len(given) == len(SPLITS):
        return {split: given[split] for split in SPLITS}
    if not name.startswith(ON_HUB):
        return share(rows_of(read_records(name), name, own), given, own)
    for split, records in load_from_hub(name).items():
        if split not in given:
            given[split] = rows_of(records, f"{name}, {split}", own, f"{split}-")
    require("train" in given, f"{name} has no split called train")
    return given if len(given) == len(SPLITS) else share(given.pop("train"), given, own)


def share(rows, given, own):
    """{split: rows}: the given splits, and the rows in the shares of the others."""
    shares = {"train": 1 - own.dev_fraction - own.test_fraction, "dev": own.dev_fraction, "test": own.test_fraction}
    shares = {split: part for split, part in shares.items() if split not in given}
    rows = evenly_mixed(rows, own.split_seed) if own.split_seed >= 0 else rows
    splits, start, so_far = dict(given), 0, 0.0
    for split, part in shares.items():
        so_far += part / sum(shares.values())
        end = int(len(rows) * so_far + 1e-9)  # the sum of fractions is not exact
        splits[split], start = rows[start:end], end
    return {split: splits[split] for split in SPLITS}


def evenly_mixed(rows, seed):
    """The rows shuffled by the seed, each answer spread evenly over the whole: any part of them has its share of it."""
    rows = random.Random(f"{seed}/splits").sample(rows, len(rows))
    by_answer = defaultdict(list)
    for row in rows:
        by_answer[row["answer"]].append(row)
    placed = []
    for same in by_answer.values():
        placed += [((place + 0.5) / len(same), row) for place, row in enumerate(same)]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def own_rule(own):
    """How own rows are split, in words."""
    rest = f"dev {own.dev_fraction:g}, test {own.test_fraction:g} of the rows, the rest train"
    order = f"shuffled by seed {own.split_seed}, answers spread evenly" if own.split_seed >= 0 else "in file order"
    files = "".join(f"; {split} from {Path(path).name}" for split, path in own.files.items())
    return f"{order}: {rest}{files}"


# --- What is odd about them -------------------------------------------------------------------------------------


def split_warnings(splits, choices):
    """Sentences on what makes numbers from these splits doubtful. choices: all possible answers, () if unknown."""
    found = []
    where, answers = defaultdict(set), defaultdict(set)
    for split, rows in splits.items():
        for row in rows:
            where[row["question"]].add(split)
            answers[row["question"]].add(row["answer"])
    twice = [question for question in where if len(where[question]) > 1]
    if twice:
        found.append(
            f"{counted(twice, 'question')} in more than one split, so test rows are not new: {twice[0][:60]!r}"
        )
    unlike = [question for question in answers if len(answers[question]) > 1]
    if unlike:
        found.append(f"{counted(unlike, 'question')} there with different answers: {unlike[0][:60]!r}")
    for split, rows in splits.items():
        missing = sorted(set(choices) - {row["answer"] for row in rows})
        if missing:
            found.append(f"no row of the {split} split has the answer {', '.join(map(repr, missing))}")
        if len(rows) < FEW and split != "train":
            found.append(f"the {split} split has only {len(rows)} rows: {doubt(len(rows))}")
    return found


def counted(items, noun):
    return f"1 {noun} is" if len(items) == 1 else f"{len(items)} {noun}s are"


def doubt(count):
    """What an accuracy of one half on so many rows leaves open: its 95 % Wilson interval."""
    square = 1.96**2
    half = 50 * math.sqrt(square / (count + square))  # in percent
    return f"an accuracy of 50 % means anything from {50 - half:.0f} to {50 + half:.0f} %"
