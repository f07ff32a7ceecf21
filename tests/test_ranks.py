"""Several processes of one stage: what they tell each other, and real runs with torchrun beside runs without it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_faults import call, end_of, start

from support import STOPPED, ranks
from support.files import read_jsonl, write_chained

PROGRAM = Path(__file__).parent / "ranks_program.py"
SEARCH = "02_optimize.py --steps 3 --train-rows 7 --eval-rows 13 --finalists 2 --max-new-tokens 24"
RUN = "runs/demo-seed0"
EVALUATE = f"03_evaluate.py --run-dir {RUN} --baselines --eval-rows 13 --mistakes 0"
TRANSFER = f"04_transfer.py --runs {RUN} --targets demo/small --eval-rows 5"
ENDING = 60  # seconds within which all ranks must have ended after one has


def torchrun(count, script, *arguments, folder):
    """So many ranks of a script, as a process that can be waited for."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(script), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def with_ranks(count, command, folder):
    """A stage, done by so many ranks, that must end well."""
    script, *arguments = command.split()
    done = end_of(torchrun(count, ROOT / script, *arguments, folder=folder))
    assert done.code == 0, done.err[-2000:]
    return done


def alone(command, folder):
    done = call(command, folder)
    assert done.code == 0, done.err[-2000:]
    return done


def lines_of_ours(done):
    """The lines on stderr that say error or stopped."""
    return [line for line in done.err.splitlines() if line.startswith(("error: ", "stopped; "))]


def same(found, expected):
    """Whether two records agree: numbers to 1e-6, all else exactly; not times and counted tokens."""
    if isinstance(expected, dict):
        free = {"seconds", "minutes", "totals"}
        assert found.keys() == expected.keys()
        return all(same(found[name], value) for name, value in expected.items() if name not in free)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return found == pytest.approx(expected, abs=1e-6, rel=1e-6)
    return found == expected


def by_row(path):
    """The predictions in a file; they come in the order in which rows end."""
    return sorted(read_jsonl(path), key=lambda one: (one["split"], one["prompt_hash"], one["id"]))


def same_runs(folder, expected):
    """Whether two folders of runs hold the same files, and these the same records."""
    names = sorted(path.relative_to(expected) for path in expected.rglob("*") if path.is_file())
    assert sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) == names
    good = True
    for name in names:
        read = by_row if name.name.endswith("predictions.jsonl") else read_jsonl
        if name.suffix == ".jsonl":
            good = good and same(read(folder / name), read(expected / name))
    return good


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    alone(SEARCH, folder)
    return folder


# --- One process --------------------------------------------------------------------------------------------


def test_without_torchrun_there_is_one_rank_and_torch_is_not_imported(tmp_path):
    code = (
        "import sys\nfrom support import ranks\nranks.be_silent()\n"
        f"with ranks.working_in({str(tmp_path / 'run')!r}) as folder: print(folder)\n"
        "print(ranks.count(), ranks.rank(), ranks.agreed(3), ranks.first(lambda: 4), ranks.share_of([1, 2, 3]),"
        " list(ranks.each_of_first(iter([5]))), list(ranks.together(iter([[6]]), 1, '')), ranks.says_errors(),"
        " 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(tmp_path / "run"), "1 0 3 4 [1, 2, 3] [5] [[6]] True False"]


def test_an_engine_of_one_process_does_not_import_the_group_of_processes():
    code = (
        "import sys\nfrom support.engine import load_engine\nfrom support.files import ROOT\n"
        "from support.evaluation import Sampling\nengine = load_engine(str(ROOT / 'demo' / 'model'), 'cpu')\n"
        "engine.sample([[5, 6]], Sampling(1, 0.0, 2, '0'))\nimport torch.distributed as group\n"
        "print(group.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr[-2000:]


# --- What ranks tell each other --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of three ranks saw of the program's work, and the folder in which they worked."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "run" / "inner").mkdir(parents=True)
    write_chained(folder / "run" / "steps.jsonl", [{"step": 0}])
    done = end_of(torchrun(3, PROGRAM, "all", str(folder), folder=folder))
    assert done.code == 0, done.err[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(3)], folder


def test_all_ranks_have_the_results_of_all_and_the_decisions_of_the_first(told):
    for saw in told[0]:
        assert saw["shares"] == [[0, 3, 6], [1, 4], [2, 5]]
        assert saw["agreed"] == 0 and saw["each of first"] == [10, 20]
        items = [item for part in saw["together"] for item in part]
        assert sorted(items) == sorted(f"{rank}.{number}" for rank in (1, 2) for number in range(3 * rank))
        assert saw["together"] == told[0][0]["together"] and 1 < sum(map(bool, saw["together"])) <= ranks.PARTS


def test_an_error_of_one_rank_is_the_error_of_all(told):
    for saw in told[0]:
        assert saw["error of one"] == "UserError: not on rank 1"
        assert saw["odd error"].endswith("of an odd kind")
        assert saw["error of first"] == "UserError: not on rank 0"
        assert saw["broken"] == "UserError: no third number"


def test_ranks_that_work_on_different_things_say_so(told):
    expected = "do not work on the same: work of rank 0; work of rank 1; work of rank 1"
    assert all(saw["other work"] == f"RuntimeError: the ranks {expected}" for saw in told[0])


@pytest.mark.parametrize(("name", "rows"), [("many rows", 7), ("few rows", 2)])
def test_rows_come_out_as_with_one_process_also_where_there_are_more_ranks_than_rows(told, demo_engine, name, rows):
    from support.evaluation import Sampling

    demo_engine.counts.clear()
    written = demo_engine.sample([list(range(5, 8 + number)) for number in range(rows)], Sampling(1, 0.0, 9, "0"))
    expected = [[ids for ids, _ in samples] for samples in written]
    assert [saw[name] for saw in told[0]] == [[expected, demo_engine.counts["generated_tokens"]]] * 3


def test_the_first_rank_alone_works_in_the_folder_the_others_in_copies_that_are_gone_at_the_end(told):
    saw, folder = told
    own = [one["folder"][0] for one in saw]
    assert own[0] == str(folder / "run") and len(set(own)) == 3
    assert not any(Path(path).exists() for path in own[1:])
    for rank, one in enumerate(saw):
        assert one["folder"][1:] == [[{"step": 0}], [{"step": 0}, {"rank": rank}]]
    assert read_jsonl(folder / "run" / "steps.jsonl") == [{"step": 0}, {"rank": 0}]


def test_a_mistake_is_said_once_and_ends_all(tmp_path):
    started = time.monotonic()
    done = end_of(torchrun(2, PROGRAM, "mistake", str(tmp_path), folder=tmp_path))
    assert done.code != 0 and time.monotonic() - started < ENDING
    assert done.out == "said by each\n"
    errors = lines_of_ours(done)
    assert errors[0] == "error: a mistake of rank 1" and len(errors) == 1


def test_a_killed_rank_ends_the_others_with_a_reason(tmp_path):
    started = time.monotonic()
    done = end_of(torchrun(3, PROGRAM, "killed", str(tmp_path), folder=tmp_path))
    assert done.code != 0 and time.monotonic() - started < ENDING
    assert "SIGKILL" in done.err  # torchrun's own report
    (line,) = lines_of_ours(done)
    assert line.startswith(f"error: {ranks.GONE}")


# --- Real runs ---------------------------------------------------------------------------------------------------


def test_a_search_by_three_ranks_gives_the_records_of_one_process(finished, tmp_path):
    done = with_ranks(3, SEARCH, tmp_path)
    assert len(re.findall(r"^step +\d+/3 ", done.out, re.M)) == 4 and done.out.count("what is sent with") == 1
    assert same_runs(tmp_path / "runs", finished / "runs")


@pytest.mark.slow
def test_an_evaluation_and_a_transfer_by_two_ranks_give_the_records_of_one_process(tmp_path):
    by = {"alone": alone, "ranks": lambda *what: with_ranks(2, *what)}
    for name, call_stage in by.items():
        (tmp_path / name).mkdir()
        alone(SEARCH, tmp_path / name)
        call_stage(EVALUATE, tmp_path / name)
        call_stage(TRANSFER, tmp_path / name)
    assert same_runs(tmp_path / "ranks" / "runs", tmp_path / "alone" / "runs")


def pid_of_rank(process, number):
    """The process that is this rank of a torchrun."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if parent == process.pid and f"RANK={number}".encode() in variables:
            return int(path.name)
    raise AssertionError("no such rank")


def wait_for(lines, path, process):
    """Until the process has written so many lines to a file."""
    while not path.exists() or len(path.read_bytes().splitlines()) < lines:
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.005)


def killed_at(step, process, folder, number=None):
    """How a process ends whose rank `number`, or which itself, is killed once it has written so many steps."""
    path = folder / RUN / "steps.jsonl"
    wait_for(1, path, process)  # so the ranks are there
    pid = process.pid if number is None else pid_of_rank(process, number)
    wait_for(step + 1, path, process)
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    done = end_of(process)
    assert done.code != 0 and time.monotonic() - started < ENDING
    return done


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("number", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_run_of_which_a_rank_was_killed_goes_on_with_one_process_to_the_same_result(finished, tmp_path, number):
    script, *arguments = SEARCH.split()
    process = torchrun(2, ROOT / script, *arguments, folder=tmp_path)
    done = killed_at(1, process, tmp_path, number)
    assert "SIGKILL" in done.err  # torchrun's own report
    said = lines_of_ours(done)
    assert len(said) <= 2 and (said or number == 0)  # torchrun may end the others before they notice
    assert all(line.startswith((f"error: {ranks.GONE}", STOPPED)) for line in said)
    assert not (tmp_path / RUN / "prompts.jsonl").exists()
    alone(SEARCH, tmp_path)
    assert same((steps := read_jsonl(tmp_path / RUN / "steps.jsonl")), read_jsonl(finished / RUN / "steps.jsonl"))
    assert len(steps) == 4


@pytest.mark.slow
def test_a_killed_run_of_one_process_goes_on_with_two_ranks_to_the_same_result(finished, tmp_path):
    killed_at(1, start(SEARCH, tmp_path), tmp_path)
    with_ranks(2, SEARCH, tmp_path)
    for name in ("steps", "prompts"):
        assert same(*(read_jsonl(folder / RUN / f"{name}.jsonl") for folder in (tmp_path, finished)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "opro"])
def test_a_text_method_by_two_ranks_gives_the_records_of_one_process(tmp_path, demo_server, method):
    command = f"02_optimize.py --method {method} --rounds 2 --train-rows 7 --eval-rows 5 --finalists 2"
    if method != "random":
        command += f" --optimizer-model scripted --optimizer-endpoint {demo_server}"
    for name, by in (("alone", alone), ("ranks", lambda *what: with_ranks(2, *what))):
        (tmp_path / name).mkdir()
        by(command, tmp_path / name)
    assert same_runs(tmp_path / "ranks" / "runs", tmp_path / "alone" / "runs")
