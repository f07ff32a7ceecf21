"""The pages: their commands run, their flags exist, their links lead somewhere, their lists and tables are true."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

OTHERS = (ROOT / "demo" / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *OTHERS)}
README, DEMO = PAGES["README.md"], PAGES["demo/README.md"]
FOLDERS = ("demo", "benchmarks", "examples")  # with scripts of their own
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def commands(language):
    """The lines of the pages' code blocks of a language, without the set-up that leads the README's first two."""
    lines = []
    for page in PAGES.values():
        for found, block in BLOCK.findall(page):
            if found == language:
                lines += block.splitlines()
    return [line.split("&&")[-1].strip() for line in lines if line.strip()]


def inline_commands():
    """The commands of ours that stand in the pages' sentences and tables."""
    found = []
    for page in PAGES.values():
        found += re.findall(r"`(python [^`]*)`", BLOCK.sub("", page))
    return found


def links(page):
    """[(path, anchor)] of what the page links to and shows in the repository; the anchor may be empty."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", PAGES[page])):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        found.append((path.resolve(), anchor))
    return found


def table_rows(page):
    """The cells of all lines of a page's tables, heads included."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def anchors(text):
    """The names under which a page's headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def numbers(text):
    return re.findall(r"[\d.]+\d", text)


# --- Commands --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the files that git would give a newcomer."""
    folder = tmp_path_factory.mktemp("clone") / "greater"
    ignored = shutil.ignore_patterns(".git", ".venv", "data", "runs", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def printed(copy):
    """{command: what it printed} of the bash blocks, run in order in the copy; those of the README come first."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    outputs = {}
    for command in commands("bash"):
        if command.startswith("python -m pytest"):  # that is us
            continue
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        outputs[command] = done.stdout
    return outputs


def test_the_set_up_lines_make_and_enter_a_virtual_environment():
    lines = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert [line.split(" && ")[-1] for line in lines] == [
        "python 02_optimize.py --task demo",
        "python -m pytest -n2 --dist loadfile",
    ]
    set_up = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert all(line.startswith(set_up) for line in lines)


def test_the_first_command_finds_a_prompt_and_prints_what_the_readme_shows(printed):
    first = printed["python 02_optimize.py --task demo"]
    initial = re.search(r"^initial, test +([\d.]+) \(", first, re.M).group(1)
    best = re.search(r"^best, test +([\d.]+) \(", first, re.M).group(1)
    assert 25 < float(initial) < 45
    assert float(best) >= 90
    (shown,) = (block for _, block in BLOCK.findall(README) if "initial, dev" in block)
    assert shown in first
    (verdict,) = re.findall(r"a verdict: (better by .*?, p = \S+)\. ", README)
    assert verdict.removeprefix("better ") in first and "the best prompt is better than the initial one" in first


def test_the_commands_leave_the_files_that_the_readme_names(printed, copy):
    runs = copy / "runs"
    assert (runs / "demo-small-seed0" / "predictions.jsonl").exists()
    for picture in (ROOT / "demo" / "pictures").iterdir():
        assert list(runs.glob(f"**/{picture.name}"))


def test_the_table_of_baselines_is_what_the_command_prints(printed):
    evaluated = printed["python 03_evaluate.py --run-dir runs/demo-seed0 --baselines"]
    for label in ("empty", "zero-shot chain of thought", "initial", "best"):
        row = next(row for row in table_rows(DEMO) if len(row) == 6 and row[0].startswith(label))
        line = re.search(rf"^{label} +\d.*$", evaluated, re.M).group()
        assert numbers(" ".join(row[1:])) == numbers(line)


def test_the_table_of_paired_comparisons_is_what_the_command_prints(printed):
    evaluated = printed["python 03_evaluate.py --run-dir runs/demo-seed0 --baselines"]
    for label in ("empty", "zero-shot chain of thought", "initial"):
        row = next(row for row in table_rows(DEMO) if len(row) == 7 and row[:2] == [label, "paper"])
        line = re.search(rf"^{label} +paper +(.*)$", evaluated, re.M).group(1)
        assert " ".join(row[2:]).split() == line.split()


def test_the_transfer_matrix_is_what_the_command_prints(printed):
    matrix = {"| " + " | ".join(row) + " |" for row in table_rows(DEMO) if row[0] == "demo"}
    assert len(matrix) == 3
    assert matrix <= set("\n".join(printed.values()).splitlines())


@functools.cache
def known_flags(script):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True)
    return set(re.findall(r"--[\w-]+", done.stdout))


@pytest.mark.parametrize("command", sorted({*commands("bash"), *commands("sh"), *inline_commands()}))
def test_every_flag_in_a_command_is_one_of_its_script(command):
    words = shlex.split(command)
    assert words[0] in ("python", "torchrun", "vllm", "transformers")
    if words[0] in ("vllm", "transformers") or words[1] == "-m":  # not ours
        return
    (script,) = (word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists()
    ours = words[words.index(script) :]
    assert words[: -len(ours)] == ["python"] or re.fullmatch(
        r"torchrun --nproc-per-node \d", " ".join(words[: -len(ours)])
    )
    assert {word.partition("=")[0] for word in ours if word.startswith("--")} <= known_flags(script)


def test_every_flag_in_a_sentence_is_one_of_some_script():
    known = {"--generation-config"}  # vLLM's
    for script in (*ROOT.glob("0*.py"), *(file for name in FOLDERS for file in ROOT.glob(f"{name}/*.py"))):
        known |= known_flags(script.relative_to(ROOT).as_posix())
    named = set()
    for page in PAGES.values():
        for code in re.findall(r"`(--[^`]*)`", BLOCK.sub("", page)):
            named |= set(re.findall(r"--[\w-]+", code))
    assert len(named) >= 20 and named <= known


# --- Lists of files and functions ------------------------------------------------------------------


def test_the_file_list_names_every_file_and_folder_at_the_top_and_in_support():
    (block,) = (block for _, block in BLOCK.findall(README) if block.startswith("requirements"))
    visible = [p for p in ROOT.iterdir() if not p.name.startswith((".", "__pycache__"))]
    top = {p.name + "/" * p.is_dir() for p in visible} - {"README.md", "LICENSE", "ruff.toml", "data/", "runs/"}
    assert set(re.findall(r"^([\w.]+/?) {2,}", block, re.M)) == top
    support = {p.name for p in (ROOT / "support").glob("*.py")} - {"__init__.py"}
    listed = [
        name for names in re.findall(r"^  (\w+\.py(?:, \w+\.py)*) {2,}", block, re.M) for name in names.split(", ")
    ]
    assert sorted(listed) == sorted(support)


def test_the_functions_in_the_table_are_those_of_the_code():
    import greater_core
    from support import tokens

    section = README.split("## The method in the code")[1].split("\n## ")[0]
    names = []
    for row in table_rows(section):
        names += re.findall(r"`(\w+)`", row[0])
    assert len(names) >= 10
    known = vars(tokens) | vars(greater_core)
    assert [name for name in names if not callable(known.get(name))] == []


# --- The pages themselves --------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_at_most_200_lines(page):
    assert len(PAGES[page].splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_lines_have_at_most_120_columns(page):
    text = PAGES[page]
    if page != "README.md":  # a wide table and a long command cannot be wrapped; the README does without them
        text = re.sub(r"^\|.*$", "", BLOCK.sub("", text), flags=re.M)
    assert [line for line in text.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_leads_to_a_file_and_every_anchor_to_a_heading(page):
    for path, anchor in links(page):
        assert path.exists()
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8"))


def test_every_page_and_picture_is_linked_from_a_page():
    linked = set()
    for page in PAGES:
        linked |= {path for path, _ in links(page)}
    pictures = set()
    for folder in ("demo", "benchmarks", "docs"):
        pictures |= set((ROOT / folder).rglob("*.png"))
    assert len(pictures) >= 6
    assert len(OTHERS) >= 5
    assert pictures | set(OTHERS) <= linked


@pytest.mark.parametrize("page", PAGES)
def test_no_table_lists_what_was_not_run(page):
    for row in table_rows(PAGES[page]):
        assert "not run" not in " | ".join(row).lower()


def test_the_python_example_runs_as_it_stands(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", PAGES["docs/own_task.md"], re.S)
    exec(example, {})
    lines = capsys.readouterr().out.splitlines()
    objectives = [float(line.split()[0]) for line in lines if line]
    assert len(objectives) == 3 and objectives[-1] < objectives[0]
