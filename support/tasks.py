"""Tasks: how a question is put and its answer is asked for; of known tasks in a table, of own ones by their rows.

Everything here works without torch, so the scripts can check a task, its rows and every flag before they load
anything heavy. How an answer is read and graded stands in reading.py, as lm-evaluation-harness does it in harness.py;
where the rows of the known tasks come from, in sources.py, a user's own in own.py.
"""

import difflib
import re
import string
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from support.files import UserError, read_jsonl, require, text_hash
from support.own import COLUMN, SUFFIXES, OwnRows, is_own, own_name, own_splits, place_of, rows_of
from support.reading import canonical, canonical_number

GENERATION = "generation"  # the answer is all that the model writes, and gets a score, not right or wrong
KINDS = ("number", "choice", "boolean", "label", "text", GENERATION)
CLOSED_KINDS = ("choice", "boolean", "label")  # of which all possible answers are known
ROWS_PER_LABEL = 3  # so many rows for each different answer, on average, and the answers are a closed set
ANSWER_SPACES = ("choices", "vocabulary")
LISTED = 20  # so many labels at most are named in an own task's extractor


# --- The table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One task. The places of the question and of the searched prompt are in `template`, or that of the prompt is in
    `system`; the words around them are fixed."""

    name: str
    kind: str  # number, choice, boolean, label, text or generation: how an answer is read and compared
    extractor: str  # follows the reasoning; the answer is read right behind it (Sec. 3.2); "" of generation
    choices: tuple[str, ...] = ()  # the only possible answers of a closed kind
    answer_space: str = ""  # choices, vocabulary, or "" for the former where there are any: see `ranks_choices`
    template: str = "{question}\nUse {prompt}"  # what the user says; the searched tokens start after "Use"
    system: str = ""  # a system message before it; empty: none
    initial_prompt: str = "proper logical reasoning and think step by step. Finally give the actual correct answer."
    chain_of_thought: str = "Let's think step by step."  # the standard baseline, a sentence of its own
    paper_extractor: str = ""  # the paper's form, for --preset paper; empty: the same
    hub: tuple[str, str] = ("", "")  # (dataset, configuration) on the hub
    defaults: dict = field(default_factory=dict)  # flags whose default differs from the paper's
    own_folder: str = ""  # where own rows are prepared, below --data-dir: two files may have one name

    @property
    def answer_prefix(self):
        """What stands between extractor and answer: a number follows a sign at once ("$8"), a word after a space or an
        opening bracket."""
        if self.is_generation:
            return ""
        last = self.extractor[-1]
        behind_a_sign = self.kind == "number" and not last.isalnum()
        return "" if last.isspace() or last in "([{" or behind_a_sign else " "

    @property
    def is_generation(self):
        """Whether all that the model writes is the answer, with no extractor behind it."""
        return self.kind == GENERATION

    @property
    def folder(self):
        """Where its rows are prepared, below --data-dir."""
        return self.own_folder or self.name

    @property
    def ranks_choices(self):
        """Whether the answer is the likeliest of the choices and its loss is among them, or whatever is written."""
        return bool(self.choices) and self.answer_space != "vocabulary"

    @property
    def used_answer_space(self):
        return "choices" if self.ranks_choices else "vocabulary"

    @property
    def bare(self):
        """The task without the fixed words before the prompt: for prompts that are sentences of their own, or empty."""
        if "{prompt}" in self.system:
            return replace(self, system="{prompt}")
        before, _, behind = self.template.partition("{prompt}")
        head, question, between = before.partition("{question}")
        if not question:  # the prompt stands before it
            return replace(self, template="{prompt} {question}" + behind.partition("{question}")[2])
        lines, line_end, _ = between.rpartition("\n")  # words on lines of their own belong to the question
        space = lines + line_end or " "
        return replace(self, template=f"{head}{{question}}{space}{{prompt}}")

    @property
    def parts(self):
        """What a user may set otherwise, as a run keeps it: {the flag's name: value}."""
        shown = {name: getattr(self, name) for name in ("extractor", "template", "system", "kind")}
        return shown | {"answer_space": self.used_answer_space}

    def messages(self, question, prompt):
        """What the model is told, as a chat's messages: the question and the prompt's text in their places."""
        turns = [("system", self.system), ("user", self.template)]
        texts = [(role, filled(template, question, prompt.strip())) for role, template in turns]
        return [{"role": role, "content": text} for role, text in texts if text]

    def before_prompt(self, question):
        """The text before the prompt in the message that holds it, which is the first or the last of `messages`."""
        template = self.system if "{prompt}" in self.system else self.template
        return filled(template.partition("{prompt}")[0], question, "", trimmed=False)


def filled(template, question, prompt, trimmed=True):
    """The template with question and prompt in their places, without the white space that an empty prompt leaves."""
    texts = {"{question}": question, "{prompt}": prompt}
    pieces = re.split("({question}|{prompt})", template)
    text = "".join(texts.get(piece, piece) for piece in pieces)
    return text if prompt or not trimmed else text.strip()


# Behind these small models go on with an answer, behind the paper's form with none (docs/extractors.md).
CHOICE = "So the answer is ("
BOOLEAN = "So the answer is"


def ask(what):
    """The extractor in the paper's form."""
    return f"Therefore, the final answer, written as a dollar sign followed by {what}, is $"


def ask_choice(choices):
    return ask(f"one of {', '.join(choices[:-1])} or {choices[-1]}")


INTEGER = ask("an integer without commas")

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
NOT_IN_PAPER = (
    "dyck_languages",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "word_sorting",
)


def letters_to(last):
    """The option letters from A to the last."""
    return tuple(string.ascii_uppercase.partition(last)[0] + last)


def bbh_task(name, kind, paper_extractor, choices=()):
    extractor = {"choice": CHOICE, "boolean": BOOLEAN}.get(kind, paper_extractor)
    hub = ("SaylorTwift/bbh", name)
    return Task(f"bbh/{name}", kind, extractor, choices, paper_extractor=paper_extractor, hub=hub)


def bbh_tasks():
    """The 27 BBH tasks, sorted by name."""
    tasks = []
    for name, last in BBH_LETTERS.items():
        letters = letters_to(last)
        tasks.append(bbh_task(name, "choice", ask_choice(letters), letters))
    for name, words in BBH_WORDS.items():
        tasks.append(bbh_task(name, "boolean", ask_choice(words), words))
    for name in BBH_NUMBERS:
        tasks.append(bbh_task(name, "number", INTEGER))
    for name, form in BBH_TEXT.items():
        tasks.append(bbh_task(name, "text", ask(form)))
    return sorted(tasks, key=lambda task: task.name)


# Subject -> rows of its val file, rows of its test file: 1531 and 14042 in all. Every dev file has 5.
MMLU_SIZES = {
    "abstract_algebra": (11, 100),
    "anatomy": (14, 135),
    "astronomy": (16, 152),
    "business_ethics": (11, 100),
    "clinical_knowledge": (29, 265),
    "college_biology": (16, 144),
    "college_chemistry": (8, 100),
    "college_computer_science": (11, 100),
    "college_mathematics": (11, 100),
    "college_medicine": (22, 173),
    "college_physics": (11, 102),
    "computer_security": (11, 100),
    "conceptual_physics": (26, 235),
    "econometrics": (12, 114),
    "electrical_engineering": (16, 145),
    "elementary_mathematics": (41, 378),
    "formal_logic": (14, 126),
    "global_facts": (10, 100),
    "high_school_biology": (32, 310),
    "high_school_chemistry": (22, 203),
    "high_school_computer_science": (9, 100),
    "high_school_european_history": (18, 165),
    "high_school_geography": (22, 198),
    "high_school_government_and_politics": (21, 193),
    "high_school_macroeconomics": (43, 390),
    "high_school_mathematics": (29, 270),
    "high_school_microeconomics": (26, 238),
    "high_school_physics": (17, 151),
    "high_school_psychology": (60, 545),
    "high_school_statistics": (23, 216),
    "high_school_us_history": (22, 204),
    "high_school_world_history": (26, 237),
    "human_aging": (23, 223),
    "human_sexuality": (12, 131),
    "international_law": (13, 121),
    "jurisprudence": (11, 108),
    "logical_fallacies": (18, 163),
    "machine_learning": (11, 112),
    "management": (11, 103),
    "marketing": (25, 234),
    "medical_genetics": (11, 100),
    "miscellaneous": (86, 783),
    "moral_disputes": (38, 346),
    "moral_scenarios": (100, 895),
    "nutrition": (33, 306),
    "philosophy": (34, 311),
    "prehistory": (35, 324),
    "professional_accounting": (31, 282),
    "professional_law": (170, 1534),
    "professional_medicine": (31, 272),
    "professional_psychology": (69, 612),
    "public_relations": (12, 110),
    "security_studies": (27, 245),
    "sociology": (22, 201),
    "us_foreign_policy": (11, 100),
    "virology": (18, 166),
    "world_religions": (19, 171),
}


def mmlu_task(subject):
    rows, _ = MMLU_SIZES[subject]
    few = min(50, (5 + rows) // 2)  # most subjects have fewer rows to train on than the paper took
    choices = ("A", "B", "C", "D")
    return Task(
        f"mmlu/{subject}",
        "choice",
        CHOICE,
        choices,
        paper_extractor=ask_choice(choices),
        hub=("cais/mmlu", subject),
        defaults={"train_rows": few},
    )


KNOWN_TASKS = (
    Task(
        "demo",
        "number",
        "so the answer is",
        template="{question} please {prompt}",
        initial_prompt="read the problem here and find the answer now .",
        chain_of_thought="show each step .",
        defaults={
            "model": "demo/model",
            "steps": 20,
            "train_rows": 40,
            "max_new_tokens": 40,
            "max_prompt_tokens": 20,
            "batch_size": 200,
        },
    ),
    Task("gsm8k", "number", INTEGER, hub=("openai/gsm8k", "main")),
    Task(
        "folio",
        "choice",
        CHOICE,
        choices=("A", "B", "C"),
        paper_extractor=ask_choice(("A", "B", "C")),
        hub=("tasksource/folio", ""),
    ),
    Task("multiarith", "number", INTEGER, hub=("ChilleD/MultiArith", "")),
    Task(
        "aqua",
        "choice",
        CHOICE,
        choices=("A", "B", "C", "D", "E"),
        paper_extractor=ask_choice(("A", "B", "C", "D", "E")),
        hub=("deepmind/aqua_rat", "raw"),
    ),
    # The Winograd schemas in SuperGLUE's form. It has a labelled training file beside the labelled rows for
    # testing; the original 273 are one file without parts. "Fixed" mends spans that do not occur in their text.
    Task(
        "wsc",
        "boolean",
        BOOLEAN,
        choices=("Yes", "No"),
        paper_extractor=ask_choice(("Yes", "No")),
        hub=("aps/super_glue", "wsc.fixed"),
    ),
    # GPO's task: triples of subject, property and object are to be said in words; each has several reference texts.
    Task(
        "webnlg",
        GENERATION,
        "",
        template="{question}\n{prompt}",
        initial_prompt="Write a short text that says all of this and nothing else.",
        hub=("webnlg-challenge/web_nlg", "release_v3.0_en"),
        defaults={"max_new_tokens": 256},
    ),
    *bbh_tasks(),
    *(mmlu_task(subject) for subject in MMLU_SIZES),
)
TASKS = {task.name: task for task in KNOWN_TASKS}
PAPER_BBH = [task.name for task in bbh_tasks() if task.name.removeprefix("bbh/") not in NOT_IN_PAPER]
GROUPS = {"bbh": PAPER_BBH, "mmlu": [f"mmlu/{subject}" for subject in MMLU_SIZES]}


def get_task(name, extractor="", kind="", template="", answer_space="", system=""):
    """The task called `name`, or a user's own: the path of a file of rows, or `OwnRows`. What is not empty replaces the
    task's.

    Errors: UserError for an unknown name (with the nearest known one), an own task that needs an extractor, or parts
    that do not fit each other.
    """
    own = name if isinstance(name, OwnRows) else OwnRows(name)
    task = own_task(own, extractor, kind) if is_own(own.task) or own.files else known_task(own.task)
    if kind == GENERATION and not extractor:  # also of a known task that has one
        task = replace(task, extractor="")
    changes = {"extractor": extractor, "kind": kind, "template": template, "system": system}
    changes["answer_space"] = answer_space
    return checked_task(replace(task, **{name: text for name, text in changes.items() if text}))


def known_task(name):
    """The task of the table. Errors: UserError, with the nearest name."""
    if name not in TASKS:
        forms = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"
        require(not Path(name).exists() and "." not in name, f"--task {name}: your own rows must be a {forms}")
        raise UserError(f"unknown task {name!r}.{suggestion(name)} Known: {known_names()}, or your own {forms}")
    return TASKS[name]


# Of an own task: nothing is to be reasoned about, and what is written in front of the text would count as part of it.
GENERATION_FRAME = {"template": "{question}\n{prompt}", "initial_prompt": "Write the text alone, in a few words."}


def own_task(own, extractor, kind):
    """The task of a user's own rows. An empty kind is inferred from the answers, and an empty extractor made of them
    where they are a closed set."""
    require(not kind or kind in KINDS, unknown_kind(kind))
    rows = [row for rows_of_split in own_splits(own).values() for row in rows_of_split]
    answers = [row["answer"] for row in rows]
    listed = any("references" in row for row in rows)
    kind = kind or (GENERATION if listed else infer_kind(answers))
    is_generation = kind == GENERATION
    require(is_generation or not listed, f"--kind {kind}: a row has a list of answers, which only {GENERATION} takes")
    choices = tuple(sorted(set(answers))) if kind in CLOSED_KINDS else ()
    how = 'say how to ask for the answer, --extractor "The answer is $"'
    asked_for = choices or is_generation or extractor.strip()
    require(asked_for, f"--task {own.task} is your own, its answers are of the kind {kind}: {how}")
    places = [place_of(path) for path in (own.task, own.train_file, own.dev_file, own.test_file)]
    asked = text_hash(repr((places, asdict(own))))[:8]
    name = own_name(own.task)
    folder = f"{name}-{asked}"
    if is_generation:
        return Task(name, kind, extractor, own_folder=folder, **GENERATION_FRAME)
    return Task(name, kind, extractor or own_extractor(kind, choices), choices, own_folder=folder)


def own_extractor(kind, choices):
    """How an own task's answer is asked for if the user does not say: labels are named."""
    if kind == "label" and len(choices) <= LISTED:
        return f"Out of {', '.join(choices[:-1])} and {choices[-1]}, the answer is"
    are_letters = all(re.fullmatch("[A-Z]", choice) for choice in choices)
    return CHOICE if are_letters else BOOLEAN


def unknown_kind(kind):
    return f"--kind must be one of {', '.join(KINDS)}, not {kind!r}"


def checked_task(task):
    """The task, if its parts fit each other. One whose kind was changed to an open one has no choices any more."""
    require(task.kind in KINDS, unknown_kind(task.kind))
    if task.is_generation:
        require(not task.extractor.strip(), f"--extractor: of the kind {GENERATION} the whole reply is the answer")
    else:
        require(task.extractor.strip(), "--extractor must hold at least one word")
    spaces = ANSWER_SPACES
    known = task.answer_space in ("", *spaces)
    require(known, f"--answer-space must be one of {', '.join(spaces)}, not {task.answer_space!r}")
    if task.kind not in CLOSED_KINDS:
        task = replace(task, choices=())
    elif not task.choices:
        raise UserError(f"--kind {task.kind}: {task.name} has no closed set of answers: number or text")
    require_distinct_choices(task)
    some = task.choices or task.answer_space != "choices"
    require(some, f"--answer-space choices: {task.name} has no closed set of answers: leave it out, or vocabulary")
    return check_template(task)


def require_distinct_choices(task):
    """Errors: UserError if two possible answers count as the same, or if there is only one."""
    same = {}
    for choice in task.choices:
        twin = same.setdefault(canonical(task, choice), choice)
        require(twin == choice, f"{task.name}: the answers {twin!r} and {choice!r} count as the same: write them alike")
    only = f"{task.name}: every answer is {''.join(task.choices[:1])!r}, so there is nothing to find out"
    require(len(task.choices) != 1, only)


def known_names():
    """The names of the known tasks, with one for all of a family, like "bbh/NAME"."""
    names = []
    for name in TASKS:
        family, slash, _ = name.partition("/")
        shown = f"{family}/NAME" if slash else name
        if shown not in names:
            names.append(shown)
    return ", ".join(names)


def suggestion(name):
    """The known task that is spelled nearest, as a sentence behind a space, or ""."""
    full_names = {known: known for known in TASKS}
    for known in TASKS:
        if "/" in known:
            full_names[known.partition("/")[2]] = known
    near = difflib.get_close_matches(name, full_names, n=1, cutoff=0.4)
    return f" Did you mean {full_names[near[0]]}?" if near else ""


def check_template(task):
    """The task, if question and prompt have a place each."""
    both = task.system + task.template
    others = [found[0] for found in COLUMN.finditer(both) if found[1] not in ("question", "prompt")]
    hint = f"--template: {', '.join(others)}? Columns of your rows stand in --question-key, or in place of {{question}}"
    require(not others, hint)
    once = task.template.count("{question}") == both.count("{question}") == both.count("{prompt}") == 1
    places = "--template must hold {question}, and --template or --system {prompt}, once each"
    require(once, places)
    before, prompt, behind = task.template.partition("{prompt}")
    apart = not prompt or (not before or before[-1].isspace()) and (not behind or not behind[0].isalnum())
    require(apart, "--template: {prompt} must stand at its beginning or behind white space, and no word may touch it")
    return task


def infer_kind(answers):
    """The answer kind of a user's rows, from the narrowest that fits all answers: numbers, option letters, yes and no
    and the like, labels (words or phrases, few of them for many rows), or free text.

    Errors: UserError if most answers are numbers and some are none, such as "NaN".
    """
    others = [answer for answer in answers if canonical_number(answer) is None]
    if not others:
        return "number"
    count = f"{len(answers) - len(others)} of {len(answers)} answers are numbers, {others[0]!r} is none"
    require(len(others) >= len(answers) / 2, f"{count}: mend the row, or give --kind text")
    if all(re.fullmatch("[A-Z]", answer) for answer in answers):
        return "choice"
    if all(answer.lower() in ("yes", "no", "true", "false", "valid", "invalid") for answer in answers):
        return "boolean"
    different = len(set(answers))
    return "label" if 1 < different <= len(answers) // ROWS_PER_LABEL else "text"


def read_rows(path):
    """Rows `{"id", "question", "answer"}`, perhaps with "references", of a prepared JSONL file; a missing id becomes
    the line's number.

    Errors: UserError that names the file, and the line that is no row.
    """
    records = read_jsonl(path)
    rows = rows_of(records, path)
    for row, record in zip(rows, records, strict=True):
        if "references" in record:
            row["references"] = record["references"]
    return rows
