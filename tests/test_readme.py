"""The README: its commands run, its flags exist, its file list and tables are those of the repository."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(language):
    """The lines of the README's code blocks of a language, without the set-up that leads the first two."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)
    return [line.split("&&")[-1].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the files that git would give a newcomer."""
    folder = tmp_path_factory.mktemp("clone") / "greater"
    ignored = shutil.ignore_patterns(".git", ".venv", "data", "runs", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def test_the_set_up_lines_make_and_enter_a_virtual_environment():
    lines = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert [line.split(" && ")[-1] for line in lines] == [
        "python 02_optimize.py --task demo",
        "python -m pytest -n 2 --dist loadfile",
    ]
    set_up = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert all(line.startswith(set_up) for line in lines)


def test_the_commands_run_in_order_and_leave_what_the_readme_says(copy):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = {}
    for command in commands("bash"):
        if command.startswith("python -m pytest"):  # that is us
            continue
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        ran[command] = done.stdout
    first = ran["python 02_optimize.py --task demo"]
    initial, best = (float(re.search(rf"^{r} .*% +([\d.]+) ± ", first, re.M).group(1)) for r in ("initial", "best"))
    assert 25 < initial < 45 and best >= 90
    # The README shows what the first command prints at its end.
    shown = re.search(r"^```text\n +dev accuracy.*?^```$", README, re.M | re.S).group().splitlines()[1:4]
    assert [line.split() for line in shown] == [line.split() for line in first.splitlines() if line in shown]
    runs = copy / "runs"
    assert (runs / "demo-small-seed0" / "predictions.jsonl").exists()
    # The tables on baselines and transfer are what the commands print.
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.startswith("| ")]
    evaluated = ran["python 03_evaluate.py --run-dir runs/demo-seed0 --baselines"]
    for label in ("empty", "zero-shot chain of thought", "initial", "best"):
        table = next(row for row in rows if len(row) == 6 and row[0].startswith(label))
        line = re.search(rf"^{label} +\d.*$", evaluated, re.M).group()
        assert re.findall(r"[\d.]+\d", " ".join(table[1:])) == re.findall(r"[\d.]+\d", line)
    matrix = {"| " + " | ".join(row) + " |" for row in rows if row[0] == "demo"}
    assert len(matrix) == 3 and matrix <= set("\n".join(ran.values()).splitlines())
    for picture in (ROOT / "demo" / "pictures").iterdir():
        assert list(runs.glob(f"**/{picture.name}")) and f"](demo/pictures/{picture.name})" in README


@pytest.mark.parametrize(
    "command", sorted({*commands("bash"), *commands("sh"), *re.findall(r"`(python \d[^`]*)`", README)})
)
def test_every_flag_in_a_command_is_one_of_its_script(command):
    words = shlex.split(command)
    assert words[0] in ("python", "vllm", "transformers")
    if words[0] != "python" or words[1] == "-m":  # not ours
        return
    script = ROOT / words[1]
    assert script.exists()
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    known = set(re.findall(r"--[\w-]+", done.stdout))
    assert {word for word in words if word.startswith("--")} <= known


def test_the_file_list_names_every_file_and_folder_at_the_top():
    block = re.search(r"^```text\n(requirements.*?)^```", README, re.M | re.S).group(1)
    visible = [p for p in ROOT.iterdir() if not p.name.startswith((".", "__pycache__"))]
    there = {p.name + "/" * p.is_dir() for p in visible} - {"README.md", "LICENSE", "ruff.toml", "data/", "runs/"}
    assert set(re.findall(r"^([\w.]+/?) {2,}", block, re.M)) == there


def test_the_functions_in_the_table_are_those_of_the_core():
    import greater_core

    table = README.split("## The method in the code")[1].split("\n## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) >= 10 and all(callable(getattr(greater_core, name)) for name in names)
