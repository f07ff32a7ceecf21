"""Errors and files: one-line errors, JSONL that is written whole or line by line, locks, hashes.

Works without torch and imports nothing of ours.
"""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

ROOT = Path(__file__).parent.parent  # of the repository


class UserError(ValueError):
    """A mistake the user can mend. Scripts print it as one line and exit with code 2."""


def require(condition, message):
    """Errors: UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


# --- JSONL and JSON ------------------------------------------------------------------------------------


def read_jsonl(path):
    """The objects of a JSONL file. Errors: UserError that names the file, and the line that cannot be read."""
    try:
        # Lines end in \n alone: other separators of lines that Unicode knows may stand in a text.
        content = Path(path).read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not content:
        return []
    objects = []
    for number, line in enumerate(content.split("\n"), 1):
        try:
            read = json.loads(line)
            if not isinstance(read, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not a JSON object ({error})") from None
        objects.append(read)
    return objects


def as_lines(objects):
    """JSONL: an object a line."""
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def write_jsonl(path, objects):
    """Write a JSONL file, whole or not at all."""
    write_whole(path, as_lines(objects))


def write_json(path, record):
    """Write one indented JSON file, whole or not at all."""
    write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_whole(path, text):
    """Write to a temporary file that then takes the place of the old one."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # its own, lest another process take it away
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_jsonl(path, *records):
    """Append objects and see them on disk, so that a killed run loses at most what it was writing."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(as_lines(records))
        file.flush()
        os.fsync(file.fileno())


def read_appended(path):
    """The objects of a file that grows line by line; [] if there is no file.

    The file is mended: a last line cut short is removed, and one that only lacks its newline gets it.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1  # bytes up to the last newline
    if last := content[whole:]:
        try:
            json.loads(last)
        except ValueError:
            os.truncate(path, whole)
        else:
            with open(path, "ab") as file:
                file.write(b"\n")
    return read_jsonl(path)


def require_fields(records, path, **kinds):
    """The records, if each has these fields, of these types. Errors: UserError that names file, line and field."""
    for number, record in enumerate(records, 1):
        for name, kind in kinds.items():
            value = record.get(name)
            fits = name in record and isinstance(value, kind) and (kind is not str or is_text(value))
            require(fits, f"{path}, line {number}: no {name}, or another type than stage 02 or 03 writes")
    return records


def is_text(text):
    """Whether it can be written as UTF-8: no half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


# --- Locks and hashes ------------------------------------------------------------------------------------


@contextmanager
def alone_in(folder):
    """Keeps two processes from writing into one folder. Errors: UserError if another is at work there."""
    lock = FileLock(Path(folder) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is at work in {folder}: wait for it, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def short_name(model):
    """A model's name in tables: the last two parts of its hub name or folder."""
    return "/".join(Path(model).parts[-2:])


def sha256(path):
    """The hash of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(text):
    """A short hash of a text: 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
