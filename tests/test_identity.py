"""Which model it is: every byte that it is loaded from counts, and a hub name stands for a commit."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from support import identity
from support.files import UserError
from support.identity import hash_of, identity_of


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A copy of the demo's model, and a cache of hashes of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(ROOT / "demo" / "model", tmp_path / "model")


def flip_a_byte(path, place):
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if it had not been touched


def test_a_copy_is_the_same_model_wherever_it_lies(model):
    assert identity_of(model) == identity_of(ROOT / "demo" / "model")


def test_one_byte_in_the_middle_of_the_weights_makes_another_model_also_at_the_same_time_and_size(model):
    weights = model / "model.safetensors"
    with open(weights, "ab") as file:
        file.write(bytes(3 * 2**20))  # large enough for its hash to be kept
    before = identity_of(model)
    assert identity_of(model) == before
    flip_a_byte(weights, 2**20 + 12345)
    assert identity_of(model) != before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_configuration_end_tokens_and_tokenizer_make_another_model(model, name):
    before = identity_of(model)
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(content | {"another": 1}))
    assert identity_of(model) != before


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_an_edited_chat_template_makes_another_model(model, name):
    before = identity_of(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("{{ messages }}")
    changed = identity_of(model)
    assert changed != before
    (model / name).write_text("{{ messages  }}")
    assert identity_of(model) not in (before, changed)


def test_files_that_are_not_read_do_not_count(model):
    before = identity_of(model)
    (model / "README.md").write_text("a word")
    (model / "picture.png").write_bytes(b"1")
    assert identity_of(model) == before


def test_the_hash_of_a_large_file_is_kept_and_a_broken_cache_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    large = tmp_path / "large.safetensors"
    large.write_bytes(os.urandom(2**21))
    found, read = hash_of(large), []
    monkeypatch.setattr(identity, "sha256", lambda path: read.append(path) or "read again")
    assert hash_of(large) == found and not read
    for broken in ("", "[]", '{"' + str(large) + '": 7}'):
        identity.cache_path().write_text(broken)
        assert hash_of(large) == "read again"
    identity.cache_path().unlink()
    identity.cache_path().parent.rmdir()
    identity.cache_path().parent.write_text("a file where the folder should be")
    assert hash_of(large) == "read again"


def hub_with(tmp_path, commit):
    """A cache of the hub, as huggingface_hub keeps it, in which org/name stands for this commit."""
    folder = tmp_path / "hub" / "models--org--name"
    snapshot = folder / "snapshots" / commit
    shutil.copytree(ROOT / "demo" / "model", snapshot)
    (snapshot / "chat_template.jinja").write_text(commit)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


def test_a_hub_name_is_known_by_the_commit_it_stands_for(tmp_path):
    code = (
        "import sys; from support.identity import identity_of; from support.engine import load_engine\n"
        "engine = load_engine('org/name', 'cpu', 'float32')\n"
        "print(identity_of('org/name'), engine.tokenizer.chat_template)"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for commit in ("1" * 40, "2" * 40):
        hub_with(tmp_path, commit)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.split() == ["commit", commit, commit], done.stderr


def test_a_name_that_is_nowhere_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("org/nothing-of-the-kind", "no such name"):
        with pytest.raises(UserError, match="cannot load --model") as error:
            identity_of(name)
        assert "\n" not in str(error.value)
