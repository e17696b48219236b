"""Answers for programs that run the scripts: with `output=json`, one object on standard output.

Everything that is printed for people, also by child processes, then goes to standard error.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.files import as_json, as_typed
from llm.outcome import Outcome

KEY = re.compile(r"\+*output=(.*)")
FORMS = ("text", "json")

_told: dict[str, Any] = {}  # the answer so far, about the run or sweep of this process


def form_of(arguments: list[str]) -> tuple[str, list[str]]:
    """The form that `output=…` asks for, and the other arguments.

    Raises:
        UserError: there is no such form.
    """
    asked = [match[1] for each in arguments if (match := KEY.fullmatch(each))]
    form = asked[-1] if asked else FORMS[0]
    if form not in FORMS:
        raise UserError(f"output={form}: must be one of {', '.join(FORMS)} (json: one object for a program)")
    return form, [each for each in arguments if not KEY.fullmatch(each)]


def tell(outcome: Outcome, folder: Path | None = None, reused: bool = False) -> None:
    """Set the answer. The last call counts: a sweep ends after its jobs."""
    _told.update(
        folder=str(as_typed(folder)) if folder else None,
        reused=reused,
        figures=outcome.figures,
        files={name: str(as_typed(path)) for name, path in outcome.files.items()},
        next=outcome.next,
    )


def tell_error(error: str) -> None:
    """Print why a script failed, and put it in the answer."""
    _told["error"] = error
    print(f"error: {error}", file=sys.stderr)


@contextmanager
def answered(script: str) -> Iterator[None]:
    """At the end, print the answer and nothing else to standard output."""
    _told.clear()
    _told.update(folder=None, reused=False, figures={}, files={}, next={}, error=None)
    out, status = sys.stdout, 0
    out.flush()
    descriptor = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    except BaseException as error:
        status, _told["error"] = 1, _told["error"] or f"{type(error).__name__}: {error}"
        raise
    finally:
        os.dup2(descriptor, 1)
        os.close(descriptor)
        state = "finished" if status == 0 else "interrupted" if status > 128 else "failed"
        print(as_json({"script": script, "status": state, **_told}), file=out, flush=True)
