"""A file of a run that grows line by line: `metrics.jsonl`, `samples.jsonl`."""

import logging
import os
from pathlib import Path

from llm.files import append, replacing, writing
from llm.run_folder import step_folders

log = logging.getLogger(__name__)


class LineFile:
    """A file of whole lines, which is restored if another program deletes or changes it.

    Lines that are in no checkpoint are kept in memory: those since the newest checkpoint, and those that
    could not be written to a full disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self._size_on_disk()  # bytes written
        self.pending = bytearray()  # to be written
        self._uncopied = bytearray()  # the end of what was written, which no checkpoint holds yet

    def _size_on_disk(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def flush(self) -> None:
        """Write what is pending, after restoring the file if its size has changed.

        Raises:
            UserError: it cannot be written.
        """
        with writing(self.path):
            if self._size_on_disk() != self.size:
                self._restore()
        if self.pending:
            append(self.path, bytes(self.pending))
            self.size += len(self.pending)
            self._uncopied += self.pending
            self.pending.clear()

    def check(self) -> int:
        """Before a checkpoint: check that the file ends as it was written, and forget what the newest
        checkpoint holds. Returns the file's size in bytes.

        Raises:
            UserError: it cannot be written.
        """
        self.flush()
        with writing(self.path):
            if self._uncopied:
                with self.path.open("rb") as file:
                    file.seek(-len(self._uncopied), os.SEEK_END)
                    if file.read() != self._uncopied:
                        self._restore()
            copied = self.size - len(self._uncopied)
            newest = max((copy.stat().st_size for copy in self._copies()), default=0)
        del self._uncopied[: max(0, min(newest, self.size) - copied)]
        return self.size

    def _copies(self) -> list[Path]:
        copies = [folder / self.path.name for folder in step_folders(self.path.parent)]
        return [copy for copy in copies if copy.exists()]

    def _restore(self) -> None:
        copied, found = self.size - len(self._uncopied), self._size_on_disk()
        begin = next((copy.read_bytes() for copy in self._copies() if copy.stat().st_size == copied), b"")
        with replacing(self.path) as temporary:
            temporary.write_bytes(begin + self._uncopied)
        lost = f", but for its first {copied} bytes, which no checkpoint holds" if len(begin) < copied else ""
        log.warning(
            "%s was changed by something else (%s of the %d bytes written): it is restored%s",
            self.path,
            f"{found} bytes" if self.path.exists() and found else "none are there",
            self.size,
            lost,
        )
        self.size = len(begin) + len(self._uncopied)
