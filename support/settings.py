"""Settings and flags: one dataclass per purpose, whose fields become the flags of the scripts that use it.

Works without torch, so that `--help` and a typo answer at once.
"""

import argparse
import difflib
import inspect
import math
import os
import re
import sys
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType

from support import STOPPED, end_of_work
from support.files import ROOT, UserError, require
from support.own import OWN_FLAGS, OwnRows, beside, columns_into_key, is_own
from support.ranks import be_silent, rank, says_errors
from support.tasks import ANSWER_SPACES, GROUPS, KINDS, TASKS

# --- Generation and search: the defaults are the paper's -----------------------------------------------------


def flag(default, text, *aliases):
    """A field of a dataclass that is a flag: its default, its help, other names for it."""
    return field(default=default, metadata={"help": text, "aliases": list(aliases)})


def as_flag(name):
    return f"--{name.replace('_', '-')}"


def require_known(name, value):
    """Errors: UserError if the value is none that this flag may have."""
    known = KNOWN_VALUES[name]
    shown = ", ".join(one for one in known if one)
    require(value in known, f"{as_flag(name)} must be one of {shown}, not {value!r}")


@dataclass
class GenerationSettings:
    """What generation needs, in the search and in evaluation."""

    GROUP = "generation"  # in --help
    max_new_tokens: int = flag(1024, "longest reasoning, in tokens")
    batch_size: int = flag(0, "rows generated at once; 0: as many as fit; halved when CUDA memory runs out")

    def __post_init__(self):
        require(self.max_new_tokens >= 1, "--max-new-tokens must be at least 1")
        require(self.batch_size >= 0, "--batch-size must not be negative")

    @staticmethod
    def answer_tokens(task):
        """How many tokens an answer behind the extractor may take."""
        limits = {"number": 12, "choice": 8, "boolean": 8, "label": 24, "text": 128, "generation": 0}
        return limits[task.kind]


# What the paper does otherwise than is done here by default, and the released scripts otherwise than the paper says:
# values of flags, not another code path.
PRESETS = {
    "default": {},
    "paper": {"answer_space": "vocabulary"},
    "released": {
        "answer_space": "vocabulary",
        "top_k": 40,
        "intersections": 6,
        "objective": "error",
        "ties": "last",
        "force_sentence_end": True,
        "choose_on": "train",
    },
    "best": {"positions": "all"},  # docs/log.md has what it is measured against
    "published": {},  # of the text methods: `PUBLISHED` has their values
}
AT_LEAST_ONE = (
    "train_rows",
    "top_k",
    "sampled_rows",
    "intersections",
    "min_candidates",
    "shortlist_size",
    "max_prompt_tokens",
)
KNOWN_VALUES = {  # of flags; an empty one leaves it to the task
    "preset": tuple(PRESETS),
    "shortlist": ("gradient", "random", "likeliest", "all"),
    "fluency": ("nll", "perplexity"),
    "objective": ("loss", "error"),
    "positions": ("one", "all"),
    "ties": ("first", "last"),
    "choose_on": ("dev", "train"),
    "kind": ("", *KINDS),
    "answer_space": ("", *ANSWER_SPACES),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "device_map": ("", "auto"),
    "answer_turn": ("continue", "prefill", "ask"),
    "split": ("dev", "test"),
}


@dataclass
class SearchSettings(GenerationSettings):
    """The method's settings (Sec. 5.1; where the paper is silent, the released configuration)."""

    GROUP = "the search"
    preset: str = flag(
        "default",
        "paper: extractor and answer space of the paper; released: all that the released scripts do; best: all "
        "positions at once; published: a text method's settings in its own publication",
    )
    steps: int = flag(105, "T: positions visited")
    train_rows: int = flag(50, "training rows, drawn by the seed")
    top_k: int = flag(10, "k: a proposal is among the k likeliest allowed next tokens of every sampled row")
    sampled_rows: int = flag(5, "q: rows whose top-k are intersected")
    intersections: int = flag(1, "intersections whose union is proposed")
    min_candidates: int = flag(6, "k grows by 2 until so many proposals are found")
    word_starts: bool = flag(False, "propose what begins a word, or is the likeliest token of all; no piece of a word")
    shortlist: str = flag(
        "gradient",
        "how proposals are shortlisted; likeliest: without a gradient; all: no shortlist",
    )
    shortlist_size: int = flag(3, "mu: proposals tried for real in each step", "--mu")
    gradient_without_reasoning: bool = flag(False, "take the gradient over question, prompt and extractor only")
    fluency_weight: float = flag(0.2, "lambda: weight of the prompt's fluency term in the loss", "--lambda")
    fluency: str = flag("nll", "the fluency term: mean nll of the prompt, or its exponential")
    loss_temperature: float = flag(0.2, "divides the answer's logits in the loss, or the choices' log-probabilities")
    objective: str = flag("loss", "what selection minimizes; error: error rate + lambda / 10 * fluency")
    positions: str = flag("one", "what a step searches: one position after the other, or all at once")
    ties: str = flag("first", "which of equal objectives is taken; first: the incumbent, then by gradient")
    force_sentence_end: bool = flag(False, "take a shortlisted full stop at once in the prompt's second half")
    choose_on: str = flag("dev", "rows that choose the final prompt among the best of the run")
    max_prompt_tokens: int = flag(64, "a prompt stops growing at this length")
    gradient_batch_size: int = flag(0, "rows in one forward and backward pass; 0: by the model's size")
    audit_every: int = flag(0, "every N steps spend some more generations to see what the gradient is worth; 0: never")
    seed: int = flag(0, "draws the training rows and the sampled rows of each step")

    @property
    def tries_per_step(self):
        """How many prompts a step scores, about: without a shortlist there are as many as candidates."""
        return self.min_candidates if self.shortlist == "all" else self.shortlist_size

    @property
    def audited_prompts(self):
        """How many prompts all audits score, about: in each a random shortlist, and the incumbent again."""
        return (self.shortlist_size + 1) * (self.steps // self.audit_every if self.audit_every else 0)

    @property
    def takes_gradient(self):
        """Whether a step needs a gradient."""
        return self.shortlist == "gradient"

    @property
    def beyond_paper(self):
        """The settings, as words, whose steps beyond_paper.py takes; "" where none does."""
        found = [f"audit_every {self.audit_every}"] if self.audit_every else []
        return ", ".join(found + (["positions all"] if self.positions == "all" else []))

    def __post_init__(self):
        super().__post_init__()
        for name in AT_LEAST_ONE:
            require(getattr(self, name) >= 1, f"{as_flag(name)} must be at least 1")
        for name in ("gradient_batch_size", "audit_every"):
            require(getattr(self, name) >= 0, f"{as_flag(name)} must not be negative")
        require(self.steps >= 0, "--steps must not be negative")
        require(0 <= self.fluency_weight < math.inf, "--lambda must be a number not below 0")
        require(0 < self.loss_temperature < math.inf, "--loss-temperature must be a number above 0")
        for name in KNOWN_VALUES:
            if hasattr(self, name):
                require_known(name, getattr(self, name))
        forced = self.force_sentence_end and self.positions == "all"
        require(not forced, "--force-sentence-end: leave out --positions all, which is --preset best, too")
        every = self.positions == "all" and self.shortlist == "all"
        require(not every, "--positions all with --shortlist all would try hundreds of prompts in a step: choose one")
        first = self.positions == "all" and self.shortlist == "likeliest"  # would be those of the first position
        require(
            not first,
            "--shortlist likeliest compares the proposals of one position: leave out --positions all, or --preset best",
        )


# --- Optimizers that work in text (text_optimizers.py) -------------------------------------------------------------

GREATER = "greater"
TITLES = {
    GREATER: "GReaTer",
    "opro": "OPRO",
    "gpo": "GPO",
    "gpo-sgdm": "GPO-SGDM",
    "ape": "APE",
    "apo": "APO",
    "pe2": "PE2",
    "textgrad": "TextGrad",
    "evoprompt-ga": "EvoPrompt-GA",
    "evoprompt-de": "EvoPrompt-DE",
    "random": "random prompts",
}
GPO = {"rounds": 10, "samples": 8, "optimizer_temperature": 1.0, "exemplars": 3, "shown": 3, "word_schedule": "cosine"}
EVOPROMPT = {"rounds": 9, "beam": 8, "optimizer_temperature": 0.5}
# The settings that a text method has, with the values that make each score about 80 prompts.
TEXT_METHODS = {
    "opro": {
        "rounds": 10,
        "samples": 8,
        "optimizer_temperature": 1.0,
        "exemplars": 3,
        "shown": 20,
        "least_accuracy": 0.0,
    },
    "gpo": GPO | {"retrieval": "relevance", "refinement": "generate"},
    "gpo-sgdm": GPO | {"retrieval": "summary", "refinement": "edit"},
    "ape": {
        "rounds": 4,
        "samples": 4,
        "beam": 4,
        "optimizer_temperature": 0.7,
        "exemplars": 5,
        "groups": 2,
        "guesses": 8,
    },
    "apo": {
        "rounds": 5,
        "beam": 4,
        "optimizer_temperature": 0.7,
        "minibatch": 64,
        "groups": 4,
        "errors": 4,
        "paraphrases": 2,
        "children": 4,
        "bandit": 0,
    },
    "pe2": {"rounds": 5, "samples": 4, "beam": 4, "optimizer_temperature": 0.7, "errors": 2},
    "textgrad": {"rounds": 24, "errors": 3, "optimizer_temperature": 0.0},
    "evoprompt-ga": EVOPROMPT,
    "evoprompt-de": EVOPROMPT,
    "random": {"rounds": 10, "samples": 8, "optimizer_temperature": 1.0},
}
# What --preset published changes in them; of GPO see `resolve`.
PUBLISHED = {
    "opro": {"rounds": 200},
    "ape": {"rounds": 3, "groups": 3, "guesses": 30},
    "apo": {"rounds": 6, "children": 8},
    "pe2": {"rounds": 3},
    "textgrad": {"rounds": 12},
    "evoprompt-ga": {"rounds": 10, "beam": 10},
    "evoprompt-de": {"rounds": 10, "beam": 10},
}
RETRIEVALS = ("relevance", "recency", "importance", "summary", "none")
WORD_SCHEDULES = ("cosine", "linear", "fixed", "none")
REFINEMENTS = ("generate", "edit")


@dataclass
class TextSettings:
    """Settings of the text methods. A flag that is not given has the method's own value; one that the method does not
    have is refused."""

    GROUP = "methods that work in text"
    method: str = flag(GREATER, f"what searches: {', '.join(TITLES)}")
    budget: int = flag(0, "stop at so many scored generations, a training row under a prompt each; 0: no limit")
    init_from: str = flag("", "a prompts.jsonl with prompts to start from")
    optimizer_model: str = flag("", "the model that writes prompts, or its name on a server; empty: --model")
    optimizer_endpoint: str = flag("", "URL of an OpenAI-compatible server that writes prompts, with --optimizer-model")
    optimizer_tokens: int = flag(512, "longest reply of the optimizer, in tokens")
    longest_prompt: int = flag(500, "a longer prompt of a text method is refused, in characters")
    rounds: int | None = flag(None, "rounds of a text method; without it, its own number or as many as --budget allows")
    samples: int | None = flag(None, "prompts asked for in one round; ape, pe2: for each kept prompt")
    beam: int | None = flag(None, "prompts kept from round to round; evoprompt: the population")
    optimizer_temperature: float | None = flag(None, "at which prompts are drawn")
    exemplars: int | None = flag(None, "training rows shown to the optimizer with their answers")
    shown: int | None = flag(None, "earlier prompts shown to the optimizer, opro and gpo")
    least_accuracy: float | None = flag(None, "opro: prompts below this training accuracy are not shown")
    groups: int | None = flag(None, "apo: groups of mistakes for each prompt; ape: sets of rows to guess from")
    guesses: int | None = flag(None, "ape: instructions guessed from one set of rows")
    errors: int | None = flag(None, "mistakes shown at once; textgrad: rows of a batch")
    minibatch: int | None = flag(None, "apo: training rows in which a round looks for mistakes")
    paraphrases: int | None = flag(None, "apo: rewordings of each edited prompt and of its parent")
    children: int | None = flag(None, "apo: new prompts of a kept one that are scored, drawn by the seed")
    bandit: int | None = flag(None, "apo: answers by which UCB chooses among a round's children; 0: all are scored")
    retrieval: str | None = flag(None, f"gpo: which earlier prompts are shown: {', '.join(RETRIEVALS)}")
    refinement: str | None = flag(None, f"gpo: how a new prompt comes from the current one: {', '.join(REFINEMENTS)}")
    word_schedule: str | None = flag(None, f"gpo: how many words may change: {', '.join(WORD_SCHEDULES)}")

    def check_text_settings(self):
        """Errors: UserError for an unknown method or value, or a setting that the method does not have."""
        require(self.method in TITLES, f"--method must be one of {', '.join(TITLES)}, not {self.method!r}")
        require(self.budget >= 0, "--budget must not be negative")
        for name in ("optimizer_tokens", "longest_prompt"):
            require(getattr(self, name) >= 1, f"{as_flag(name)} must be at least 1")
        for name in sorted({name for own in TEXT_METHODS.values() for name in own}):
            value = getattr(self, name)
            if value is None:
                continue
            require(name in self.own_settings, f"{as_flag(name)}: --method {self.method} has no such setting")
            if isinstance(value, int):
                least = 0 if name in ("paraphrases", "exemplars", "bandit") else 1
                require(value >= least, f"{as_flag(name)} must be at least {least}")
        known = {"retrieval": RETRIEVALS, "refinement": REFINEMENTS, "word_schedule": WORD_SCHEDULES}
        for name, values in known.items():
            value = getattr(self, name)
            fits = value is None or value in values
            require(fits, f"{as_flag(name)} must be one of {', '.join(values)}, not {value!r}")
        for name in ("optimizer_temperature", "least_accuracy"):
            require((getattr(self, name) or 0) >= 0, f"{as_flag(name)} must not be negative")
        asks = self.method not in (GREATER, "random") or not (self.optimizer_model or self.optimizer_endpoint)
        require(asks, f"--method {self.method} asks no optimizer: leave out --optimizer-model and --optimizer-endpoint")
        named = self.optimizer_model or not self.optimizer_endpoint
        require(named, "--optimizer-endpoint needs --optimizer-model, the model's name on the server")

    @property
    def own_settings(self):
        """{name: value} of the settings that the method has, as its preset has them."""
        published = PUBLISHED.get(self.method, {}) if self.preset == "published" else {}
        if self.preset == "published" and self.method in ("gpo", "gpo-sgdm"):  # three epochs of batches of 8 rows
            published = {"rounds": 3 * max(1, int(self.train_rows / 8 + 0.5))}
        return TEXT_METHODS.get(self.method, {}) | published

    def resolve(self):
        """Give each setting of the method that was not given its value; `rounds` only where no budget ends the search.
        Errors: as `check_text_settings`."""
        self.check_text_settings()
        for name, value in self.own_settings.items():
            if getattr(self, name) is None and not (name == "rounds" and self.budget):
                setattr(self, name, value)


# --- Tasks, models, servers ------------------------------------------------------------------------------------


@dataclass
class TaskFlags:
    """Flags of every script that reads a task's rows."""

    GROUP = "the task and its rows"
    task: str = flag(
        "demo",
        "a task of the table, such as gsm8k or bbh/navigate; or your own rows: a .jsonl, .json, .csv or .tsv file, "
        "or hub:NAME, a data set on the hub",
    )
    extractor: str = flag(
        "", "the text behind which the answer is read; empty: the task's own, or one made of your rows' labels"
    )
    kind: str = flag("", "what answers are; empty: the task's own, or inferred from your rows")
    template: str = flag(
        "",
        "what the user says, with {question} and {prompt} in their places; \\n: a new line; may name columns of your "
        "rows: '{subject}'; empty: the task's own",
    )
    system: str = flag("", "a system message, which may hold {prompt} instead of the template; empty: the task's own")
    answer_space: str = flag(
        "",
        "choices (the answer is the likeliest of the possible ones) or vocabulary (it is what the model writes, as in "
        "the paper); empty: choices where all possible answers are known",
    )
    data_dir: str = flag("data", "where stage 01 writes the prepared tasks")
    source: str = flag("", "folder of the data files as their authors publish them; empty: the hub")
    question_key: str = flag(
        OwnRows.question_key, "your rows: the column of the question, or a text of several: '{subject}: {body}'"
    )
    answer_key: str = flag(OwnRows.answer_key, "your rows: the column of the right answer")
    train_file: str = flag(OwnRows.train_file, "your rows: a file of its own for the training rows")
    dev_file: str = flag(OwnRows.dev_file, "your rows: a file of its own for the dev rows")
    test_file: str = flag(OwnRows.test_file, "your rows: a file of its own for the test rows")
    dev_fraction: float = flag(OwnRows.dev_fraction, "your rows: share of the dev rows")
    test_fraction: float = flag(OwnRows.test_fraction, "your rows: share of the test rows; the rest is to train")
    split_seed: int = flag(
        OwnRows.split_seed, "your rows: shuffled by it, each answer shared alike; -1: split in the file's order"
    )

    @property
    def own(self):
        """Where the user's own rows are and how they are split."""
        return OwnRows(**{f.name: getattr(self, f.name) for f in fields(OwnRows)})

    @property
    def own_rows(self):
        """The file or data set of the user's own rows, "" if the task is a known one."""
        return self.task if is_own(self.task) or self.own.files else ""

    def find_own_rows(self):
        """Put the file for the name of one that lies beside, and a template's columns into the question's key.

        Errors: UserError for flags of own rows where the task is a known one.
        """
        self.task = self.task if self.task in TASKS else beside(self.task)
        for name in ("template", "system"):
            setattr(self, name, getattr(self, name).replace("\\n", "\n"))  # as a shell passes it on
        self.question_key = self.question_key.replace("\\n", "\n")
        key, self.template = columns_into_key(self.template)
        asked = not key or self.question_key in (key, OwnRows.question_key)
        require(asked, "--question-key and columns in --template: give one of them")
        self.question_key = key or self.question_key
        idle = [as_flag(name) for name in OWN_FLAGS if getattr(self, name) != getattr(OwnRows, name)]
        known = self.task in TASKS or self.task in GROUPS  # another name is refused as such
        require(
            not (known and idle and not self.own_rows),
            f"{', '.join(idle)}: only for your own rows, not for --task {self.task}",
        )

    def used(self):
        """{name: value} of all flags of the script, without those for own rows where the task is a known one."""
        idle = () if self.own_rows else OWN_FLAGS
        return {name: value for name, value in asdict(self).items() if name not in idle}


@dataclass
class ModelFlags:
    """Flags of every script that loads a model."""

    GROUP = "the model"
    model: str = flag("meta-llama/Meta-Llama-3-8B-Instruct", "a hub name or a local folder")
    device: str = flag("auto", "auto (cuda where there is one, else cpu), cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "auto: bfloat16 on CUDA, float32 on the CPU")
    device_map: str = flag(
        "", "auto: spread a model that is larger than one device over all of them (needs the package accelerate)"
    )

    def model_path(self):
        """The model's name; the demo's own folders wherever the script is called from.

        Errors: UserError for an unknown device or dtype or a folder without a model, as far as that shows without
        torch.
        """
        require_known("dtype", self.dtype)
        require_known("device_map", self.device_map)
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", self.device)
        require(known, f"--device must be auto, cpu, cuda, cuda:N or mps, not {self.device!r}")
        of_the_demo = self.model in ("demo/model", "demo/small")
        path = ROOT / self.model if of_the_demo else Path(self.model)
        looks_local = path.is_absolute() or self.model.startswith((".", "~")) or self.model.count("/") > 1
        if looks_local or path.exists():
            require((path / "config.json").is_file(), f"--model {self.model}: {path} holds no model (no config.json)")
            return str(path)
        return self.model


@dataclass
class ServerFlags:
    """Flags of every script that can ask a server instead of a model loaded here."""

    GROUP = "a server instead of a model loaded here"
    concurrency: int = flag(32, "requests under way at once")
    request_timeout: float = flag(600.0, "seconds until a request counts as lost and is sent again")
    tries: int = flag(6, "how often a request is sent before the script ends")
    key_variable: str = flag("OPENAI_API_KEY", "the environment variable that holds its key, if it wants one")
    answer_turn: str = flag(
        "continue",
        "how the answer is asked for: continue (fields that make vLLM and SGLang go on behind the extractor), "
        "prefill (for servers that go on by themselves), ask (the extractor as a turn of its own)",
    )

    def check_server_flags(self):
        for name in ("concurrency", "tries"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        require(0 < self.request_timeout < math.inf, "--request-timeout must be a number above 0")
        require_known("answer_turn", self.answer_turn)


def check_split_and_counts(flags, **least):
    """Errors: UserError if --split is neither dev nor test, or if one of these flags is below its least number."""
    require_known("split", flags.split)
    for name, number in least.items():
        require(getattr(flags, name) >= number, f"--{name.replace('_', '-')} must be at least {number}")


# --- The command line --------------------------------------------------------------------------------------------


def parse_flags(flags_class, text, more_defaults=None, given=None):
    """The dataclass `flags_class` filled from the command line, or from the words `given`.

    text: the script's docstring: its first line and its examples are shown by --help. The defaults of the fields are
    replaced by those of the task, then of the preset, then by `more_defaults(early)`, a dict, where `early` holds the
    flags --task and --run-dir as far as they are given. Unknown flags and values of the wrong type end the script with
    one line and exit code 2.
    """
    early = early_flags()
    names = {f.name for f in fields(flags_class)}
    of_the_run = more_defaults(early) if more_defaults else {}
    defaults = {}
    if "task" in names:
        task = TASKS.get(early.task or of_the_run.get("task", "demo"))
        defaults |= task.defaults if task else {}
        if early.preset in ("paper", "released"):
            defaults["extractor"] = task.paper_extractor if task else ""
    defaults |= PRESETS.get(early.preset, {})
    defaults |= of_the_run
    parser = make_parser(flags_class, text, {name: value for name, value in defaults.items() if name in names})
    values, unknown = parser.parse_known_args(dashed(sys.argv[1:] if given is None else given))
    if unknown:
        parser.error(unknown_words(unknown, parser))
    flags = flags_class(**vars(values))
    if "task" in names:
        flags.find_own_rows()
    return flags


def dashed(words):
    """The words of a command line; a flag may be written with underscores, too."""
    flags = [word.partition("=")[0] if word.startswith("--") else "" for word in words]
    return [flag.replace("_", "-") + word[len(flag) :] for flag, word in zip(flags, words)]


def unknown_words(words, parser):
    """A line on what the parser does not know: the first flag, with the nearest known one, or the first other word."""
    name = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if name is None:
        return f"{words[0]!r} belongs to no flag: put a text of several words in quotation marks"
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"no flag {name}" + (f": did you mean {near[0]}?" if near else "; --help lists them")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, like every other error of the scripts."""

    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


class Help(argparse.RawDescriptionHelpFormatter):
    """Help in 100 columns, a flag's values beside it."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=100)


def make_parser(flags_class, text, defaults):
    """The parser of a dataclass: a group of flags for each class in which fields are, the script's own first."""
    first, *lines = text.splitlines() or [""]
    examples = [line for line in lines if line.startswith("    python ")]
    parser = Parser(
        description=first,
        epilog="\n".join(["examples:", *examples]) if examples else None,
        usage="python %(prog)s [--FLAG VALUE ...]",
        formatter_class=Help,
        allow_abbrev=False,
    )
    kinds = typing.get_type_hints(flags_class)
    by_name = {f.name: f for f in fields(flags_class)}
    for group_class in grouped(flags_class):
        group = parser.add_argument_group(vars(group_class).get("GROUP", "this stage"))
        for name in inspect.get_annotations(group_class):
            if name in by_name:  # no constant of the class
                add_flag(group, by_name.pop(name), kinds[name], defaults)
    return parser


def grouped(flags_class):
    """The classes that fields come from, in the order of --help: what is searched before how."""
    first, *bases = [one for one in inspect.getmro(flags_class) if inspect.get_annotations(one)]
    return [first, *reversed(bases)]


def add_flag(group, field_, kind, defaults):
    """Add a field's flag to a group of a parser. kind: its type."""
    default = field_.default if field_.default_factory is MISSING else field_.default_factory()
    default = defaults.get(field_.name, default)
    known = [value for value in KNOWN_VALUES.get(field_.name, ()) if value]
    kind = next((part for part in typing.get_args(kind) if part is not NoneType), kind) if is_optional(kind) else kind
    options = {"default": default, "help": help_of(field_, default), "dest": field_.name}
    if kind is bool:
        options |= {"nargs": "?", "const": True, "type": yes_or_no, "metavar": "yes|no"}
    elif typing.get_origin(kind) is list:
        options |= {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": field_.name.upper()}
        options["action"] = field_.metadata.get("action", "store")
    else:
        options["type"] = kind if kind in (int, float) else str
        options["metavar"] = "|".join(known) or {int: "N", float: "X"}.get(kind, field_.name.upper())
    group.add_argument(as_flag(field_.name), *field_.metadata.get("aliases", ()), **options)


def is_optional(kind):
    """Whether a type is another one or None."""
    return NoneType in typing.get_args(kind)


def yes_or_no(text):
    known = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"yes or no, not {text!r}")
    return known[text.lower()]


def help_of(field_, default):
    """A flag's help with its default, where that says something."""
    text = field_.metadata.get("help", "")
    explained = default == 0 and re.search(r"\b0:", text)
    says = default not in ("", None, False) and default != [] and not explained
    shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    return (text + (f" (default: {shown})" if says else "")).replace("%", "%%")


def early_flags():
    """The flags that the defaults of others depend on, read before these: task, run_dir, preset. The real parser is
    the one that says what is wrong or missing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", default="", nargs="?", const="")
    parser.add_argument("--run-dir", "--run_dir", default="", nargs="?", const="")
    parser.add_argument("--preset", default="default", nargs="?", const="")
    known, _ = parser.parse_known_args()
    return known


def calm_threads():
    """Let threads that wait for each other spin for a bounded time only, unless the user's environment says how.

    The threads of a matrix product wait for the slowest of them: they spin first, then they sleep. GNU OpenMP's own
    bound of 300000 rounds is fast on an idle machine; but beside other work the slowest thread waits for the core on
    which another one spins, and everything all but stops. 3000 rounds do well on both (benchmarks/README.md). The
    OpenMP library reads the variable when it is loaded, so this must run before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def print_any_text():
    """Let what the terminal or file cannot show, such as a prompt on a Windows code page, be printed as \\u escapes: it
    must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not None, as without a console, and not another program's stand-in
            stream.reconfigure(errors="backslashreplace")


def run_script(main):
    """Run a script's main(): a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    Any other error is a defect of ours, or of a library: one line that says so, and exit code 1. The environment
    variable GREATER_DEBUG=1 shows where an error came from. main() is where a script may import torch for the first
    time.
    """
    calm_threads()
    print_any_text()
    be_silent()
    try:
        main()
    except KeyboardInterrupt:  # of a script that is no stage: those end as support/__init__.py says
        print(f"\n{STOPPED}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        stream = sys.stderr if rank() == 0 else sys.__stderr__
        if os.environ.get("GREATER_DEBUG"):
            sys.stderr = stream
            raise
        line, code = as_line(error)
        if says_errors():
            print(f"error: {line}", file=stream)
        sys.exit(code)
    finally:
        end_of_work()


def as_line(error):
    """(what is wrong in one line, the exit code): 2 for what the user can mend, 1 for what nobody thought of."""
    text = " ".join(str(error).splitlines())  # names of files and texts of data may have line breaks
    if isinstance(error, (UserError, OSError)):  # OSError: a folder that cannot be written, a full disk
        return text, 2
    if "embedded null byte" in text:
        return "a name of a file or folder has a zero byte in it", 2
    # torch's own class is known by its name: torch need not be there. On some devices it has none.
    full = "can't allocate memory" in text or "backend out of memory" in text
    if full or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: lower --batch-size or --max-new-tokens, or use a smaller model", 2
    return f"unexpected {type(error).__name__}: {text:.300} (GREATER_DEBUG=1 shows where)", 1
