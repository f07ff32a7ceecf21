"""Settings and flags: one dataclass per purpose, whose fields become the flags of the scripts that use it.

Works without torch, so that `--help` and a typo answer at once.
"""

import argparse
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from support.files import ROOT, UserError, require
from support.tasks import TASKS

# --- Generation and search: the defaults are the paper's -----------------------------------------------------


def flag(default, text, *aliases):
    """A field of a dataclass that is a flag: its default, its help, other names for it."""
    return field(default=default, metadata={"help": text, "aliases": list(aliases)})


def as_flag(name):
    return f"--{name.replace('_', '-')}"


@dataclass
class GenerationSettings:
    """What generation needs, in the search and in evaluation."""

    max_new_tokens: int = flag(1024, "longest reasoning, in tokens")
    batch_size: int = flag(0, "rows generated at once; 0: as many as fit; halved when CUDA memory runs out")

    def __post_init__(self):
        require(self.max_new_tokens >= 1, "--max-new-tokens must be at least 1")
        require(self.batch_size >= 0, "--batch-size must not be negative")

    @staticmethod
    def answer_tokens(task):
        """How many tokens an answer behind the extractor may take."""
        limits = {"number": 12, "choice": 8, "boolean": 8, "label": 24, "text": 128}
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
KNOWN_VALUES = {
    "preset": tuple(PRESETS),
    "shortlist": ("gradient", "random", "all"),
    "fluency": ("nll", "perplexity"),
    "objective": ("loss", "error"),
    "ties": ("first", "last"),
    "choose_on": ("dev", "train"),
}


@dataclass
class SearchSettings(GenerationSettings):
    """The method's settings (Sec. 5.1; where the paper is silent, the released configuration)."""

    preset: str = flag(
        "default", "default; paper: extractor and answer space of the paper; released: all that the released scripts do"
    )
    steps: int = flag(105, "T: positions visited")
    train_rows: int = flag(50, "training rows, drawn by the seed")
    top_k: int = flag(10, "k: a proposal is among the k likeliest allowed next tokens of every sampled row")
    sampled_rows: int = flag(5, "q: rows whose top-k are intersected")
    intersections: int = flag(1, "intersections whose union is proposed")
    min_candidates: int = flag(6, "k grows by 2 until so many proposals are found")
    shortlist: str = flag("gradient", "how proposals are shortlisted: gradient, random, or all (no shortlist)")
    shortlist_size: int = flag(3, "mu: proposals tried for real at each position", "--mu")
    gradient_without_reasoning: bool = flag(False, "take the gradient over question, prompt and extractor only")
    fluency_weight: float = flag(0.2, "lambda: weight of the prompt's fluency term in the loss", "--lambda")
    fluency: str = flag("nll", "the fluency term: mean nll of the prompt, or its exponential, perplexity")
    loss_temperature: float = flag(0.2, "divides the answer's logits in the loss, or the choices' log-probabilities")
    objective: str = flag("loss", "what selection minimizes: loss, or error (error rate + lambda / 10 * fluency)")
    ties: str = flag("first", "of equal objectives take the first (incumbent, then by gradient) or the last")
    force_sentence_end: bool = flag(False, "take a shortlisted full stop at once in the prompt's second half")
    choose_on: str = flag("dev", "rows that choose the final prompt among the best of the run: dev or train")
    max_prompt_tokens: int = flag(64, "a prompt stops growing at this length")
    gradient_batch_size: int = flag(0, "rows in one forward and backward pass; 0: by the model's size")
    seed: int = flag(0, "draws the training rows and the sampled rows of each step")

    @property
    def tries_per_step(self):
        """How many prompts a step scores, about: without a shortlist there are as many as candidates."""
        return self.min_candidates if self.shortlist == "all" else self.shortlist_size

    def __post_init__(self):
        super().__post_init__()
        for name in AT_LEAST_ONE:
            require(getattr(self, name) >= 1, f"{as_flag(name)} must be at least 1")
        require(self.gradient_batch_size >= 0, "--gradient-batch-size must not be negative")
        require(self.steps >= 0, "--steps must not be negative")
        require(self.fluency_weight >= 0, "--lambda must be a number not below 0")
        require(self.loss_temperature > 0, "--loss-temperature must be above 0")
        for name, known in KNOWN_VALUES.items():
            value = getattr(self, name)
            require(value in known, f"{as_flag(name)} must be one of {', '.join(known)}, not {value!r}")


# --- Tasks, models, servers ------------------------------------------------------------------------------------


@dataclass
class TaskFlags:
    """Flags of every script that reads a task's rows."""

    task: str = flag("demo", "a task of tasks.py, such as gsm8k or bbh/navigate, or your own rows.jsonl")
    extractor: str = flag("", "the text behind which the answer is read; empty: the task's own")
    kind: str = flag("", "number, choice, boolean, label or text; empty: the task's own, or inferred from your rows")
    template: str = flag("", "how question and prompt are joined, ending in ' {prompt}'; empty: the task's own")
    answer_space: str = flag(
        "",
        "choices (the answer is the likeliest of the possible ones) or vocabulary (it is what the model writes, as in "
        "the paper); empty: choices where all possible answers are known",
    )
    data_dir: str = flag("data", "where stage 01 writes the prepared tasks")
    source: str = flag("", "folder of the data files as their authors publish them; empty: the hub")

    @property
    def own_rows(self):
        """The path of the user's own rows, "" if the task is a known one."""
        return self.task if self.task.endswith(".jsonl") else ""


@dataclass
class ModelFlags:
    """Flags of every script that loads a model."""

    model: str = flag("meta-llama/Meta-Llama-3-8B-Instruct", "a hub name or a local folder")
    device: str = flag("auto", "cpu, cuda or cuda:N")
    dtype: str = flag("auto", "auto (bfloat16 on CUDA, float32 on the CPU), float32, bfloat16 or float16")

    def model_path(self):
        """The model's name; the demo's own folders wherever the script is called from.

        Errors: UserError for an unknown dtype or a folder without a model, as far as that shows without torch.
        """
        require(self.dtype in ("auto", "float32", "bfloat16", "float16"), f"--dtype {self.dtype!r} is unknown")
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

    concurrency: int = flag(32, "server: requests under way at once")
    request_timeout: float = flag(600.0, "server: seconds until a request counts as lost and is sent again")
    tries: int = flag(6, "server: how often a request is sent before the script ends")
    key_variable: str = flag("OPENAI_API_KEY", "server: the environment variable that holds its key, if it wants one")
    answer_turn: str = flag(
        "continue",
        "server: how the answer is asked for: continue (fields that make vLLM and SGLang go on behind the extractor), "
        "prefill (for servers that go on by themselves), ask (the extractor as a turn of its own)",
    )

    def check_server_flags(self):
        for name in ("concurrency", "tries"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1")
        require(self.request_timeout > 0, "--request-timeout must be above 0")
        known = ("continue", "prefill", "ask")
        require(self.answer_turn in known, f"--answer-turn must be one of {', '.join(known)}, not {self.answer_turn!r}")


def check_split_and_counts(flags, **least):
    """Errors: UserError if --split is neither dev nor test, or if one of these flags is below its least number."""
    require(flags.split in ("dev", "test"), f"--split must be dev or test, not {flags.split!r}")
    for name, number in least.items():
        require(getattr(flags, name) >= number, f"--{name.replace('_', '-')} must be at least {number}")


# --- The command line --------------------------------------------------------------------------------------------


def parse_flags(flags_class, description, more_defaults=None):
    """The dataclass `flags_class` filled from the command line.

    The defaults of its fields are replaced by those of the task, then of the preset, then by `more_defaults(early)`,
    a dict, where `early` holds the flags --task and --run-dir as far as they are given. Unknown flags and values of
    the wrong type end the script with argparse's message and exit code 2.
    """
    from transformers import HfArgumentParser  # imports no torch

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
    parser = HfArgumentParser(flags_class, description=description, allow_abbrev=False)
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in names})
    return flags_class(**vars(parser.parse_args()))


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
    try:
        main()
    except KeyboardInterrupt:  # of a script that is no stage: those end as support/__init__.py says
        print("\nstopped; what was finished is on disk, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("GREATER_DEBUG"):
            raise
        line, code = as_line(error)
        print(f"error: {line}", file=sys.stderr)
        sys.exit(code)


def as_line(error):
    """(what is wrong in one line, the exit code): 2 for what the user can mend, 1 for what nobody thought of."""
    text = " ".join(str(error).splitlines())  # names of files and texts of data may have line breaks
    if isinstance(error, (UserError, OSError)):  # OSError: a folder that cannot be written, a full disk
        return text, 2
    # torch's own class is known by its name: torch need not be there.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return "out of memory: lower --batch-size or --max-new-tokens, or use a smaller model", 2
    return f"unexpected {type(error).__name__}: {text:.300} (GREATER_DEBUG=1 shows where)", 1
