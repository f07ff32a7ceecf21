"""Which model it is: what tells one whose texts are on disk from another of the same name. Works without torch.

A hub name is known by the commit that it stands for now, a folder by all bytes of the files from which it is loaded:
weights, configuration, end tokens, tokenizer, chat template.
"""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

from support.files import UserError, sha256, write_json

# Weights, configurations, vocabularies, chat templates.
READ_FROM = (
    "*.safetensors",
    "*.json",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)


def cannot_load(name, error):
    """The UserError about a model that cannot be loaded."""
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return UserError(
        f"cannot load --model {name} ({reason}). Ways out: `hf auth login` for a gated model, "
        "an open model by its hub name, a local folder, or --task demo, whose model is included"
    )


def is_folder(name):
    return Path(name).is_dir()


@lru_cache
def commit_of(name):
    """The commit that a hub name stands for; from this machine's cache where the hub cannot be reached.

    Errors: UserError if the hub does not know it, or does not let this user have it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(name, "config.json")).parent.name  # .../snapshots/COMMIT/config.json
    except (OSError, HFValidationError) as error:
        raise cannot_load(name, error) from None


def identity_of(name):
    """A text that tells the model `name`, a hub name or a folder, from all others. Errors: as `commit_of`."""
    if not is_folder(name):
        return f"commit {commit_of(name)}"
    folder = Path(name)
    digest = hashlib.sha256()
    for path in sorted({path for pattern in READ_FROM for path in folder.glob(pattern)}):
        digest.update(f"{path.relative_to(folder).as_posix()} {hash_of(path)}\n".encode())
    return digest.hexdigest()


# --- Hashes of large files ---------------------------------------------------------------------------


def cache_path():
    """The file that keeps hashes between calls."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "greater" / "hashes.json"


def known_hashes():
    try:
        known = json.loads(cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def hash_of(path):
    """The hash of a file's bytes. Of a large one it is kept, and taken from there as long as the file's size and times
    are those of then: reading 16 GB takes longer than some evaluations."""
    stat = path.stat()
    if stat.st_size < 2**20:
        return sha256(path)
    # Whoever restores the time of a file's content cannot restore the time of its entry, ctime.
    seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    known = known_hashes().get(str(path.resolve()))
    if isinstance(known, dict) and known.get("seen") == seen and isinstance(known.get("sha256"), str):
        return known["sha256"]
    found = sha256(path)
    try:
        cache_path().parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_path(), known_hashes() | {str(path.resolve()): {"seen": seen, "sha256": found}})
    except OSError:  # nowhere to keep it
        pass
    return found
