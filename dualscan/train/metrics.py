"""Metrics as JSON lines: one flushed line per record, so that a run that dies keeps everything it measured."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dualscan.data._files import write_text

Record = dict[str, Any]

FILE = "metrics.jsonl"


def read(path: Path) -> list[Record]:
    """The records of a metrics file; a last line that a crash cut short is left out.

    Raises:
        ValueError: a line before the last is not JSON.
    """
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {line[:60]!r}; remove it.") from error
    return records


class MetricsLog:
    """Appends records to a JSON-lines file; a context manager.

    Args:
        path: the file; made where it does not exist.
        after_step: keep only what is there up to this step, because training goes on from it; None starts an empty
            file.
    """

    def __init__(self, path: Path, *, after_step: int | None = None) -> None:
        kept = []
        if after_step is not None and path.exists():
            kept = [record for record in read(path) if record["step"] <= after_step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, step: int, **values: float | int | str | None) -> None:
        """Writes one record and flushes it to the system.

        Args:
            step: optimizer steps done.
            **values: names and numbers, such as `loss`, `lr`, `tokens_per_s`, `validation_bpb`.
        """
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file; writing afterwards is an error."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
