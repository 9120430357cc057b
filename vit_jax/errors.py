"""What is no bug of ours: the user can mend it, or wanted it so."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was found, what was expected and what to do, in one sentence.

    The command line prints it without a traceback and ends with exit code 2. Names out of files
    are part of it, so that what a terminal would obey is written out.
    """

    def __init__(self, message: str):
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(text if len(text) < 2000 else f"{text[:1900]} ...")


class Stopped(Exception):
    """SIGTERM came (or, to a sweep, SIGINT); all has been saved, and the same command goes on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of a sentence that names what `name` may have meant, out of `known`."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
