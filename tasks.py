"""Tasks: where the rows come from, how they are split, how an answer is asked for, read and graded.

Everything here works without torch, so the scripts can check a task, its files and every flag before
they load anything heavy. The order follows the data: the table of tasks, reading and splitting rows,
the files between the stages, reading an answer out of text, grading it.
"""

import difflib
import hashlib
import json
import os
import re
import string
from dataclasses import asdict, dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path

ROOT = Path(__file__).parent
GRADER_VERSION = 1  # raise it whenever an answer could be read or graded differently
KINDS = ("number", "choice", "boolean", "text")
SPLITS = ("train", "dev", "test")


class UserError(ValueError):
    """A mistake the user can mend. Scripts print it as one line and exit with code 2."""


def require(condition, message):
    if not condition:
        raise UserError(message)


# --- The table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One task. `template` holds the question and, at its end, the place of the searched prompt."""

    name: str
    kind: str  # number, choice, boolean or text: how an answer is read and compared
    extractor: str  # follows the reasoning; the answer is read right behind it (Sec. 3.2)
    choices: tuple[str, ...] = ()  # the only possible answers of kind choice and boolean
    template: str = "{question}\nUse {prompt}"  # "Use" is fixed; the searched tokens start after it
    initial_prompt: str = "proper logical reasoning and think step by step. Finally give the actual correct answer."
    hub: tuple[str, str] = ("", "")  # (dataset, configuration) on the hub
    split_rule: str = ""
    defaults: dict = field(default_factory=dict)  # flags whose default differs from the paper's

    @property
    def answer_prefix(self):
        """What stands between extractor and answer: a number follows a sign at once ("$8"), a word after a space."""
        last = self.extractor[-1]
        return "" if last.isspace() or (self.kind == "number" and not last.isalnum()) else " "


def ask(what):
    return f"Therefore, the final answer, written as a dollar sign followed by {what}, is $"


def ask_choice(choices):
    return ask("one of " + ", ".join(choices[:-1]) + " or " + choices[-1])


INTEGER = ask("an integer without commas")
BBH_RULE = "file rows 0-49 train, 50-149 dev, the rest test; of files under 250 rows, after 50 train, the rest halved"

# BBH task -> its possible answers: the last option letter, the words, or how to write the answer.
BBH_LETTERS = {
    "date_understanding": "F",
    "disambiguation_qa": "D",
    "geometric_shapes": "K",
    "hyperbaton": "B",
    "logical_deduction_five_objects": "E",
    "logical_deduction_seven_objects": "G",
    "logical_deduction_three_objects": "C",
    "movie_recommendation": "E",
    "penguins_in_a_table": "E",
    "reasoning_about_colored_objects": "R",
    "ruin_names": "K",
    "salient_translation_error_detection": "F",
    "snarks": "B",
    "temporal_sequences": "D",
    "tracking_shuffled_objects_five_objects": "E",
    "tracking_shuffled_objects_seven_objects": "G",
    "tracking_shuffled_objects_three_objects": "C",
}
BBH_WORDS = {
    "boolean_expressions": ("True", "False"),
    "causal_judgement": ("Yes", "No"),
    "formal_fallacies": ("valid", "invalid"),
    "navigate": ("Yes", "No"),
    "sports_understanding": ("yes", "no"),
    "web_of_lies": ("Yes", "No"),
}
BBH_TEXT = {
    "dyck_languages": "the missing closing brackets separated by spaces",
    "word_sorting": "the sorted words separated by spaces",
}
BBH_NUMBERS = ("multistep_arithmetic_two", "object_counting")
# Six of the 27 are not in the paper's set of 21.
NOT_IN_PAPER = {"dyck_languages", "word_sorting"} | {
    f"{family}_{size}_objects"
    for family in ("logical_deduction", "tracking_shuffled_objects")
    for size in ("three", "seven")
}


def bbh_tasks():
    shapes = {n: ("choice", tuple(string.ascii_uppercase[: ord(z) - 64])) for n, z in BBH_LETTERS.items()}
    shapes |= {n: ("boolean", words) for n, words in BBH_WORDS.items()}
    shapes |= {n: ("number", ()) for n in BBH_NUMBERS} | {n: ("text", ()) for n in BBH_TEXT}
    for name, (kind, choices) in sorted(shapes.items()):
        extractor = ask_choice(choices) if choices else INTEGER if kind == "number" else ask(BBH_TEXT[name])
        yield Task(f"bbh/{name}", kind, extractor, choices, hub=("SaylorTwift/bbh", name), split_rule=BBH_RULE)


TASKS = {
    task.name: task
    for task in (
        Task(
            "demo",
            "number",
            "so the answer is",
            template="{question} please {prompt}",
            initial_prompt="read the problem here and find the answer now .",
            split_rule="file rows 0-199 train, 200-299 dev, the rest test",
            defaults={
                "model": "demo/model",
                "steps": 20,
                "train_rows": 40,
                "max_new_tokens": 40,
                "max_prompt_tokens": 20,
                "batch_size": 200,
            },
        ),
        Task(
            "gsm8k",
            "number",
            INTEGER,
            hub=("openai/gsm8k", "main"),
            split_rule="rows 0-99 of the training file train, 100-199 dev, the whole test file test",
        ),
        Task(
            "folio",
            "choice",
            ask_choice("ABC"),
            choices=("A", "B", "C"),
            hub=("tasksource/folio", ""),
            split_rule="rows 0-99 of the training file train, 100-199 dev, the whole validation file test",
        ),
        *bbh_tasks(),
    )
}
PAPER_BBH = [name for name in TASKS if name.startswith("bbh/") and name[4:] not in NOT_IN_PAPER]


def get_task(name, extractor="", kind="", template=""):
    """The task called `name`, or a user's own: the path of a JSONL file of rows and an extractor.

    Errors: UserError for an unknown name (with the nearest known one) or an own task without extractor.
    """
    if name.endswith(".jsonl"):
        if not extractor.strip():
            raise UserError(f'--task {name} is your own: say how to ask for the answer, --extractor "The answer is $"')
        rows = read_rows(name)
        kind = kind or infer_kind([row["answer"] for row in rows])
        require(kind in KINDS, f"--kind must be one of {', '.join(KINDS)}, not {kind!r}")
        choices = tuple(sorted({row["answer"] for row in rows})) if kind in ("choice", "boolean") else ()
        own = {"template": template} if template else {}
        rule = "rows in file order: half train, a quarter dev, the rest test"
        return check_template(Task(f"own/{Path(name).stem}", kind, extractor, choices, split_rule=rule, **own))
    if name not in TASKS:
        require(not Path(name).exists() and "." not in name, f"--task {name}: your own rows must be a .jsonl file")
        near = difflib.get_close_matches(name, [*TASKS, *(n[4:] for n in TASKS if n[:4] == "bbh/")], n=1, cutoff=0.4)
        near = [n if n in TASKS else f"bbh/{n}" for n in near]
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown task {name!r}.{hint} Known: {', '.join(TASKS)}, or the path of your own .jsonl file")
    if extractor or kind or template:
        raise UserError(f"--extractor, --kind and --template are for your own rows; {name} has its own")
    return TASKS[name]


def check_template(task):
    if task.template.count("{question}") != 1 or task.template.count("{prompt}") != 1:
        raise UserError("--template must hold {question} and {prompt} once each")
    if not task.template.endswith(" {prompt}") or task.template.index("{question}") > task.template.index("{prompt}"):
        raise UserError("--template must end with a space and {prompt}, after {question}: the prompt comes last")
    return task


def infer_kind(answers):
    """The answer kind of a user's rows, from the narrowest that fits all answers."""
    if all(canonical_number(a) is not None for a in answers):
        return "number"
    if all(re.fullmatch("[A-Z]", a) for a in answers):
        return "choice"
    if all(a.lower() in ("yes", "no", "true", "false", "valid", "invalid") for a in answers):
        return "boolean"
    return "text"


# --- Reading rows -----------------------------------------------------------------------------------


def read_jsonl(path):
    """The objects of a JSONL file. Errors: UserError that names the file, and the line that cannot be read."""
    try:
        # Lines end in \n alone: other separators of lines that Unicode knows may stand in a text.
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lines = [] if lines == [""] else lines
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(json.loads(line))
            if not isinstance(objects[-1], dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not a JSON object ({error})") from None
    return objects


def read_rows(path):
    """Rows `{"id", "question", "answer"}` of a JSONL file; a missing id becomes the line's number."""
    rows = []
    for number, row in enumerate(read_jsonl(path), 1):
        question, answer = (as_text(row.get(key)) for key in ("question", "answer"))
        for key, value in (("question", question), ("answer", answer)):
            require(value, f"{path}, line {number}: the row has no {key} (a text or a number)")
        rows.append({"id": str(row.get("id", f"line-{number}")), "question": question, "answer": answer})
    if not rows:
        raise UserError(f"{path} has no rows")
    if len({row["id"] for row in rows}) < len(rows):
        raise UserError(f"{path}: two rows share an id")
    return rows


def as_text(value):
    """A JSON text or number as text ("19" for 19.0), or "" if it is neither or cannot be written as UTF-8."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip() if isinstance(value, (str, int, float)) else ""
    return "" if any("\ud800" <= c <= "\udfff" for c in text) else text


def load_raw(task, source):
    """The records of a task as its authors publish them: {file's name: [record]}.

    From `source`, a folder laid out as gsm8k/{train,test}.jsonl, bbh/NAME.json and
    folio/folio-{train,validation}.jsonl, or from the hub through `datasets` when it is empty.
    """
    family, _, name = task.name.partition("/")
    if source:
        folder = Path(source) / family
        if family == "bbh":
            path = folder / f"{name}.json"
            try:
                return {"test": json.loads(path.read_text(encoding="utf-8"))["examples"]}
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"cannot read {path} as a BBH file: {error}") from None
        parts = {"gsm8k": ("train", "test"), "folio": ("train", "validation")}[family]
        prefix = "folio-" if family == "folio" else ""
        return {part: read_jsonl(folder / f"{prefix}{part}.jsonl") for part in parts}
    import datasets  # only here: it takes a second to import

    try:
        loaded = datasets.load_dataset(task.hub[0], task.hub[1] or None)
    except Exception as error:  # the hub's errors have no common class
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot load {task.hub[0]} from the hub ({reason}); --source DIR reads the authors' files"
        ) from None
    return {part: list(records) for part, records in loaded.items()}


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


FOLIO_LABELS = {"True": "A", "False": "B", "Uncertain": "C", "Unknown": "C"}


def folio_question(record):
    premises = record["premises"]
    lines = premises if isinstance(premises, list) else premises.splitlines()
    return (
        "Premises:\n" + "\n".join(line.strip() for line in lines) + f"\nConclusion: {record['conclusion'].strip()}\n"
        "Is the conclusion true, false or uncertain, given the premises?\nOptions:\n(A) True\n(B) False\n(C) Uncertain"
    )


def make_row(task, record):
    """(question, answer) of a published record."""
    if task.name == "gsm8k":
        return record["question"].strip(), record["answer"].split("####")[-1].strip().replace(",", "")
    if task.name == "folio":
        return folio_question(record), FOLIO_LABELS[record["label"].strip()]
    return record["input"].strip(), bbh_answer(record)


def split_rows(task, source=""):
    """{"train", "dev", "test"}: rows of a task by its split rule.

    Errors: UserError when a file has another size than the published one, or a gold answer is not a possible one.
    """
    family = task.name.partition("/")[0]
    if family == "demo":
        rows = read_rows(ROOT / "demo" / "rows.jsonl")
        return {"train": rows[:200], "dev": rows[200:300], "test": rows[300:]}
    raw = load_raw(task, source)
    expected = {
        "gsm8k": {"train": {7473}, "test": {1319}},
        # the authors' files and the newer version on the hub differ by a few corrected stories
        "folio": {"train": {1004, 1001, 1003}, "validation": {204, 203}},
        "bbh": {"test": {{"causal_judgement": 187, "penguins_in_a_table": 146, "snarks": 178}.get(task.name[4:], 250)}},
    }[family]
    rows = {}
    for part, sizes in expected.items():
        if len(raw.get(part, ())) not in sizes:
            raise UserError(f"{task.name}: {part} has {len(raw.get(part, ()))} rows, expected {sorted(sizes)}")
        try:
            pairs = [make_row(task, record) for record in raw[part]]
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{task.name}: a record of {part} lacks a field or has another form: {error!r}") from None
        rows[part] = [
            {"id": f"{task.name}-{part}-{i}", "question": question, "answer": answer}
            for i, (question, answer) in enumerate(pairs)
        ]
    if family == "bbh":
        dev = 100 if len(rows["test"]) == 250 else (len(rows["test"]) - 50) // 2
        rows = rows["test"]
        splits = {"train": rows[:50], "dev": rows[50 : 50 + dev], "test": rows[50 + dev :]}
    else:
        held_out = rows["test"] if family == "gsm8k" else rows["validation"]
        splits = {"train": rows["train"][:100], "dev": rows["train"][100:200], "test": held_out}
    for row in sum(splits.values(), []):
        if not row["question"] or not gold_is_possible(task, row["answer"]):
            raise UserError(f"{task.name}: row {row['id']} has no question or an impossible answer {row['answer']!r}")
    return splits


def gold_is_possible(task, answer):
    return answer in task.choices if task.choices else canonical(task, answer) is not None


# --- The files between the stages ---------------------------------------------------------------------


def write_jsonl(path, objects):
    """Write a JSONL file whole or not at all: to a temporary file that then takes the place of the old one."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects), encoding="utf-8")
    os.replace(temporary, path)


def write_json(path, record):
    """Write one indented JSON file, whole or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def append_jsonl(path, record):
    """Append one object and see it on disk, so that a killed run loses at most the line it was writing."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_appended(path):
    """The objects of a file that grows line by line; [] if none. A last line cut short is removed."""
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    return read_jsonl(path)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def weights_hash(name):
    """What tells a local model from another: hash of the names, sizes and both ends of its weight files; a hub
    name stands for itself. (Reading 16 GB whole would take longer than some evaluations.)"""
    files = sorted(Path(name).glob("*.safetensors"))
    if not files:
        return name
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(2**20))
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def text_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_own_rows(path):
    rows = read_rows(path)
    half, three_quarters = len(rows) // 2, len(rows) * 3 // 4
    return {"train": rows[:half], "dev": rows[half:three_quarters], "test": rows[three_quarters:]}


def prepare(task, data_dir, source="", own_rows=""):
    """Write data_dir/<task>/{train,dev,test}.jsonl, then task.json; the same bytes on every run. Returns the folder."""
    splits = split_own_rows(own_rows) if own_rows else split_rows(task, source)
    for split, rows in splits.items():
        if not rows:
            raise UserError(f"{task.name}: the {split} split is empty; give more rows")
    folder = Path(data_dir) / task.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").unlink(missing_ok=True)  # its presence says that the rows beside it are whole
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}.jsonl", rows)
    record = asdict(task) | {
        "answer_prefix": task.answer_prefix,
        "counts": {split: len(rows) for split, rows in splits.items()},
        "source": own_rows or source or task.hub[0] or "demo/rows.jsonl",
        "sha256": {split: sha256(folder / f"{split}.jsonl") for split in splits},
        "grader_version": GRADER_VERSION,
    }
    write_json(folder / "task.json", record)
    return folder


def load_split(task, data_dir, split):
    """Rows of a prepared split. Errors: UserError if its bytes are not those that stage 01 wrote."""
    folder = Path(data_dir) / task.name
    path = folder / f"{split}.jsonl"
    try:
        record = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        expected = record["sha256"][split]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder} holds no prepared task: run python 01_prepare_data.py --task {task.name}") from None
    rows = read_rows(path)
    if sha256(path) != expected:
        raise UserError(f"{path} changed since stage 01 wrote it: run python 01_prepare_data.py --task {task.name}")
    if record["grader_version"] != GRADER_VERSION:
        raise UserError(f"{folder} is of another grader version: run python 01_prepare_data.py --task {task.name}")
    return rows


def is_prepared(task, data_dir):
    return (Path(data_dir) / task.name / "task.json").exists()


# --- Reading an answer out of text, and grading it -------------------------------------------------------


def canonical_number(text):
    """A number without sign of currency, thousands separators or idle zeros: "$1,250.00" -> "1250"; None if none."""
    plain = re.sub(r"[\s,$]", "", text.replace("\N{MINUS SIGN}", "-"))
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", plain):
        return None
    try:
        return format(Decimal(plain).normalize() + 0, "f")
    except InvalidOperation:
        return None


def canonical(task, answer):
    """The form in which two answers are compared, or None for no answer."""
    if answer is None:
        return None
    if task.kind == "number":
        return canonical_number(answer)
    return " ".join(answer.split()).strip("$ .").casefold() or None


def grade(task, gold, answer):
    """Whether `answer` (None: none was found) is the gold answer."""
    return answer is not None and canonical(task, answer) == canonical(task, gold)


def read_answer(task, text):
    """The `paper` reading: the first possible answer in what the model writes behind the extractor, or None."""
    if task.kind == "number":
        found = re.search(r"[-\N{MINUS SIGN}]?\$?\s?(\d[\d,]*\.?\d*|\.\d+)", text)
        return canonical_number(found.group().rstrip(".,")) if found else None
    if task.choices:
        words = "|".join(map(re.escape, sorted(task.choices, key=len, reverse=True)))
        alone = rf"(?<![\w'])({words})(?![\w'])"
        article = r"(?! [a-z])" if task.kind == "choice" else ""  # "I think", "A man" are no letters of an option
        for pattern in (rf"\(({words})\)", alone + article, alone):
            if found := re.search(pattern, text, word_case(task)):
                return as_choice(task, found.group(1))
        return None
    line = text.strip().splitlines()[0] if text.strip() else ""
    return re.split(r"answer is:?\s*", line)[-1].strip("$ .") or None


def word_case(task):
    """Words are read in any case; letters as written, since "a" is a word."""
    return 0 if task.kind == "choice" else re.I


def as_choice(task, word):
    return next(choice for choice in task.choices if choice.casefold() == word.casefold())


def grade_harness(gold, answer):
    """lm-evaluation-harness's exact match: strings, whatever their case, so that 1250.00 is not 1250."""
    return answer is not None and answer.casefold() == gold.casefold().replace(",", "")


# The `harness` reading: the flexible extraction of lm-evaluation-harness (commit 4e7e0d47f), from the reasoning
# itself, so that numbers can be compared with published ones. Its quirks are kept: see tests/test_tasks.py.
HARNESS_WORDS = {
    "sports_understanding": {"yes": r"\byes\b|\bplausible\b", "no": r"\bno\b|\bnot plausible\b|\bimplausible\b"},
    "web_of_lies": {
        "Yes": r"\byes\b|\btells the truth\b|\bis telling the truth\b",
        "No": r"\bno\b|\blies\b|\bis lying\b|\bdoes not tell the truth\b|\bdoesn't tell the truth\b",
    },
}
NUMBER_WORDS = {w: str(n) for n, w in enumerate("zero one two three four five six seven eight nine ten".split())}


def read_answer_harness(task, question, text):
    """The last answer that lm-evaluation-harness's flexible rules find in `text`, or None."""
    name = task.name.removeprefix("bbh/")
    if task.kind == "number":
        pattern = r"([-0-9]+)" if task.name.startswith("bbh/") else r"(-?[$0-9.,]{2,}|-?[0-9]+)"
        numbers = re.findall(pattern, text)
        if numbers:
            return re.sub(r"[,$]", "", numbers[-1]).removesuffix(".")
        words = re.findall(r"\b(" + "|".join(NUMBER_WORDS) + r")\b", text.lower())
        return NUMBER_WORDS[words[-1]] if words and task.name.startswith("bbh/") else None
    if task.kind == "boolean":
        return last_word(HARNESS_WORDS.get(name) or {c: word_pattern(c) for c in task.choices}, name, text)
    if task.kind == "choice":
        return last_option(task, question, text)
    if name == "dyck_languages":
        runs = re.findall(r"[()\[\]{}<>](?:\s*[()\[\]{}<>])*", text)
        return " ".join(re.sub(r"\s", "", runs[-1])) if runs else None
    if name == "word_sorting":
        return last_order(question, text)
    found = re.findall(r"answer is:?\s*(.+)", text)
    return found[-1].strip("$ .") if found else None


def word_pattern(word):
    return rf"\b(?:{word}|{word.lower()})\b" if word in ("Yes", "No") else rf"\b{word}\b"


def last_word(patterns, name, text):
    """The choice whose pattern matches last; of matches that end together the longest ("not plausible")."""
    text = text.lower() if name in HARNESS_WORDS else text
    ends = [(m.end(), m.end() - m.start(), c) for c, pattern in patterns.items() for m in re.finditer(pattern, text)]
    return max(ends)[2] if ends else None


def last_option(task, question, text):
    """`(B)` anywhere, else the text of an option, else `: B`; the last one found."""
    letters = re.findall(r"\(([A-Z])\)", text)
    if letters:
        return letters[-1]

    def plain(words):
        return words.lower().translate(str.maketrans("", "", string.punctuation))

    options = re.findall(r"^\(([A-Z])\) (.*)$", question, re.M)
    places = [(plain(text).rfind(plain(option).strip()), letter) for letter, option in options if plain(option).strip()]
    if places and max(places)[0] >= 0:
        return max(places)[1]
    letters = re.findall(r":\s*(" + "|".join(task.choices) + r")\b", text)
    return letters[-1] if letters else None


def last_order(question, text):
    """word_sorting: the listed words in the order of their last occurrences in the text."""
    words = question.rpartition("List:")[2].split()
    places = {w: [m.start() for m in re.finditer(rf"(?<!\S){re.escape(w)}(?![\w&'])", text)] for w in words}
    if not all(places.values()):
        return None
    return " ".join(sorted(words, key=lambda w: places[w][-1]))
