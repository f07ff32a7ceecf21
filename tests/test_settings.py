"""Settings: ranges, presets, the paper's defaults, the command line, threads."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
from conftest import ROOT, own_task, settings, text_settings

from support.files import UserError
from support.settings import (
    PRESETS,
    PUBLISHED,
    TEXT_METHODS,
    TITLES,
    GenerationSettings,
    SearchSettings,
    TaskFlags,
    TextSettings,
    parse_flags,
    run_script,
)
from support.tasks import TASKS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "--steps"),
        ({"shortlist_size": 0}, "--shortlist-size"),
        ({"loss_temperature": 0.0}, "--loss-temperature"),
        ({"fluency_weight": -1.0}, "--lambda"),
        ({"objective": "err"}, "--objective must be one of loss, error"),
        ({"batch_size": -1}, "--batch-size"),
        ({"preset": "mine"}, "--preset must be one of default, paper, released, best"),
    ],
)
def test_a_setting_out_of_range_names_its_flag(change, message):
    with pytest.raises(UserError, match=message):
        settings(**change)


def test_the_released_preset_is_what_the_scripts_say():
    released = {"top_k": 40, "intersections": 6, "objective": "error", "ties": "last"}
    paper = {"answer_space": "vocabulary"}
    more = {"force_sentence_end": True, "choose_on": "train"}
    assert PRESETS["paper"] == paper and PRESETS["released"] == paper | released | more


@pytest.mark.parametrize(
    ("kind", "tokens"), [("number", 12), ("choice", 8), ("boolean", 8), ("label", 24), ("text", 128)]
)
def test_an_answer_may_take_as_many_tokens_as_its_kind_needs(kind, tokens):
    assert settings().answer_tokens(own_task(kind, choices=("A", "B"))) == tokens


def test_the_defaults_are_the_paper_s():
    s = SearchSettings()
    assert (s.min_candidates, s.max_prompt_tokens) == (6, 64)
    assert own_task().template == "{question}\nUse {prompt}"
    assert (s.steps, s.top_k, s.intersections, s.sampled_rows, s.shortlist_size) == (105, 10, 1, 5, 3)
    assert (s.fluency_weight, s.loss_temperature, s.train_rows, s.max_new_tokens) == (0.2, 0.2, 50, 1024)
    assert (s.objective, s.choose_on, s.ties, s.fluency) == ("loss", "dev", "first", "nll")
    assert set().union(*PRESETS.values()) <= set(vars(s)) | {"answer_space"}


# --- Text methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("oppro", {}, "--method must be one of greater, opro"),
        ("greater", {"beam": 4}, "--beam: --method greater has no such setting"),
        ("opro", {"beam": 4}, "--beam: --method opro has no such setting"),
        ("opro", {"samples": 0}, "--samples must be at least 1"),
        ("gpo", {"retrieval": "best"}, "--retrieval must be one of relevance, recency"),
        ("gpo", {"optimizer_temperature": -1.0}, "--optimizer-temperature must not be negative"),
        ("opro", {"budget": -1}, "--budget must not be negative"),
        ("opro", {"longest_prompt": 0}, "--longest-prompt must be at least 1"),
        ("opro", {"optimizer_endpoint": "http://localhost:1/v1"}, "needs --optimizer-model"),
        ("random", {"optimizer_model": "m"}, "--method random asks no optimizer"),
        ("greater", {"optimizer_model": "m"}, "--method greater asks no optimizer"),
    ],
)
def test_what_a_method_does_not_have_or_cannot_be_is_refused_with_its_flag(method, change, message):
    with pytest.raises(UserError, match=message):
        text_settings(method, **change)


def test_settings_that_are_not_given_are_the_method_s_own_and_those_of_others_stay_none():
    opro = text_settings("opro", exemplars=0)
    assert (opro.rounds, opro.samples, opro.shown, opro.exemplars, opro.optimizer_temperature) == (10, 8, 20, 0, 1.0)
    assert opro.beam is None and opro.errors is None
    assert text_settings("opro", preset="published").rounds == 200
    assert text_settings("opro", preset="published", rounds=3).rounds == 3
    assert text_settings("opro", budget=500).rounds is None  # the budget ends it
    assert text_settings("opro", budget=500, rounds=3).rounds == 3


def test_every_method_has_a_title_and_presets_change_only_settings_it_has():
    names = {f.name for f in fields(TextSettings)}
    assert TITLES.keys() == {"greater", *TEXT_METHODS}
    for method, own in TEXT_METHODS.items():
        assert own.keys() <= names and PUBLISHED.get(method, {}).keys() <= own.keys()


# --- The command line ----------------------------------------------------------------------------------


@dataclass
class Flags(SearchSettings, TaskFlags):
    """Such as those of a script that searches."""


@pytest.mark.parametrize(
    ("words", "of_the_run", "steps", "top_k", "task"),
    [
        ("", {}, 20, 10, "demo"),  # the demo's own default of steps
        ("--task gsm8k", {}, 105, 10, "gsm8k"),
        ("--task gsm8k --preset released", {}, 105, 40, "gsm8k"),
        ("--preset released", {"top_k": 7}, 20, 7, "demo"),
        ("", {"task": "gsm8k"}, 105, 10, "gsm8k"),  # the run's task, and that task's defaults
        ("--task demo", {"task": "gsm8k"}, 20, 10, "demo"),
        ("--top-k 3 --steps 4 --preset released", {"top_k": 7, "steps": 8, "unknown": 1}, 4, 3, "demo"),
    ],
)
def test_a_flag_counts_before_the_run_the_preset_the_task_and_the_paper(
    monkeypatch, words, of_the_run, steps, top_k, task
):
    monkeypatch.setattr(sys, "argv", ["script", *words.split()])
    flags = parse_flags(Flags, "", lambda early: of_the_run)
    assert (flags.steps, flags.top_k, flags.task) == (steps, top_k, task)


@pytest.mark.parametrize(
    ("words", "extractor", "answer_space"),
    [
        ("--task bbh/navigate", "", ""),
        ("--task bbh/navigate --preset paper", TASKS["bbh/navigate"].paper_extractor, "vocabulary"),
        ("--task bbh/navigate --preset released", TASKS["bbh/navigate"].paper_extractor, "vocabulary"),
        ("--task bbh/navigate --preset paper --extractor So --answer-space choices", "So", "choices"),
        ("--task demo --preset paper", "", "vocabulary"),
        ("--task mine.jsonl --preset paper --extractor So", "So", "vocabulary"),
    ],
)
def test_the_paper_s_preset_takes_its_extractor_and_answer_space(monkeypatch, words, extractor, answer_space):
    monkeypatch.setattr(sys, "argv", ["script", *words.split()])
    flags = parse_flags(Flags, "")
    assert (flags.extractor, flags.answer_space) == (extractor, answer_space)


def test_what_gives_more_defaults_sees_the_task_and_the_folder_of_the_run(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["script", "--task", "gsm8k", "--run_dir", "runs/a"])
    with pytest.raises(SystemExit):  # this class has no --run-dir
        parse_flags(Flags, "", lambda early: seen.append((early.task, early.run_dir)) or {})
    assert seen == [("gsm8k", "runs/a")]


def test_a_script_without_tasks_takes_no_task_s_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script"])
    assert parse_flags(GenerationSettings, "").max_new_tokens == 1024


def test_the_same_rows_are_own_rows_for_every_script():
    assert TaskFlags(task="a/mine.jsonl").own_rows == "a/mine.jsonl"
    assert TaskFlags(task="gsm8k").own_rows == ""


# --- Threads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("set_by_the_user", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "3000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_waiting_threads_spin_for_a_bounded_time_unless_the_user_says_how(monkeypatch, set_by_the_user, expected):
    seen = []
    monkeypatch.setattr(os, "environ", dict(set_by_the_user))
    run_script(lambda: seen.append(dict(os.environ)))
    assert seen == [expected]


@pytest.mark.parametrize("script", ["01_prepare_data.py", "02_optimize.py", "03_evaluate.py", "04_transfer.py"])
def test_no_script_loads_torch_before_the_threads_are_told_how_to_wait(script):
    code = (
        "import runpy, sys\n"
        "from support import settings\n"
        "settings.calm_threads = lambda: sys.exit('torch was there' if 'torch' in sys.modules else 'torch was not')\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines() == ["torch was not"]


@pytest.mark.skipif(sys.platform != "linux", reason="the variable is GNU OpenMP's, which torch brings on Linux")
def test_the_setting_reaches_the_threads_of_torch():
    code = "from support.settings import run_script\ndef main():\n    import torch\nrun_script(main)"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"  # OpenMP tells its settings when it is loaded
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "GOMP_SPINCOUNT = '3000'" in done.stderr


# --- Help and messages -----------------------------------------------------------------------------------


SCRIPTS = ("01_prepare_data.py", "02_optimize.py", "03_evaluate.py", "04_transfer.py")


def called(script, *words):
    return subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_each_flag_once_in_dashes_in_groups_with_an_example(script):
    text = called(script, "--help").stdout
    shown = re.findall(r"^  (--[^ ]+)", text, re.M)
    assert len(shown) > 10 and len(set(shown)) == len(shown)
    assert all("_" not in flag for flag in shown) and "(default: )" not in text
    assert re.search(r"^the task and its rows:$|^a server instead", text, re.M)
    assert f"\nexamples:\n    python {script} --" in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_shows_the_values_that_a_flag_may_have_and_its_default_where_there_is_one():
    text = " ".join(called("02_optimize.py", "--help").stdout.split())
    assert "--shortlist gradient|random|likeliest|all how" in text and "--answer-space choices|vocabulary" in text
    assert "--kind number|choice|boolean|label|text|generation what" in text and "--dry-run [yes|no]" in text
    assert "--steps N T: positions visited (default: 20)" in text
    assert "0: all --run-dir" in text  # a default that its text explains is not repeated
    assert "(default: 105)" in " ".join(called("02_optimize.py", "--task", "gsm8k", "--help").stdout.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--trian-rows 5", "no flag --trian-rows: did you mean --train-rows?"),
        ("--train_row=5", "no flag --train-row: did you mean --train-rows?"),
        ("--xyzzy", "no flag --xyzzy; --help lists them"),
        ("--task demo extra", "'extra' belongs to no flag: put a text of several words in quotation marks"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--dry-run maybe", "argument --dry-run: yes or no, not 'maybe'"),
        ("--objective los", "--objective must be one of loss, error, not 'los'"),
        ("--device-map even", "--device-map must be one of auto, not 'even'"),
        ("--device gpu", "--device must be auto, cpu, cuda, cuda:N or mps, not 'gpu'"),
        ("--dtype half", "--dtype must be one of auto, float32, bfloat16, float16, not 'half'"),
        ("--kind words", "--kind must be one of number, choice, boolean, label, text, generation, not 'words'"),
        ("--loss-temperature inf", "--loss-temperature must be a number above 0"),
        ("--lambda nan", "--lambda must be a number not below 0"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(words, message):
    done = called("02_optimize.py", *words.split())
    assert (done.returncode, done.stderr, done.stdout) == (2, f"error: {message}\n", "")


@pytest.mark.parametrize(
    ("words", "steps", "forced"),
    [
        (["--steps=4", "--force_sentence_end"], 4, True),
        (["--steps", "4", "--force-sentence-end", "no", "--preset", "released"], 4, False),
        (["--force-sentence-end", "True"], 20, True),
    ],
)
def test_a_flag_may_be_written_with_underscores_and_a_switch_with_yes_or_no(monkeypatch, words, steps, forced):
    monkeypatch.setattr(sys, "argv", ["script", *words])
    flags = parse_flags(Flags, "")
    assert (flags.steps, flags.force_sentence_end) == (steps, forced)


def test_values_keep_their_underscores(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--extractor", "a_b", "--data_dir=my_data"])
    flags = parse_flags(Flags, "")
    assert (flags.extractor, flags.data_dir) == ("a_b", "my_data")


def test_the_command_line_finds_own_rows_and_makes_a_template_s_columns_the_question(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").touch()
    monkeypatch.setattr(sys, "argv", ["script", "--task", "mine", "--template", r"{subject}\n{body}\nUse {prompt}"])
    flags = parse_flags(Flags, "")
    assert (flags.task, flags.question_key) == ("mine.csv", "{subject}\n{body}")
    assert flags.template == "{question}\nUse {prompt}" and flags.own_rows == "mine.csv"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--question-key", "other"])
    with pytest.raises(UserError, match="give one of them"):
        parse_flags(Flags, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--answer-key", "team"], "--answer-key: only for your own rows, not for --task demo"),
        (["--task", "gsm8k", "--split-seed", "1", "--dev-fraction", "0.1"], "--dev-fraction, --split-seed: only for"),
        (["--template", "{subject} {prompt}"], "--question-key: only for your own rows"),
    ],
)
def test_a_flag_of_own_rows_is_refused_where_the_task_is_a_known_one(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["script", *words])
    with pytest.raises(UserError, match=message):
        parse_flags(Flags, "")


def test_only_a_task_of_own_rows_keeps_the_flags_for_them():
    assert "split_seed" not in TaskFlags("demo").used()
    assert TaskFlags("mine.csv", split_seed=3).used()["split_seed"] == 3
    assert TaskFlags("mine", train_file="a.csv").own_rows == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "two"}, "--positions must be one of"),
        ({"positions": "all", "shortlist": "all"}, "choose one"),
        ({"positions": "all", "shortlist": "likeliest"}, "leave out --positions all"),
        ({"positions": "all", "force_sentence_end": True}, "leave out --positions"),
        ({"audit_every": -1}, "--audit-every must not be negative"),
    ],
)
def test_settings_beyond_the_paper_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SearchSettings(**changes)


def test_a_step_s_tries_and_audits_are_counted():
    assert SearchSettings().tries_per_step == 3 and SearchSettings().beyond_paper == ""
    assert SearchSettings(audit_every=5, steps=104).audited_prompts == 80
    assert "positions all" in SearchSettings(positions="all").beyond_paper
