"""Files: written whole or line by line, locked, told apart."""

import subprocess
import sys

import pytest
from conftest import ROOT

from support import files
from support.files import write_jsonl


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    write_jsonl(path, [{"a": 1}])

    def fail(*_):
        raise OSError("killed")

    monkeypatch.setattr(files.os, "replace", fail)
    for write in (write_jsonl, files.write_json):
        with pytest.raises(OSError):
            write(path, [{"a": 2}])
    assert path.read_text() == '{"a": 1}\n'


def test_a_line_cut_short_by_a_kill_is_removed_and_the_rest_kept(tmp_path):
    path = tmp_path / "steps.jsonl"
    files.append_jsonl(path, {"step": 0})
    files.append_jsonl(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "pro')
    assert files.read_appended(path) == [{"step": 0}, {"step": 1}]
    files.append_jsonl(path, {"step": 2})
    assert [r["step"] for r in files.read_jsonl(path)] == [0, 1, 2]
    assert files.read_appended(tmp_path / "none.jsonl") == []
    path.write_text(path.read_text()[:-1])  # whole but for its newline: an editor's doing
    assert [r["step"] for r in files.read_appended(path)] == [0, 1, 2]
    files.append_jsonl(path, {"step": 3})
    assert [r["step"] for r in files.read_jsonl(path)] == [0, 1, 2, 3]


def test_only_one_process_at_a_time_writes_into_a_folder(tmp_path):
    code = f"from support import files\nwith files.alone_in({str(tmp_path)!r}): pass"
    other = [sys.executable, "-c", code]
    with files.alone_in(tmp_path):
        done = subprocess.run(other, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode and "another process is at work in" in done.stderr
    assert subprocess.run(other, cwd=ROOT, capture_output=True).returncode == 0
