"""What a run writes beside its checkpoints. Where that fails (disk full, directory gone) it is said; training goes on.

Whoever writes such a file has a `Forgiving` around it, or uses a `LineFile`.
"""

import errno
import logging
from pathlib import Path
from types import TracebackType

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
