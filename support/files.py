"""Errors and files: one-line errors, JSONL that is written whole or line by line, records that hold together, locks,
hashes.

Works without torch and imports nothing of ours.
"""

import hashlib
import json
import os
from contextlib import contextmanager, suppress
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
    """The objects of a JSONL file, without their checks, if any.

    Errors: UserError that names the file, and the line that cannot be read, or whose check is wrong.
    """
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
            objects.append(as_object(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not a JSON object ({error})") from None
    return unchained(objects, path)


def read_object(path):
    """The object of a JSON file. Errors: UserError if there is none."""
    try:
        return as_object(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def as_object(text):
    """The object that a JSON text is. Errors: ValueError, also where it is nested deeper than Python can read."""
    try:
        read = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(read, dict):
        raise ValueError("not an object")
    return read


def as_lines(objects):
    """JSONL: an object a line."""
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def write_jsonl(path, objects):
    """Write a JSONL file, whole or not at all."""
    write_whole(path, as_bytes(as_lines(objects)))


def write_json(path, record):
    """Write one indented JSON file, whole or not at all."""
    write_whole(path, as_bytes(as_json(record)))


def as_json(record):
    """One indented JSON text."""
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def as_bytes(text):
    """UTF-8. Errors: UserError for a text that no file can hold: one with half of a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        place = ascii(text[max(0, error.start - 20) : error.start + 1])
        raise UserError(f"half of a surrogate pair, which no file can hold, behind {place}: mend that text") from None


def write_whole(path, content):
    """Write bytes to a temporary file that then takes the place of the old one."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # its own, lest another process take it away
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- Records that hold together ------------------------------------------------------------------------
#
# Each record of a run has a check: a hash of itself and of the record before it, with that one's check. So a line that
# was changed, lost or moved, or that stands twice, is found before a run goes on from it. The files of older versions
# have no checks, and are read without.

CHECK = "record_check"  # the name of that field
TIMES = ("seconds", "minutes")  # are not in it: two runs with the same result have the same checks
CHANGED = (
    "lines were changed, lost or moved. Remove the lines from here on, which are then made again, or choose another "
    "folder"
)


def check_of(record, before=None):
    """The check of a record behind another one, if there is one."""
    hashed = [{name: value for name, value in one.items() if name not in TIMES} for one in (before or {}, record)]
    return text_hash(json.dumps(hashed))


def chained(records, before=None):
    """The records, each with its check. before: the one, if any, that they stand behind."""
    for record in records:
        before = record | {CHECK: check_of(record, before)}
        yield before


def unchained(records, path):
    """The records without their checks. Errors: UserError that names the line of the file at which one is wrong."""
    found, before, any_check = [], None, False
    for number, record in enumerate(records, 1):
        bare = {name: value for name, value in record.items() if name != CHECK}
        any_check = any_check or CHECK in record
        good = not any_check or record.get(CHECK) == check_of(bare, before)
        require(good, f"{path}, line {number}: it is not what was written here, {CHANGED}")
        found.append(bare)
        before = record
    return found


def write_chained(path, records):
    """Write a JSONL file of records with their checks, whole or not at all."""
    write_jsonl(path, chained(records))


def append_jsonl(path, *records):
    """Append records with their checks and see them on disk, so that a killed run loses at most what it was writing."""
    lines = as_bytes(as_lines(chained(records, last_record(path))))
    with open(path, "ab") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def last_record(path):
    """The object on the last line of a file, read from its end; None where there is none."""
    if not Path(path).exists():
        return None
    with open(path, "rb") as file:
        size, wanted = file.seek(0, os.SEEK_END), 2**16
        lines = []
        while len(lines) < 2 and wanted < 2 * max(size, 2**16):
            file.seek(max(0, size - wanted))
            lines, wanted = file.read().rstrip().split(b"\n"), 2 * wanted
    try:
        return as_object(lines[-1]) if lines[-1] else None
    except ValueError as error:
        raise UserError(f"{path}, last line: not a JSON object ({error})") from None


def read_appended(path):
    """The records of a file that grows line by line, without their checks; [] if there is no file.

    The file is mended: a last line cut short and blank lines at the end are removed, and a last line that only lacks
    its newline gets it. Errors: those of `read_jsonl`.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    kept = content.rstrip()
    last = kept[kept.rfind(b"\n") + 1 :]
    try:
        json.loads(last or b"{}")
    except ValueError:
        if not content.endswith(b"\n"):  # cut short
            kept = kept[: len(kept) - len(last)].rstrip()
    except RecursionError:
        pass  # `read_jsonl` says so
    mended = kept + b"\n" if kept else b""
    if mended != content:
        os.truncate(path, len(kept))
        with open(path, "ab") as file:
            file.write(mended[len(kept) :])
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
def alone_in(folder, patience=0):
    """Keeps two processes from writing into one folder. The folder is made, and is gone again if nothing was written.

    patience: seconds to wait for another process that is at work there. Errors: UserError if it still is then.
    """
    folder = Path(folder)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    MADE.append(made)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(f"another process is at work in {folder}: wait for it, or choose another folder") from None
    try:
        yield
    finally:
        remove_empty(made)
        MADE.remove(made)
        lock.release()


MADE = []  # for each `alone_in` under way the folders that it made
NOTHING = {".lock", "run.json"}  # files that say nothing alone: settings of a run without a step


def remove_empty(folders):
    """Remove the folders, each the one in which that before it lies, as far as they hold none but `NOTHING`."""
    with suppress(OSError):
        for folder in folders:
            names = {path.name for path in folder.iterdir()}
            if ".lock" in names and names <= NOTHING:
                for name in sorted(names, reverse=True):  # the lock last: until then nobody else begins here
                    (folder / name).unlink()
            folder.rmdir()


def remove_all_empty():
    """What `alone_in` does at its end, for a process that ends in the middle of it."""
    for folders in MADE:
        remove_empty(folders)


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
