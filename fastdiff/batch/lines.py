"""From files and prompts to lines: the fields of each job as written, and where they stand."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.cli.errors import InputError

_JSONL, _TABLES = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}
_SEPARATORS = ",;\t"


@dataclass(frozen=True)
class Line:
    """One job as written. where: such as "jobs.jsonl:3". home: what relative paths start from."""

    where: str
    fields: dict[str, Any]
    home: Path = Path()


def read(source: Path) -> list[Line]:
    """The lines of a .jsonl, .csv or .tsv file; any other file is text, a prompt a line."""
    text = _text(source)
    suffix = source.suffix.lower()
    if suffix in _JSONL:
        found = _from_jsonl(source, text)
    elif suffix in _TABLES:
        found = _from_table(source, text, _TABLES[suffix])
    elif suffix == ".json":
        raise InputError(f"{str(source)!r}: give a .jsonl file, one JSON object a line")
    else:
        found = [(number, {"prompt": line.strip()})
                 for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not found:
        raise InputError(f"{str(source)!r} holds no job")
    return [Line(f"{source}:{number}", fields, source.parent) for number, fields in found]


def given(jobs: Iterable[str | Mapping[str, Any]]) -> list[Line]:
    """Lines of prompts and mappings that come from Python."""
    found = []
    for number, job in enumerate(jobs, 1):
        if not isinstance(job, (str, Mapping)):
            raise InputError(f"job {number} is a {type(job).__name__}: accepted is a prompt or a "
                             "dict of fields")
        found.append(Line(f"job {number}", {"prompt": job} if isinstance(job, str)
                          else {name_of(name): value for name, value in job.items()}))
    return found


def name_of(name: str) -> str:
    """The one spelling of a field's name."""
    return str(name).strip().lower().replace("-", "_")


def _text(source: Path) -> str:
    try:
        # a file from a spreadsheet may begin with a byte order mark
        return source.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"the file {str(source)!r} does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{str(source)!r} is not UTF-8 text: {error.reason} at byte "
                         f"{error.start}") from None
    except OSError as error:
        raise InputError(f"cannot read {str(source)!r}: {error.strerror}") from None


def _from_jsonl(source: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    found = []
    # only "\n" ends a line: JSON text may hold other line ends inside a string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        try:
            content = json.loads(line, object_pairs_hook=lambda p, where=where: _once(where, p))
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON: {error.msg} at character {error.pos + 1}"
                             ) from None
        if isinstance(content, str):
            content = {"prompt": content}
        if not isinstance(content, dict):
            raise InputError(f"{where}: accepted is an object such as {{\"prompt\": \"a cat\"}}, "
                             "or a prompt in quotes")
        found.append((number, content))
    return found


def _from_table(source: Path, text: str, delimiter: str) -> list[tuple[int, dict[str, Any]]]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(text, delimiter),
                      strict=True)
    found: list[tuple[int, dict[str, Any]]] = []
    header: list[str] | None = None
    begin = 1
    try:
        for row in rows:
            where, begin = f"{source}:{begin}", rows.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = list(_once(where, [(name, None) for name in row]))
                continue
            if len(row) > len(header):
                raise InputError(f"{where}: {len(row)} cells, but the header has {len(header)}; "
                                 "put quotes around a text that holds the separator")
            cells = zip(header, row, strict=False)
            number = int(where.rpartition(":")[2])
            found.append((number, {name: cell.strip() for name, cell in cells if cell.strip()}))
    except csv.Error as error:
        raise InputError(f"{source}:{rows.line_num}: {error}") from None
    return found


def _separator(text: str, usual: str) -> str:
    """The one separator in the header, as a spreadsheet may write another than the usual one.

    csv.Sniffer would guess, from letters too; no name of a field holds a separator.
    """
    header = next((line for line in text.splitlines() if line.strip()), "")
    there = [separator for separator in _SEPARATORS if separator in header]
    return there[0] if len(there) == 1 else usual


def _once(where: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of `pairs`; a name that is empty or comes twice is refused."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        key = name_of(name)
        if not key:
            raise InputError(f"{where}: a field has no name")
        if key in found:
            raise InputError(f"{where}: {key} is given twice")
        found[key] = value
    return found
