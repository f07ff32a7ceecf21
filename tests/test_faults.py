"""What goes wrong around a run: kills, damaged files, bad input, several starts at once. Never a silent wrong result.

The long parts run with `python -m pytest -m slow tests/test_faults.py`; a few of each kind always. Where no signal and
no second process is needed, a stage runs inside this one: loading torch anew takes seconds.
"""

import contextlib
import io
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, kept_signals

from support import files
from support.files import UserError, append_jsonl, read_appended, read_jsonl, write_jsonl
from support.settings import run_script

SEARCH = "02_optimize.py --steps 3 --train-rows 6 --eval-rows 12 --finalists 2 --max-new-tokens 24"
RUN = "runs/demo-seed0"
EVALUATE = f"03_evaluate.py --run-dir {RUN} --eval-rows 12 --mistakes 0"
TRANSFER = f"04_transfer.py --runs {RUN} --targets demo/small --eval-rows 6"
REPORT = "03_evaluate.py --report runs"


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


class Done(NamedTuple):
    """How a stage ended."""

    code: int
    out: str
    err: str


def call(command, folder):
    """Run a stage in this process, called from a folder."""
    script, *arguments = shlex.split(command)
    out, err = io.StringIO(), io.StringIO()
    before, argv, code = os.getcwd(), sys.argv, 0
    os.chdir(folder)
    sys.argv = [script, *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), kept_signals():
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        os.chdir(before)
        sys.argv = argv
    return Done(code, out.getvalue(), err.getvalue())


def start(command, folder):
    """Start a stage as a process of its own, offline, on one thread."""
    script, *arguments = shlex.split(command)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    whole = [sys.executable, str(ROOT / script), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(whole, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def end_of(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    return Done(process.returncode, out, err)


def one_line(done):
    """Whether a stage refused in one line, with the exit code of a user's mistake."""
    last = (done.err.strip().splitlines() or [""])[-1]
    return done.code == 2 and "Traceback" not in done.err and bool(re.match(r"error: \S|\w+\.py: error: ", last))


def table(done):
    """What a stage prints at its end, without minutes."""
    return re.sub(r"[\d.]+ minutes", "", done.out[done.out.index("\ninitial ") :])


def without_time(path):
    return [{k: v for k, v in record.items() if k not in files.TIMES} for record in read_jsonl(path)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run, evaluated and transferred, and what each stage prints when it is called again."""
    folder = tmp_path_factory.mktemp("finished")
    printed = {}
    for command in (SEARCH, EVALUATE, TRANSFER, REPORT):
        done = call(command, folder)
        assert done.code == 0, done.err[-2000:]
        printed[command] = call(command, folder)
    return folder, printed


def results_of(folder):
    """All that a run leaves, without times."""
    names = ("steps", "prompts", "results", "predictions")
    return {name: without_time(folder / RUN / f"{name}.jsonl") for name in names}


# --- Records that hold together -------------------------------------------------------------------------------


def some_records(path, count=6):
    for number in range(count):
        append_jsonl(path, {"step": number, "value": number / 7, "seconds": {"a": random.random()}})
    return path


def changed_lines(change):
    def damage(content):
        lines = content.splitlines(keepends=True)
        return b"".join(change(lines))

    return damage


LINES = {
    "twice": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "last twice": lambda lines: [*lines, lines[-1]],
    "lost": lambda lines: [*lines[:1], *lines[2:]],
    "first lost": lambda lines: lines[1:],
    "swapped": lambda lines: [*lines[:1], lines[2], lines[1], *lines[3:]],
    "last two swapped": lambda lines: [*lines[:-2], lines[-1], lines[-2]],
    "reversed": lambda lines: lines[::-1],
    "digit": lambda lines: [re.sub(rb"\d", lambda d: b"%d" % ((int(d[0]) + 1) % 10), lines[0], count=1), *lines[1:]],
    "last digit": lambda lines: [*lines[:-1], re.sub(rb"(\d)(\D*)$", rb"7\g<1>\2", lines[-1])],
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_was_changed_lost_moved_or_doubled_is_named(tmp_path, name):
    path = some_records(tmp_path / "steps.jsonl")
    assert len(read_appended(path)) == 6
    path.write_bytes(changed_lines(LINES[name])(path.read_bytes()))
    with pytest.raises(UserError, match=r"steps.jsonl, line \d: it is not what was written here"):
        read_appended(path)


def test_lines_without_checks_are_read_and_those_written_behind_them_have_some(tmp_path):
    path = tmp_path / "steps.jsonl"
    write_jsonl(path, [{"step": 0}, {"step": 1}])
    append_jsonl(path, {"step": 2})
    append_jsonl(path, {"step": 3})
    assert read_appended(path) == [{"step": number} for number in range(4)]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(UserError, match="line 2"):
        read_appended(path)


def test_checks_leave_out_times_so_that_equal_runs_have_equal_checks(tmp_path):
    for name in ("a", "b"):
        some_records(tmp_path / name)
    assert (tmp_path / "a").read_text() != (tmp_path / "b").read_text()
    checks = [[json.loads(line)[files.CHECK] for line in (tmp_path / name).open()] for name in ("a", "b")]
    assert checks[0] == checks[1] and len(set(checks[0])) == 6


@pytest.mark.parametrize("end", ["\n\n", "\n  \n", "\r\n\n", "  ", "\0\0\0"])
def test_blank_lines_at_the_end_and_what_a_crash_leaves_there_do_not_stay_in_the_middle(tmp_path, end):
    path = some_records(tmp_path / "steps.jsonl", 3)
    path.write_text(path.read_text() + end)
    assert len(read_appended(path)) == 3
    append_jsonl(path, {"step": 3})
    assert [record["step"] for record in read_appended(path)] == [0, 1, 2, 3]


def test_the_last_record_is_found_however_long_it_is(tmp_path):
    path = tmp_path / "steps.jsonl"
    for size in (10, 10**5, 3 * 10**5, 10):
        append_jsonl(path, {"text": "x" * size})
        assert len(files.last_record(path)["text"]) == size
    assert len(read_appended(path)) == 4
    assert files.last_record(tmp_path / "none") is None


def test_a_text_that_no_file_can_hold_is_one_line_and_nothing_is_written(tmp_path):
    for write in (files.append_jsonl, files.write_json):
        with pytest.raises(UserError, match="half of a surrogate pair"):
            write(tmp_path / "f", {"text": "a \ud800"})
    assert not list(tmp_path.iterdir())


def test_json_that_is_nested_too_deep_is_one_line(tmp_path):
    (tmp_path / "f").write_text('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}")
    for read in (files.read_jsonl, files.read_object, files.read_appended):
        with pytest.raises(UserError, match="nested too deep"):
            read(tmp_path / "f")


def test_a_folder_in_which_nothing_was_written_is_gone_and_one_that_was_there_stays(tmp_path):
    with files.alone_in(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    with files.alone_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "f").touch()
    assert (tmp_path / "a" / "b" / "f").exists()
    (tmp_path / "c").mkdir()
    with files.alone_in(tmp_path / "c"):
        pass
    assert (tmp_path / "c").is_dir()


@pytest.mark.parametrize("names", [(), ("run.json",)])
def test_settings_alone_are_nothing_and_a_folder_that_holds_more_stays(tmp_path, names):
    for more in ((), ("optimizer.jsonl",)):
        folder = tmp_path / "a" / "b"
        with contextlib.suppress(KeyError), files.alone_in(folder):
            for name in (*names, *more):
                (folder / name).touch()
            raise KeyError
        assert folder.exists() == bool(more) == (tmp_path / "a").exists()


@pytest.mark.parametrize("method", ["greater", "random"])
def test_a_search_that_fails_at_its_start_leaves_no_folder(tmp_path, monkeypatch, method):
    from support import engine

    def out_of_memory(*work):
        assert (tmp_path / "runs").exists()
        raise MemoryError

    monkeypatch.setattr(engine.Engine, "generate", out_of_memory)
    done = call(f"02_optimize.py --method {method} --train-rows 4 --eval-rows 3", tmp_path)
    assert one_line(done) and "out of memory" in done.err
    monkeypatch.setattr("support.check.check_rows", lambda *work: (_ for _ in ()).throw(UserError("no")))
    assert one_line(call(f"02_optimize.py --method {method} --train-rows 4 --eval-rows 3", tmp_path))
    assert not (tmp_path / "runs").exists()


@linux_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_search_that_is_stopped_before_its_first_step_leaves_no_folder(tmp_path, number):
    process = start("02_optimize.py --train-rows 200 --max-new-tokens 400 --batch-size 1", tmp_path)
    while process.poll() is None and not list(tmp_path.glob("runs/*/.lock")):
        time.sleep(0.01)
    process.send_signal(number)
    done = end_of(process)
    assert good_stop(done, number) and not (tmp_path / "runs").exists(), done


# --- run.json and the steps beside it -----------------------------------------------------------------------------


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_steps_without_run_json_are_refused_and_run_json_is_never_written_over_them(copy):
    steps = (copy / RUN / "steps.jsonl").read_bytes()
    (copy / RUN / "run.json").unlink()
    done = call(SEARCH, copy)
    assert one_line(done) and "has steps.jsonl but no run.json" in done.err
    assert not (copy / RUN / "run.json").exists() and (copy / RUN / "steps.jsonl").read_bytes() == steps


def test_a_run_with_other_settings_is_refused_before_its_record_is_touched(copy):
    before = (copy / RUN / "run.json").read_bytes()
    done = call(f"{SEARCH} --lambda 0.5", copy)
    assert one_line(done) and "other fluency_weight" in done.err
    assert (copy / RUN / "run.json").read_bytes() == before


def test_a_run_that_is_at_work_keeps_its_record_whatever_a_second_start_says(tmp_path):
    first = start(SEARCH, tmp_path)
    run_json = tmp_path / RUN / "run.json"
    while first.poll() is None and not (tmp_path / RUN / ".lock").exists():
        time.sleep(0.02)
    second = call(f"{SEARCH} --lambda 0.5", tmp_path)
    done = end_of(first)
    assert one_line(second) and re.search("another process is at work|other fluency_weight", second.err), second.err
    assert done.code == 0 and json.loads(run_json.read_text())["config"]["fluency_weight"] == 0.2


def test_a_dev_row_that_is_too_long_is_found_before_the_search(tmp_path):
    rows = [{"question": f"tom has {n} pens , finds 3 . how many pens ?", "answer": n + 3} for n in range(1, 17)]
    rows[9]["question"] = "tom has 1 pens . " * 120 + "how many pens ?"  # the second dev row
    write_jsonl(tmp_path / "my.jsonl", rows)
    own = f"--task my.jsonl --extractor 'so the answer is' --template '{{question}} please {{prompt}}' --model {ROOT}"
    flags = "--initial-prompt 'tell the sum .' --steps 2 --train-rows 4 --max-new-tokens 24 --run-dir r --split-seed -1"
    done = call(f"02_optimize.py {own}/demo/model {flags}", tmp_path)
    last = done.err.splitlines()[-1]  # behind warnings of small splits
    assert done.code == 2 and "row line-10 of dev" in last and "--max-new-tokens" in last
    assert not (tmp_path / "r").exists()


# --- Damaged files ---------------------------------------------------------------------------------------------------


def flipped(place):
    """Another digit or letter at a place, as a share of the length."""

    def damage(content):
        for at in range(int(place * (len(content) - 1)), -1, -1):
            if chr(content[at]).isalnum():
                other = b"7" if content[at : at + 1] != b"7" else b"3"
                return content[:at] + other + content[at + 1 :]
        return content

    return damage


DAMAGES = {
    "empty": lambda content: b"",
    "blank": lambda content: b" \n\n",
    "half": lambda content: content[: len(content) // 2],
    "one byte less": lambda content: content[:-1],
    "two bytes less": lambda content: content[:-2],
    "blank lines": lambda content: content + b"\n \n",
    "zeros behind": lambda content: content + b"\0" * 512,
    "only zeros": lambda content: b"\0" * len(content),
    "not utf-8": lambda content: content[:20] + b"\xff\xfe" + content[20:],
    "a list": lambda content: b"[1, 2]\n",
    "a number": lambda content: b"5\n",
    "an empty object": lambda content: b"{}\n",
    "null fields": lambda content: re.sub(rb'": [^,{}\[\]]+', b'": null', content),
    "deep": lambda content: b'{"config": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n",
    "words": lambda content: b"this is no record\n",
    "flip early": flipped(0.1),
    "flip middle": flipped(0.5),
    "flip late": flipped(0.9),
    "flip last": flipped(1.0),
    **{f"lines {name}": changed_lines(change) for name, change in LINES.items() if name != "last digit"},
}
FILES = [f"{RUN}/{name}" for name in ("run.json", "steps.jsonl", "prompts.jsonl", "results.jsonl", "predictions.jsonl")]
FILES += [f"data/demo/{name}" for name in ("task.json", "train.jsonl", "dev.jsonl", "test.jsonl")]
KINDS = [(path, damage) for path in FILES for damage in DAMAGES]
QUICK_KINDS = KINDS[:: len(KINDS) // 60]


def judged(finished, copy, path, damage):
    """How the stages take a damaged file: ["right", "one line"] for stages 2, 3, 4 and the report. Else it fails."""
    whole, printed = finished
    verdicts = []
    for command in (SEARCH, EVALUATE, TRANSFER, REPORT):
        shutil.rmtree(copy)
        shutil.copytree(whole, copy)
        target = copy / path
        target.write_bytes(DAMAGES[damage](target.read_bytes()))
        done = call(command, copy)
        if done.code == 0:
            assert "Traceback" not in done.err
            if command in (SEARCH, EVALUATE):
                assert table(done) == table(printed[command]), (command, path, damage)
                assert command == EVALUATE or results_of(copy) == results_of(whole), (command, path, damage)
            elif command == TRANSFER:
                transfer = "runs/transfer/transfer.jsonl"
                assert (copy / transfer).read_bytes() == (whole / transfer).read_bytes(), (path, damage)
            else:
                assert (copy / "runs/report.md").read_bytes() == (whole / "runs/report.md").read_bytes(), (path, damage)
            verdicts.append("right")
        else:
            assert one_line(done), (command, path, damage, done.err[-600:])
            verdicts.append("one line")
    return verdicts


@pytest.mark.parametrize(("path", "damage"), QUICK_KINDS)
def test_a_damaged_file_gives_the_right_result_or_one_line(finished, copy, path, damage):
    judged(finished, copy, path, damage)


@pytest.mark.slow
def test_all_kinds_of_damaged_files_give_the_right_result_or_one_line(finished, copy):
    assert len(KINDS) >= 180
    counts = dict.fromkeys(("right", "one line"), 0)
    wrong = []
    for path, damage in KINDS:
        try:
            for verdict in judged(finished, copy, path, damage):
                counts[verdict] += 1
        except AssertionError as error:
            wrong.append((path, damage, str(error)[:300]))
    print(f"{len(KINDS)} damaged files, 4 commands each: {counts}, wrong {len(wrong)}")
    assert wrong == []


# --- Bad input --------------------------------------------------------------------------------------------------


class Mistake(NamedTuple):
    """A command that must be refused, and the file, if any, that makes it wrong."""

    command: str
    path: str = ""
    content: bytes = b""


SHORT = f"{SEARCH} --run-dir r"
PROMPT = "03_evaluate.py --prompt 'check this .' --eval-rows 3 --run-dir r"
OWN = "--extractor 'so the answer is' --initial-prompt 'tell the sum .' --train-rows 2"
OWN_MODEL = f"--model {shlex.quote(str(ROOT / 'demo' / 'model'))}"
TO = f"04_transfer.py --runs {RUN} --eval-rows 3 --out r --targets"
UNICODE = "\udcff"  # what Python makes of a byte that is no UTF-8


def wrong_flags():
    counts = {
        SHORT: "steps train-rows top-k sampled-rows intersections min-candidates mu max-prompt-tokens max-new-tokens "
        "batch-size gradient-batch-size finalists eval-rows",
        PROMPT: "max-new-tokens batch-size top eval-rows mistakes concurrency tries",
        f"{TO} demo/small": "max-new-tokens batch-size eval-rows concurrency tries",
    }
    for command, names in counts.items():
        for name in names.split():
            for value in ("-1", "x", "1.5", "''", "nan"):
                yield Mistake(f"{command} --{name} {value}")
    words = {
        SHORT: "preset shortlist fluency objective ties choose-on dtype device kind answer-space",
        PROMPT: "dtype device kind answer-space split answer-turn",
        f"{TO} demo/small": "dtype device split answer-turn",
    }
    for command, names in words.items():
        for name in names.split():
            for value in ("teapot", "' '", UNICODE):
                yield Mistake(f"{command} --{name} {value}")
    for name in ("lambda", "loss-temperature"):
        for value in ("-1", "nan", "inf", "x", "-inf", "''"):
            yield Mistake(f"{SHORT} --{name} {value}")
    for value in ("-1", "nan", "inf", "x", "0"):
        yield Mistake(f"{PROMPT} --request-timeout {value}")
    for value in ("0", "''"):
        yield Mistake(f"{SHORT} --loss-temperature {value}")
    for value in ("''", "' '", "'\t\n'", "rhubarb", UNICODE):
        yield Mistake(f"{SHORT} --initial-prompt {value}")
    for value in ("' '", "rhubarb", UNICODE):
        yield Mistake(f"03_evaluate.py --eval-rows 3 --run-dir r --prompt {value}")
    yield Mistake(f"{SHORT} --no-such-flag 1")
    yield Mistake("03_evaluate.py")
    yield Mistake("04_transfer.py")


def wrong_places():
    for place in ("file/x", "'two\nlines/\0'", "x" * 300, "/proc/x"):
        yield Mistake(f"{SEARCH} --run-dir {place}", "file")
        yield Mistake(f"03_evaluate.py --prompt 'check this .' --eval-rows 3 --run-dir {place}", "file")
        yield Mistake(f"04_transfer.py --runs {RUN} --eval-rows 3 --targets demo/small --out {place}", "file")
        yield Mistake(f"{SHORT} --data-dir {place}", "file")
        yield Mistake(f"01_prepare_data.py --data-dir {place}", "file")
        yield Mistake(f"03_evaluate.py --report {place}", "file")
        yield Mistake(f"03_evaluate.py --run-dir {place} --regrade", "file")
        yield Mistake(f"{SHORT} --task gsm8k --source {place}", "file")
    for name in ("", "' '", "demmo", "none.jsonl", ".jsonl", "a/../b.jsonl", "bbh/nothing", UNICODE):
        yield Mistake(f"01_prepare_data.py --task '{name}' --extractor x" if name else "01_prepare_data.py --task ''")
        yield Mistake(f"{SHORT} --task '{name}'" if name else f"{SHORT} --task ''")
    for model in ("./nothing", "nothing/at/all", "' '", "a/b/c/d", "file", RUN, "..", UNICODE, "x" * 300, "'a b'"):
        yield Mistake(f"{SHORT} --model {model}", "file")
        yield Mistake(f"{PROMPT} --model {model}", "file")
        yield Mistake(f"{TO} {model}", "file")
    for url in ("localhost:9", "ftp://host/v1", "http://", "http://[::1/v1", "http://a b/v1", "http://host:99999/v1"):
        yield Mistake(f"{PROMPT} --tries 1 --endpoint '{url}'")
        yield Mistake(f"{TO} 'm@{url}' --tries 1")
    for target in ("@http://localhost:9/v1", "demo/small demo/small", "m@", "demo/model demo/small ./nothing"):
        yield Mistake(f"{TO} {target}")


ROWS = [
    b"",
    b"\n\n",
    b"[]",
    b"5\n",
    b"{}\n",
    b'{"question": "a"}\n',
    b'{"question": "", "answer": "1"}\n',
    b'{"question": " ", "answer": "1"}\n',
    b'{"question": "a", "answer": null}\n',
    b'{"question": "a", "answer": []}\n',
    b'{"question": ["a"], "answer": "1"}\n',
    b'{"question": "a", "answer": "1"}\n',
    b'{"question": "a", "answer": "1"}\n{"question"\n',
    b'{"id": 1, "question": "a", "answer": "1"}\n' * 8,
    b'{"question": "a\xff", "answer": "1"}\n' * 8,
    b"\0" * 64,
    b'{"question": ' + b"[" * 10**5 + b"\n",
    b'{"question": "\\ud800", "answer": "1"}\n' * 8,
    b"".join(b'{"id": "\\udc%d", "question": "a", "answer": "1"}\n' % n for n in range(10, 26)),
    b'{"question": "a", "answer": %s}\n' % (b"9" * 5000),
]
RECORDS = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"words",
    b'{"config": 5}',
    b'{"config": {}}',
    b'{"config": []}',
    b'{"config": {"task": 5, "model": "m"}, "task": {}}',
    b'{"config": {"task": "demo", "model": 7}, "task": []}',
    b'{"config": {"task": "\\ud800", "model": "\\ud800"}, "task": {}}',
    b'{"config": {"task": "demo", "model": "m"}, "task": null}',
    b'{"config": ' + b"[" * 10**5,
    b"\xff\xfe",
]
STEPS = [
    b"[]\n",
    b"{}\n",
    b"5\n",
    b"words\n{}\n",
    b'{"step": 0}\n',
    b'{"step": "0", "prompt_ids": 5}\n',
    b'{"prompt_ids": [1, 2], "cross_entropy": "x", "error": 0, "nll": 1, "objective": 1, "tokens": 3, "step": 0, '
    b'"position": null, "seconds": {}, "prompt": "x", "best": {"objective": 1, "prompt": "x"}}\n',
    b'{"prompt_ids": ["a"], "cross_entropy": 1, "error": 0, "nll": 1, "objective": 1, "tokens": 3, "step": 0, '
    b'"position": null, "seconds": {}, "prompt": "x", "best": {"objective": 1, "prompt": "x"}}\n',
    b'{"prompt_ids": [1], "cross_entropy": 1, "error": 0, "nll": 1, "objective": 1, "tokens": 3, "step": 0, '
    b'"position": null, "seconds": {}, "prompt": "x", "best": 5}\n',
    b'{"prompt_ids": [1], "cross_entropy": 1, "error": 0, "nll": 1, "objective": 1, "tokens": 3, "step": 0, '
    b'"position": null, "seconds": {}, "prompt": "x", "best": {"objective": 1, "prompt": "x"}, "shortlist": [5]}\n',
    b'{"a": ' + b"[" * 10**5 + b"\n{}\n",
]
PROMPTS = [
    b"",
    b"[]\n",
    b"{}\n",
    b'{"prompt": 5}\n',
    b'{"prompt": ""}\n',
    b'{"prompt": "  "}\n',
    b'{"prompt": "check this .", "task": "gsm8k"}\n',
    b'{"prompt": "\\ud800"}\n',
    b"words\n",
    b'{"prompt": "rhubarb"}\n',
]


def wrong_files():
    for rows in ROWS:
        yield Mistake(f"01_prepare_data.py --task my.jsonl --data-dir d {OWN.split(' --initial')[0]}", "my.jsonl", rows)
        yield Mistake(f"{SHORT} --task my.jsonl {OWN} --kind number {OWN_MODEL}", "my.jsonl", rows)
    for record in RECORDS:
        for command in (SEARCH, EVALUATE, TRANSFER, REPORT):
            yield Mistake(command, f"{RUN}/run.json", record)
    for steps in STEPS:
        yield Mistake(SEARCH, f"{RUN}/steps.jsonl", steps)
        yield Mistake(REPORT, f"{RUN}/steps.jsonl", steps)
        yield Mistake(SEARCH, f"{RUN}/results.jsonl", steps)
        yield Mistake(EVALUATE, f"{RUN}/results.jsonl", steps)
        yield Mistake(REPORT, f"{RUN}/results.jsonl", steps)
        yield Mistake(SEARCH, f"{RUN}/predictions.jsonl", steps)
        yield Mistake(f"{EVALUATE} --regrade", f"{RUN}/predictions.jsonl", steps)
    for prompts in PROMPTS:
        yield Mistake("03_evaluate.py --prompts p.jsonl --eval-rows 3 --run-dir r", "p.jsonl", prompts)
        yield Mistake(EVALUATE, f"{RUN}/prompts.jsonl", prompts)
        yield Mistake(TRANSFER, f"{RUN}/prompts.jsonl", prompts)


MISTAKES = [*wrong_flags(), *wrong_places(), *wrong_files()]


def refusal(finished, copy, mistake):
    """What is wrong with how a mistake is met: "" if nothing is."""
    shutil.rmtree(copy)
    shutil.copytree(finished[0], copy)
    if mistake.path:
        (copy / mistake.path).write_bytes(mistake.content)
    done = call(mistake.command, copy)
    if not one_line(done):
        return f"exit {done.code}: {done.err.strip()[-300:]!r}"
    left = [name for name in ("r", "d", "x" * 300) if len(name) < 300 and (copy / name).exists()]
    return f"{left} left behind" if left else ""


def named(mistake):
    command = mistake.command.replace(str(ROOT), "").replace(SEARCH, "02_optimize.py ...")
    return f"{ascii(command)[1:-1][:140]} {mistake.path} {ascii(mistake.content[:60])[2:-1]}"


@pytest.mark.parametrize("mistake", MISTAKES[:: len(MISTAKES) // 60], ids=named)
def test_a_mistake_is_one_line_and_leaves_no_folder_behind(finished, copy, mistake):
    assert refusal(finished, copy, mistake) == ""


@pytest.mark.slow
def test_all_mistakes_are_one_line_and_leave_no_folder_behind(finished, copy):
    assert len(MISTAKES) >= 300
    wrong = [(named(mistake), why) for mistake in MISTAKES if (why := refusal(finished, copy, mistake))]
    print("\n".join([f"{len(MISTAKES)} mistakes, wrong {len(wrong)}", *map(str, wrong)]))
    assert wrong == []


def test_a_defect_is_one_line_and_the_debug_variable_shows_where(monkeypatch, capsys):
    def defect():
        raise KeyError("x")

    monkeypatch.delenv("GREATER_DEBUG", raising=False)
    with pytest.raises(SystemExit) as end:
        run_script(defect)
    assert end.value.code == 1 and "error: unexpected KeyError: 'x' (GREATER_DEBUG=1" in capsys.readouterr().err
    monkeypatch.setenv("GREATER_DEBUG", "1")
    with pytest.raises(KeyError):
        run_script(defect)


# --- Kills and signals ------------------------------------------------------------------------------------------------


def can_be_told(process):
    """Wait until the process meets signals in its own way, which is the first that it does; Linux tells."""
    told = 0
    while not told and process.poll() is None:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)
        told = int(caught[1], 16) >> (signal.SIGTERM - 1) & 1
        time.sleep(0.001)


def written_in(folder):
    """How much a stage has written, as a number that grows."""
    return sum(path.stat().st_size for path in folder.rglob("*.jsonl"))


def stopped_at(process, number, seconds):
    """Send a signal so many seconds after the process began to meet signals; None if it had ended before."""
    can_be_told(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        end_of(process)
        return None
    process.send_signal(number)
    return end_of(process)


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}


def good_stop(done, number):
    last = done.err.strip().splitlines()[-1:]
    return done.code == CODES[number] and "Traceback" not in done.err and "".join(last).startswith("stopped; ")


@linux_only
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("seconds", [0, 0.3, 1.5])
def test_a_signal_ends_a_stage_in_one_line_also_while_it_starts(tmp_path, number, seconds):
    done = stopped_at(start(f"{SEARCH} --steps 500", tmp_path), number, seconds)
    assert good_stop(done, number), done


@linux_only
def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        process = start(f"{SEARCH} --steps 0", tmp_path)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    can_be_told(process)
    process.send_signal(signal.SIGHUP)
    assert end_of(process).code == 0


def goes_on_to_the_same_end(finished, folder, command):
    """Whether a command that was killed in a folder ends there, called again, as it would have without."""
    done = call(command, folder)
    assert done.code == 0, done.err[-600:]
    if command == SEARCH:
        assert results_of(folder) == results_of_search(finished)
    assert table(done) == table(finished[1][command])


def results_of_search(finished):
    """What stage 2 alone leaves: the first results, and their predictions."""
    whole = results_of(finished[0])
    results = [record for record in whole["results"] if record["role"] in ("candidate", "initial", "best")]
    return whole | {"results": results}


def killed_run(finished, folder, command, rng):
    """A command killed at random until it once comes to its end: how often it was killed."""
    kills = 0
    while True:
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, *CODES])
        process = start(command, folder)
        before = written_in(folder)
        if rng.random() < 0.7:  # most are hit while something is written, the others at any moment
            while process.poll() is None and written_in(folder) == before:
                time.sleep(0.001)
            wait = rng.uniform(0, 0.6)
        else:
            wait = rng.uniform(0, 4)
        done = stopped_at(process, number, wait)
        if done is None or done.code == 0:
            break
        kills += 1
        assert number == signal.SIGKILL or good_stop(done, number), done
    goes_on_to_the_same_end(finished, folder, command)
    return kills


@linux_only
def test_a_search_that_is_killed_again_and_again_ends_as_one_that_is_not(finished, tmp_path):
    rng = random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        process = start(SEARCH, tmp_path)
        before = written_in(tmp_path)
        while process.poll() is None and written_in(tmp_path) == before:
            time.sleep(0.001)
        stopped_at(process, number, rng.uniform(0, 0.3))
    goes_on_to_the_same_end(finished, tmp_path, SEARCH)


@linux_only
@pytest.mark.slow
def test_stages_2_and_3_that_are_killed_at_random_end_as_those_that_are_not(finished, tmp_path):
    rng, kills = random.Random(1), 0
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        kills += killed_run(finished, folder, SEARCH, rng)
        for name in ("results.jsonl", "predictions.jsonl"):
            (folder / RUN / name).unlink()
        kills += killed_run(finished, folder, EVALUATE, rng)
    print(f"{kills} kills")
    assert kills >= 20  # how many of them hit depends on how fast the machine is


# --- Several at once -------------------------------------------------------------------------------------------------


def started_at_once(finished, tmp_path, count):
    """Start so many stages at once in one folder whose data are not prepared; how each ended, with its command."""
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    rows = [{"question": f"tom has {n} pens , finds 3 . how many pens ?", "answer": n + 3} for n in range(1, 17)]
    write_jsonl(tmp_path / "my.jsonl", rows)
    commands = []
    for number in range(count):
        commands.append(
            (
                f"{SEARCH} --seed {number} --run-dir runs/s{number} --steps 1",
                "01_prepare_data.py --task demo",
                f"02_optimize.py --task my.jsonl {OWN} --steps 0 --max-new-tokens 9 --run-dir runs/o{number} "
                f"--template '{{question}} please {{prompt}}' {OWN_MODEL}",
                f"03_evaluate.py --prompt 'check this .' --eval-rows 3 --run-dir runs/e{number}",
                f"04_transfer.py --runs {RUN} --targets demo/small --eval-rows 3 --out runs/t{number}",
            )[number % 5]
        )
    processes = [start(command, tmp_path) for command in commands]
    return [(command, end_of(process, 900)) for command, process in zip(commands, processes)]


def test_stages_that_start_at_once_prepare_the_data_once_and_do_not_fail(finished, tmp_path):
    for command, done in started_at_once(finished, tmp_path, 5):
        assert done.code == 0, (command, done.err[-600:])
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_forty_stages_that_start_at_once_do_not_fail(finished, tmp_path):
    failed = [(command, done.err[-600:]) for command, done in started_at_once(finished, tmp_path, 40) if done.code]
    print(f"40 starts at once, {len(failed)} failed")
    assert failed == [] and not list(tmp_path.rglob("*.tmp"))


@linux_only
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_stage_that_has_done_its_work_is_not_killed_while_python_ends(tmp_path, number):
    script = ROOT / "01_prepare_data.py"
    # As a stage: a signal comes when main() is over and Python takes everything down.
    code = (
        "import atexit, os, sys, threading, time; import __main__; "
        "threading.Thread(target=time.sleep, args=[60], daemon=True).start(); "  # a thread of a library
        f"__main__.__file__ = {str(script)!r}; sys.path.insert(0, {str(ROOT)!r}); "
        "from support.settings import run_script; "
        f"atexit.register(lambda: os.kill(os.getpid(), {int(number)})); run_script(lambda: print('done'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
