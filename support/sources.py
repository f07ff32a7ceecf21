"""Sources: the files as a task's authors publish them, or the hub -> rows, splits, and data/<task>/.

Everything here works without torch. The order follows the data: reading files, a function per family that makes a
row of a record, the table of what is published, splits, and the prepared task that stage 01 writes and the others read.
"""

import csv
import hashlib
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from support.files import (
    ROOT,
    UserError,
    alone_in,
    as_bytes,
    as_json,
    as_lines,
    read_jsonl,
    require,
    sha256,
    write_whole,
)
from support.own import SPLITS, as_text, own_rule, own_splits, read_json, split_warnings, with_references
from support.reading import GRADER_VERSION, canonical
from support.rouge import has_words, require_package
from support.tasks import LISTED, MMLU_SIZES, TASKS, get_task, read_rows

# --- Reading what is published ----------------------------------------------------------------------------


def read_mmlu(path):
    """The records of a file with the columns question, A, B, C, D, letter and no header, with the hub's names."""
    records = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for line in reader:
                if not line:
                    continue
                if len(line) != 6:
                    found = f"{len(line)} columns, not question, A, B, C, D and the letter"
                    raise UserError(f"{path}, line {reader.line_num}: {found}")
                question, *choices, answer = line
                records.append({"question": question, "choices": choices, "answer": answer})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return records


def read_webnlg(path):
    """The records of an XML file of the release, or of all in the folders below a folder, in the order of their names,
    with the hub's names. Errors: UserError."""
    files = sorted(Path(path).glob("*/*.xml")) if Path(path).is_dir() else [Path(path)]
    return [record_of_entry(entry) for file in files for entry in read_entries(file)]


def read_entries(path):
    """The `entry` elements of a file. Errors: UserError if it is none of XML or declares entities, which may unfold to
    any size."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        require("<!DOCTYPE" not in text, f"{path} has a DOCTYPE, which the published files do not have")
        return ElementTree.fromstring(text).findall("entries/entry")
    except (OSError, UnicodeDecodeError, ElementTree.ParseError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def record_of_entry(entry):
    triples = [triple.text or "" for triple in entry.findall("modifiedtripleset/mtriple")]
    texts = entry.findall("lex")
    lex = {name: [text.get(name, "") for text in texts] for name in ("comment", "lang")}
    lex["text"] = [text.text or "" for text in texts]
    return {"modified_triple_sets": {"mtriple_set": [triples]}, "lex": lex}


def load_raw(task, source):
    """The records of a task as its authors publish them: {part: [record]}.

    From the files in the folder `source`, or from the hub through `datasets` when it is empty.
    """
    published = PUBLISHED[task.name]
    if source:
        return {name: published.read(Path(source) / part.file) for name, part in published.parts.items()}
    on_hub = load_from_hub(task)
    records = {name: [] for name in published.parts}
    for name, part in published.parts.items():
        for hub_name in (part.hub or name).split("+"):
            records[name] += filter(published.belongs, on_hub.get(hub_name, ()))
    return records


def load_from_hub(task):
    """{the part's name on the hub: records}. Errors: UserError if it cannot be loaded."""
    import datasets  # only here: it takes a second to import

    dataset, configuration = task.hub
    try:
        if PUBLISHED[task.name].converted:
            return datasets.load_dataset(dataset, data_dir=configuration, revision="refs/convert/parquet")
        return datasets.load_dataset(dataset, configuration or None)
    except Exception as error:  # the hub's errors have no common class
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"cannot load {dataset} from the hub ({reason}); --source DIR reads the authors' files"
        ) from None


# --- A row of a record ------------------------------------------------------------------------------------


def gsm8k_row(record):
    return record["question"].strip(), record["answer"].split("####")[-1].strip().replace(",", "")


def bbh_answer(record):
    """The gold answer; option letters lose their parentheses.

    Three gold answers in the published files are a text instead of a letter, because the option's own commas
    cut it into several options ("Monsters, Inc" became (A) Monsters, (B) Inc). They become the letter of
    the option where that text begins.
    """
    target = record["target"].strip()
    if re.fullmatch(r"\([A-Z]\)", target):
        return target[1]
    options = re.findall(r"^\(([A-Z])\) (.*)$", record["input"], re.M)
    for first in range(len(options)):
        for last in range(first + 1, len(options) + 1):
            if ", ".join(text for _, text in options[first:last]) == target:
                return options[first][0]
    return target


def bbh_row(record):
    return record["input"].strip(), bbh_answer(record)


FOLIO_LABELS = {"True": "A", "False": "B", "Uncertain": "C", "Unknown": "C"}


def folio_row(record):
    premises = record["premises"]
    if not isinstance(premises, list):
        premises = premises.splitlines()
    lines = [
        "Premises:",
        *(premise.strip() for premise in premises),
        f"Conclusion: {record['conclusion'].strip()}",
        "Is the conclusion true, false or uncertain, given the premises?",
        "Options:",
        "(A) True",
        "(B) False",
        "(C) Uncertain",
    ]
    return "\n".join(lines), FOLIO_LABELS[record["label"].strip()]


def multiarith_row(record):
    """The file's answers are lists of one number (9.0), the hub's are texts."""
    if "final_ans" in record:
        question, answer = record["question"], record["final_ans"]
    else:
        question, [answer] = record["sQuestion"], record["lSolutions"]
    return question.strip(), as_text(answer)


def with_options(question, letters, options):
    """The question and its options, one a line as in BBH, where the `harness` reading looks for them; "" if it has no
    text. Errors: ValueError unless there are as many options as letters."""
    lines = [question.strip(), "Options:"]
    for letter, option in zip(letters, options, strict=True):
        lines.append(f"({letter}) {' '.join(option.split())}")
    return "\n".join(lines) if question.strip() else ""


def aqua_row(record):
    """An option brings its letter along: "A)21"."""
    options = []
    for letter, option in zip("ABCDE", record["options"], strict=True):
        options.append(option.strip().removeprefix(f"{letter})"))
    return with_options(record["question"], "ABCDE", options), record["correct"].strip()


def mmlu_row(record):
    """The file's answers are letters, the hub's are 0 to 3."""
    letters = {0: "A", 1: "B", 2: "C", 3: "D"}
    answer = letters.get(record["answer"], str(record["answer"]).strip())
    return with_options(record["question"], "ABCD", record["choices"]), answer


def wsc_row(record):
    """Span 1 is the noun, span 2 the pronoun; the file nests them in "target". Stars mark the pronoun where it stands
    at its word's number, since the same word may stand elsewhere in the text."""
    spans = record.get("target", record)
    text = record["text"].strip()
    noun = spans["span1_text"].strip()
    pronoun = spans["span2_text"].strip()
    words_before = rf"(?:\S+\s+){{{int(spans['span2_index'])}}}[^\w\s]*"
    marked = re.sub(rf"\A({words_before})({re.escape(pronoun)})\b", r"\1*\2*", text)
    question = f'{marked}\nIn the text above, does the pronoun "{pronoun}" refer to "{noun}"?'
    answers = {True: "Yes", False: "No"}  # of 1 and 0, too
    return question, answers.get(record["label"], str(record["label"]))


def webnlg_row(record):
    """The triples, one a line as "subject | property | object", and a list of the English texts that say them, without
    those that the crowd called bad. A triple set may be there in more than one order, of which the first counts."""
    triples = record["modified_triple_sets"]["mtriple_set"][0]
    lex = record["lex"]
    comments, languages = ([*lex.get(name, ()), *[""] * len(lex["text"])] for name in ("comment", "lang"))
    texts = []
    for text, comment, language in zip(lex["text"], comments, languages):
        if " ".join(text.split()) and comment != "bad" and language in ("", "en"):
            texts.append(" ".join(text.split()))
    return "\n".join(triple.strip() for triple in triples), texts


def is_data_to_text(record):
    """Whether a record of the hub is one to write a text for: its test rows hold those of the other direction, too, and
    the same again without texts."""
    return not record.get("test_category", "").startswith("semantic-parsing") and bool(record["lex"]["text"])


# --- The table of what is published -----------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    file: str  # under --source
    sizes: set[int]  # how many records it may have
    hub: str = ""  # its name on the hub, if another; "a+b" for two parts, one after the other


@dataclass(frozen=True)
class Published:
    """The records of a task as they are published, and what is made of them."""

    parts: dict[str, Part]
    row: Callable  # record -> (question, answer, or a list of reference texts)
    split: Callable  # {part: records} -> (train, dev, test)
    rule: str  # what `split` does, in words, for task.json
    read: Callable = read_jsonl  # path -> records
    belongs: Callable = bool  # whether a record of the hub is one of the task's
    converted: bool = False  # on the hub it is a program; read is the hub's own conversion of its rows


BBH_RULE = "file rows 0-49 train, 50-149 dev, the rest test; of files under 250 rows, after 50 train, the rest halved"


def split_bbh(parts):
    rows = parts["test"]
    dev = 100 if len(rows) == 250 else (len(rows) - 50) // 2
    return rows[:50], rows[50 : 50 + dev], rows[50 + dev :]


def split_multiarith(parts):
    """There is no published split, and the file is sorted by the operations that a question needs."""
    rows = parts["all"]
    test = [row for index, row in enumerate(rows) if index % 6]
    return rows[::12], rows[6::12], test


MMLU_RULE = "the dev file's rows and then the val file's: the first half train, the rest dev; the whole test file test"


def split_mmlu(parts):
    rows = parts["dev"] + parts["val"]
    half = len(rows) // 2
    return rows[:half], rows[half:], parts["test"]


def split_webnlg(parts):
    """The files are sorted by number of triples and topic, so train and dev rows are taken from all over them."""
    return evenly_spaced(parts["train"], 100), evenly_spaced(parts["dev"], 100), parts["test"]


def evenly_spaced(rows, count):
    return [rows[number * len(rows) // count] for number in range(count)]


SHORT_BBH = {"bbh/causal_judgement": 187, "bbh/penguins_in_a_table": 146, "bbh/snarks": 178}


def published_bbh(name):
    size = SHORT_BBH.get(name, 250)
    return Published({"test": Part(f"{name}.json", {size})}, bbh_row, split_bbh, BBH_RULE, read_json)


def published_mmlu(subject, val, test):
    parts = {
        "dev": Part(f"mmlu/dev/{subject}_dev.csv", {5}),
        "val": Part(f"mmlu/val/{subject}_val.csv", {val}, "validation"),
        "test": Part(f"mmlu/test/{subject}_test.csv", {test}),
    }
    return Published(parts, mmlu_row, split_mmlu, MMLU_RULE, read_mmlu)


PUBLISHED = {
    "gsm8k": Published(
        parts={"train": Part("gsm8k/train.jsonl", {7473}), "test": Part("gsm8k/test.jsonl", {1319})},
        row=gsm8k_row,
        split=lambda parts: (parts["train"][:100], parts["train"][100:200], parts["test"]),
        rule="rows 0-99 of the training file train, 100-199 dev, the whole test file test",
    ),
    "folio": Published(
        # the authors' files and the newer version on the hub differ by a few corrected stories
        parts={
            "train": Part("folio/folio-train.jsonl", {1004, 1001, 1003}),
            "validation": Part("folio/folio-validation.jsonl", {204, 203}),
        },
        row=folio_row,
        split=lambda parts: (parts["train"][:100], parts["train"][100:200], parts["validation"]),
        rule="rows 0-99 of the training file train, 100-199 dev, the whole validation file test",
    ),
    "multiarith": Published(
        # the hub holds the 600 as two parts, so its rows need not fall into the same splits as the file's
        parts={"all": Part("multiarith/MultiArith.json", {600}, "train+test")},
        row=multiarith_row,
        split=split_multiarith,
        rule="every 12th row from row 0 train, every 12th from row 6 dev, the other 500 test",
        read=read_json,
    ),
    "aqua": Published(
        parts={
            "train": Part("aqua/train.json", {97467}),
            "dev": Part("aqua/dev.json", {254}, "validation"),
            "test": Part("aqua/test.json", {254}),
        },
        row=aqua_row,
        split=lambda parts: (parts["train"][:100], parts["dev"][:100], parts["test"]),
        rule="rows 0-99 of the training file train, 0-99 of the dev file dev, the whole test file test",
    ),
    "wsc": Published(
        parts={"train": Part("wsc/train.jsonl", {554}), "val": Part("wsc/val.jsonl", {104}, "validation")},
        row=wsc_row,
        # neighbours often share a text, so the dev rows are taken far from the training rows
        split=lambda parts: (parts["train"][:100], parts["train"][-100:], parts["val"]),
        rule="rows 0-99 of the training file train, its last 100 dev, the whole validation file test",
    ),
    "webnlg": Published(
        parts={
            "train": Part("webnlg/train", {13211}),
            "dev": Part("webnlg/dev", {1667}, "dev+validation"),
            "test": Part("webnlg/test/rdf-to-text-generation-test-data-with-refs-en.xml", {1779}),
        },
        row=webnlg_row,
        split=split_webnlg,
        rule="100 rows evenly spaced over the training files train, 100 over the dev files dev, the test file test",
        read=read_webnlg,
        belongs=is_data_to_text,
        converted=True,
    ),
    **{name: published_bbh(name) for name in TASKS if name.startswith("bbh/")},
    **{f"mmlu/{subject}": published_mmlu(subject, val, test) for subject, (val, test) in MMLU_SIZES.items()},
}


def make_row(task, record):
    """(question, answer) of a published record."""
    return PUBLISHED[task.name].row(record)


# --- Splits, and the prepared task ------------------------------------------------------------------------

AS_PUBLISHED = "take the file as its authors publish it"


def split_rows(task, source=""):
    """{"train", "dev", "test"}: rows of a task by its split rule.

    Errors: UserError when a file has another size than the published one, or a gold answer is not a possible one.
    """
    if task.name == "demo":
        return split_demo_rows()
    train_dev_test = PUBLISHED[task.name].split(numbered_records(task, source))
    splits = {}
    for split, chosen in zip(SPLITS, train_dev_test, strict=True):
        splits[split] = [checked_row(task, row_id, place, record) for row_id, place, record in chosen]
    return splits


def numbered_records(task, source):
    """{part: [(row id, where the record stands, record)]}. Errors: UserError when a part has another size."""
    numbered = {}
    for name, records in load_raw(task, source).items():
        part = PUBLISHED[task.name].parts[name]
        place = str(Path(source) / part.file) if source else f"{task.hub[0]}, {name}"
        expected = f"expected {sorted(part.sizes)}; {AS_PUBLISHED}"
        require(len(records) in part.sizes, f"{place} has {len(records)} rows, {expected}")
        numbered[name] = [
            (f"{task.name}-{name}-{index}", f"{place}, record {index + 1}", record)
            for index, record in enumerate(records)
        ]
    return numbered


def checked_row(task, row_id, place, record):
    """The row {"id", "question", "answer"} of a published record, with "references" where a text is to be generated.

    Errors: UserError that names its place if it has another form, no question, or an impossible gold answer.
    """
    try:
        question, answer = make_row(task, record)
        references = answer if isinstance(answer, list) else []
        answer = next(iter(references), "") if isinstance(answer, list) else answer
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{place}: a field is missing or has another form ({error!r}); {AS_PUBLISHED}") from None
    if not question or not gold_is_possible(task, answer):
        raise UserError(f"{place}: it has no question or the impossible answer {answer!r}; {AS_PUBLISHED}")
    row = {"id": row_id, "question": question, "answer": answer}
    return row | ({"references": references} if references else {})


def gold_is_possible(task, answer):
    if task.is_generation:
        return has_words(answer)
    return answer in task.choices if task.choices else canonical(task, answer) is not None


DEMO_RULE = "file rows 0-199 train, 200-299 dev, the rest test"


def split_demo_rows():
    rows = read_rows(ROOT / "demo" / "rows.jsonl")
    return {"train": rows[:200], "dev": rows[200:300], "test": rows[300:]}


def split_rule(task, own):
    """How the rows of a task are split, in words."""
    if task.name == "demo":
        return DEMO_RULE
    return PUBLISHED[task.name].rule if task.name in PUBLISHED else own_rule(own)


PATIENCE = 600  # seconds to wait for other processes that prepare tasks in the same folder


def prepare(task, data_dir, source="", own=None):
    """Write data_dir/<task>/{train,dev,test}.jsonl, then task.json; the same bytes on every run. Returns the folder.

    source: the folder of the authors' files, empty for the hub; own: the `OwnRows` of an own task.
    Errors: UserError for rows that cannot be used, or an empty split.
    """
    splits = own_splits(own) if own else split_rows(task, source)
    if own and task.is_generation:
        splits = {split: list(map(with_references, rows)) for split, rows in splits.items()}
    for split, rows in splits.items():
        require(rows, f"{task.name}: the {split} split is empty; give more rows")
    for warning in split_warnings(splits, task.choices) if own else ():
        print(f"warning: {warning}", file=sys.stderr)
    folder = Path(data_dir) / task.folder
    contents = {f"{split}.jsonl": as_bytes(as_lines(rows)) for split, rows in splits.items()}
    changing_no_row = ("answer_space", "paper_extractor", "own_folder", "system")
    record = {name: value for name, value in asdict(task).items() if name not in changing_no_row}
    record |= {
        "split_rule": split_rule(task, own),
        "defaults": record.pop("defaults"),  # behind the rule, where it has always been: the same bytes
        "answer_prefix": task.answer_prefix,
        "counts": {split: len(rows) for split, rows in splits.items()},
        "source": (own and own.task) or source or task.hub[0] or "demo/rows.jsonl",
        "sha256": {split: hashlib.sha256(contents[f"{split}.jsonl"]).hexdigest() for split in splits},
        "grader_version": GRADER_VERSION,
    }
    contents["task.json"] = as_bytes(as_json(record))  # last: it says that the rows beside it are whole
    if not all_hold(folder, contents):
        with alone_in(data_dir, PATIENCE):  # not in the task's folder, which holds these files and no other
            if not all_hold(folder, contents):  # another process may have written them in the meantime
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "task.json").unlink(missing_ok=True)
                for name, content in contents.items():
                    write_whole(folder / name, content)
    return folder


def all_hold(folder, contents):
    """Whether the folder's files have these bytes, {name: bytes}. Then they are left alone: others may be reading."""
    paths = {folder / name: content for name, content in contents.items()}
    return all(path.is_file() and path.read_bytes() == content for path, content in paths.items())


def read_prepared(task, data_dir):
    """The record task.json of a prepared task. Errors: UserError if it is not there, or no such record."""
    path = Path(data_dir) / task.folder / "task.json"
    again = f"run python 01_prepare_data.py --task {task.name}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        fields_of_splits = [(record["sha256"][split], record["counts"][split]) for split in SPLITS]
        good = all(isinstance(sha, str) and isinstance(count, int) for sha, count in fields_of_splits)
        version = record["grader_version"]
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no prepared task: {again}") from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        good = False
    require(good and record.get("name") == task.name, f"{path} is not what stage 01 writes: {again}")
    require(version == GRADER_VERSION, f"{path.parent} is of another grader version: {again}")
    return record


def load_split(task, data_dir, split):
    """Rows of a prepared split. Errors: UserError if its bytes are not those that stage 01 wrote."""
    expected = read_prepared(task, data_dir)["sha256"][split]
    path = Path(data_dir) / task.folder / f"{split}.jsonl"
    rows = read_rows(path)
    again = f"run python 01_prepare_data.py --task {task.name}"
    require(sha256(path) == expected, f"{path} changed since stage 01 wrote it: {again}")
    return rows


def is_prepared(task, data_dir):
    return (Path(data_dir) / task.folder / "task.json").exists()


def open_task(flags):
    """(task, {split: rows}) of a script's `TaskFlags`. Prepares the task where stage 01 has not, and says so.

    Errors: UserError for a task, a file or a row that cannot be used.
    """
    task = get_task(flags.own, flags.extractor, flags.kind, flags.template, flags.answer_space, flags.system)
    if task.is_generation:
        require_package()
    # Own rows and the demo's lie here and may have changed; preparing them takes no time.
    if flags.own_rows or task.name == "demo" or not is_prepared(task, flags.data_dir):
        # A known task is prepared as the table has it: what the user sets otherwise changes no row.
        folder = prepare(
            TASKS.get(task.name, task), flags.data_dir, flags.source, flags.own if flags.own_rows else None
        )
        print(f"preparing {task.name} in {folder}")
    splits = {split: load_split(task, flags.data_dir, split) for split in SPLITS}
    for row in [row for rows in splits.values() for row in rows]:
        which = f"--kind {task.kind}: the answer {row['answer']!r} of row {row['id']}"
        why = "has no letter a to z or digit, and ROUGE-L reads no others" if task.is_generation else "is none"
        require(gold_is_possible(task, row["answer"]), f"{which} {why}: set another --kind")
    if flags.own_rows:
        sizes = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
        how = "the whole reply" if task.is_generation else f"asked for with {task.extractor!r}"
        print(f"{sizes} rows; {described(task)}; {how}")
    return task, splits


def described(task):
    """The kind of a task's answers in words, with the possible ones where they are few."""
    few = 0 < len(task.choices) <= LISTED
    return f"answers: {task.kind}" + (f" ({', '.join(task.choices)})" if few else "")
