"""Results: one JSON file a machine, one row a line.

A row belongs to the run that measured it; a later run replaces the rows that it measures again and leaves the others.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
KEY = ("test", "loss", "shape", "dtype", "variant", "work", "library", "threads")

Row = dict[str, Any]


class BadResults(Exception):
    """A results file that cannot be used; the message is one line."""


def fallback_folder() -> Path:
    return Path(tempfile.gettempdir()) / "nbloss-bench"


def load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        schema = content["schema"]
    except OSError as error:
        raise BadResults(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise BadResults(f"{path}: not a results file of nbloss; move it away and measure again") from None
    if schema != SCHEMA:
        raise BadResults(
            f"{path}: results of version {schema}, not of version {SCHEMA}; move it away and measure again"
        )
    return content  # type: ignore[no-any-return]


def key(row: Row) -> tuple[object, ...]:
    """What a row has in common with the one it replaces: a ceiling is one figure, whichever library set it."""
    return tuple(row.get(name) for name in KEY if name != "library" or row.get("test") != "ceiling")


class Store:
    """The rows of this run, on top of what the machine's file held; written after every measurement.

    Without `keep` they go to a file in the temporary folder that the next such run replaces.
    """

    def __init__(
        self, machine: dict[str, Any], run: dict[str, Any], say: Callable[[str], None], keep: bool = True
    ) -> None:
        folder = FOLDER if keep else fallback_folder()
        self.path = folder / f"{machine['slug']}.json"
        self.rows: dict[tuple[object, ...], Row] = {}
        self.runs: list[dict[str, Any]] = []
        self.run, self._machine, self._say = run, machine, say
        if keep and self.path.exists():
            old = load(self.path)
            self.runs = old["runs"]
            self.rows = {key(row): row for row in old["rows"]}
        self.runs = [*self.runs, run]
        self._number = max((r["id"] for r in self.runs[:-1]), default=0) + 1
        run["id"] = self._number

    def new_rows(self) -> list[Row]:
        return [row for row in self.rows.values() if row["run"] == self._number]

    def add(self, rows: list[Row]) -> None:
        for row in rows:
            row["run"] = self._number
            self.rows.pop(key(row), None)
            self.rows[key(row)] = row
        self.write()

    def write(self) -> None:
        """Write the file; where its folder cannot be written, to the temporary folder, and say so once."""
        try:
            self._write(self.path)
        except OSError as error:
            if self.path.parent == fallback_folder():
                raise
            other = fallback_folder() / f"{self.path.stem}-{time.strftime('%Y%m%d-%H%M%S')}.json"
            self._say(f"{self.path.parent} cannot be written ({error.strerror}): results go to {other}")
            self.path = other
            self._write(other)

    def _write(self, path: Path) -> None:
        used = {row["run"] for row in self.rows.values()}
        lines = [json.dumps(row) for row in self.rows.values()]
        runs = [json.dumps(run) for run in self.runs if run["id"] in used]
        head = f'"schema": {SCHEMA},\n"machine": {json.dumps(self._machine)}'
        text = "{" + ",\n".join((head, _listed("runs", runs), _listed("rows", lines))) + "\n}\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_text(text)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _listed(name: str, lines: list[str]) -> str:
    return f'"{name}": [\n' + ",\n".join(lines) + "\n]"
