"""The layout: what lies where, which file imports which, and what the requirements declare."""

import ast
import re
import sys

import pytest
from conftest import ROOT

SCRIPTS = ("01_prepare_data", "02_optimize", "03_evaluate", "04_transfer")
TOP = {
    *(f"{script}.py" for script in SCRIPTS),
    "greater_core.py",
    "beyond_paper.py",
    "text_optimizers.py",
    "requirements.txt",
    "README.md",
    "LICENSE",
    "ruff.toml",
    "support",
    "demo",
    "benchmarks",
    "docs",
    "examples",
    "tests",
}
SUPPORT = (
    "files",
    "ranks",
    "identity",
    "tokens",
    "progress",
    "engine",
    "onednn",
    "tasks",
    "own",
    "reading",
    "rouge",
    "harness",
    "sources",
    "settings",
    "runs",
    "resume",
    "evaluation",
    "instruments",
    "tables",
    "answerers",
    "replies",
    "servers",
    "answers",
    "proposals",
    "plans",
    "trials",
    "check",
    "pictures",
    "progress",
    "report",
    "takeaway",
)
THERE = [name for name in SUPPORT if (ROOT / "support" / f"{name}.py").exists()]
FOLDERS = ("support", "demo", "benchmarks", "examples", "tests")
PYTHON_FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])


def imported(path):
    """The names of the modules that a file imports anywhere in it, also inside functions: {"support.files", "torch"}.

    What is taken out of a package, as in `from support import files`, counts as a module of it where it is one.
    """
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module == "support":
                names = {alias.name for alias in node.names}
                files = {name for name in names if support_file(name).exists()}
                modules |= {f"support.{name}" for name in files} | ({"support"} if names - files else set())
            else:
                modules.add(node.module)
    return modules


def top_of(module):
    return module.partition(".")[0]


def ours(path):
    """The modules of this repository that a file imports."""
    own = {file.stem for file in PYTHON_FILES if file.parent != ROOT / "support"} | set(FOLDERS)
    return {module for module in imported(path) if top_of(module) in own}


def support_file(name):
    return ROOT / "support" / f"{name}.py"


def imported_in_support(name):
    """The names of the files in support that one of them imports."""
    modules = ours(support_file(name)) - {"support"}  # what the package itself holds stands below all files
    return {module.removeprefix("support.") for module in modules if top_of(module) == "support"}


# --- What lies where -----------------------------------------------------------------------------------


def test_the_top_level_holds_the_stages_the_method_and_folders_and_nothing_else():
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()}
    found = {path.name for path in ROOT.iterdir() if path.name not in ignored and not path.name.startswith(".")}
    assert found == TOP


def test_support_holds_one_file_for_each_purpose_and_nothing_else():
    found = {path.name for path in (ROOT / "support").iterdir() if path.name != "__pycache__"}
    assert found == {"__init__.py", *(f"{name}.py" for name in SUPPORT)}


@pytest.mark.parametrize("name", SUPPORT)
def test_a_file_in_support_has_its_file_of_tests(name):
    assert support_file(name).exists() and (ROOT / "tests" / f"test_{name}.py").exists()


# --- What keeps it readable ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "most"), [("greater_core", 500), ("beyond_paper", 400), ("text_optimizers", 500)])
def test_the_methods_fit_into_so_many_lines(name, most):
    assert len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= most


def test_no_function_takes_more_than_six_arguments():
    wide = []
    for path in (path for path in PYTHON_FILES if path.parent.name != "tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len(arguments) > 6:
                    wide.append(f"{path.name}: {node.name}")
    assert wide == []


# --- Which file imports which --------------------------------------------------------------------------


def test_imports_are_found_wherever_they_stand(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "import numpy as np, support.files\nfrom support import tasks as t, tokens\n"
        "def f():\n    if f:\n        from support.engine import load\n        import greater_core\n"
    )
    everywhere = {"numpy", "support.files", "support.tasks", "support.tokens", "support.engine", "greater_core"}
    assert imported(path) == everywhere and ours(path) == everywhere - {"numpy"}


@pytest.mark.parametrize("name", THERE)
def test_a_file_in_support_imports_only_from_support(name):
    """Neither the method, nor a script, nor the demo, benchmarks or tests."""
    assert {module for module in ours(support_file(name)) if top_of(module) != "support"} == set()
    assert imported_in_support(name) <= set(SUPPORT)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("files", set()),
        ("reading", set()),
        ("harness", set()),
        ("rouge", {"files"}),
        ("own", {"files"}),
        ("tasks", {"files", "own", "reading"}),
        ("sources", {"files", "own", "reading", "rouge", "tasks"}),
        ("ranks", {"files"}),
        ("settings", {"files", "own", "ranks", "tasks"}),
    ],
)
def test_the_ground_floor_of_support_imports_only_what_is_below_it(name, allowed):
    assert imported_in_support(name) <= allowed


def test_support_has_no_circle():
    """Again and again take away what imports only what is already gone; a circle would stay."""
    left = {name: imported_in_support(name) for name in THERE}
    while free := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in free}
    assert left == {}


@pytest.mark.parametrize("name", ["greater_core", "text_optimizers"])
def test_the_methods_import_only_from_support(name):
    assert {top_of(module) for module in ours(ROOT / f"{name}.py")} <= {"support"}


def test_what_goes_beyond_the_paper_imports_the_method_which_does_not_know_it():
    assert {top_of(module) for module in ours(ROOT / "beyond_paper.py")} == {"greater_core", "support"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_only_the_methods_and_support(script):
    methods = {"greater_core", "beyond_paper", "text_optimizers"}
    assert {top_of(module) for module in ours(ROOT / f"{script}.py")} <= {*methods, "support"}


# --- What the requirements declare ---------------------------------------------------------------------


def test_every_imported_package_is_declared():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.removeprefix("# optional: ") for line in lines]
    declared = {re.match(r"[\w-]+", line).group().replace("-", "_") for line in lines if not line.startswith("#")}
    needed = {}
    for path in PYTHON_FILES:
        for module in map(top_of, imported(path) - ours(path)):
            if module not in sys.stdlib_module_names:
                needed.setdefault(module, []).append(str(path.relative_to(ROOT)))
    assert {"torch", "numpy", "filelock"} <= needed.keys()
    assert {package: files for package, files in needed.items() if package not in declared} == {}
