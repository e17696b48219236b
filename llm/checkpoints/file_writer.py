"""A process that writes files from memory which it shares with the training process, while that continues.

It runs as a script, and imports nothing that takes time or memory. Each line of its input is a request in
JSON: paths, and where their contents are in the memory. Each line of its output is an answer. It ends when
its input does, and so with the training process, however that ends.
"""

import hashlib
import json
import mmap
import os
import queue
import signal
import sys
import threading
from pathlib import Path

PIECE = 1 << 24  # bytes at a time
NICENESS = 5  # so that training is hardly slower; at 10, writing takes four times as long on a busy machine


def write(memory: mmap.mmap, path: Path, begin: int, end: int) -> str:
    """Write a part of memory to a new file and read it back; returns its SHA-256.

    Raises:
        OSError: it cannot be written, or is read back differently.
    """
    digest = hashlib.sha256()
    pieces = [(place, min(place + PIECE, end)) for place in range(begin, end, PIECE)]
    with path.open("xb") as file:
        for first, last in pieces:
            piece = memory[first:last]
            file.write(piece)
            digest.update(piece)
    with path.open("rb") as file:
        for first, last in pieces:
            if file.read(last - first) != memory[first:last]:
                raise OSError(
                    f"{path.name} was not read back as it was written: the disk or the memory is faulty"
                )
    return digest.hexdigest()


def answer(descriptor: int, request: dict[str, tuple[int, int]]) -> dict[str, str]:
    """The checksums by path; or what went wrong, as `error`."""
    try:
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as memory:
            return {path: write(memory, Path(path), *place) for path, place in request.items()}
    except OSError as error:
        return {"error": error.strerror or str(error)}


def main() -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the run saves, and then ends this process
        signal.signal(each, signal.SIG_IGN)
    os.nice(NICENESS)
    requests: queue.Queue[str] = queue.Queue()

    def work() -> None:
        while True:
            print(json.dumps(answer(int(sys.argv[1]), json.loads(requests.get()))), flush=True)

    threading.Thread(target=work, daemon=True).start()
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)  # also in the middle of a file


if __name__ == "__main__":
    main()
