"""What a run writes beside its checkpoints. Where that fails (disk full, directory gone) it is said; training goes on.

Whoever writes such a file has a `Forgiving` around it, or uses a `LineFile`. The outputs of the process may lead to a
full disk too, and its exit code must not depend on it: `say_error` and `leave`.
"""

import errno
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

log = logging.getLogger(__name__)


class Forgiving:
    """A context in which an `OSError` goes no further. It is said once, and again only after it has worked between."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.works = True

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is None:
            self.works = True
        elif isinstance(error, OSError):
            if self.works:
                log.error("%s cannot be written: %s. Training goes on without", self.what, error)
            self.works = False
            return True
        return False


class LineFile:
    """A file that only grows, opened anew for each addition, so that it may be moved or removed meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forgiving = Forgiving(str(path))

    def write(self, lines: str) -> bool:
        """Add whole lines, or nothing if they cannot be written; whether they were."""
        data = lines.encode()
        with self._forgiving:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                if file.write(data) < len(data):  # a disk that fills up takes a part
                    file.truncate(before)
                    raise OSError(errno.ENOSPC, "no space for a whole line")
        return self._forgiving.works


def say_error(text: str) -> None:
    """Print to standard error, if it can be written."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End the process with this exit code. Python would put 120 in its place where an output cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what Python tries again at the end
    sys.exit(code)
