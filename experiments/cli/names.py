"""Names of flags, and the one that a mistyped flag was meant to be."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

TASK = "task"
"""The flag of a field `task_name`; `task` is the field with the task's own flags."""


def flag_of(field: str) -> str:
    """The flag of a field; its prefix, if any, ends with a dot."""
    return "--" + (TASK if field == "task_name" else field.replace("_", "-"))


def flag_in(word: str) -> str:
    """The flag in a word of a command line, such as --n-heads in `--n_heads=4`."""
    return word.partition("=")[0].replace("_", "-")


def value_of(flag: str, args: Sequence[str]) -> str | None:
    """The last value of a flag on a command line, if any."""
    value = None
    for i, word in enumerate(args):
        name, equals, given = word.partition("=")
        if name == flag and (equals or i + 1 < len(args)):
            value = given if equals else args[i + 1]
    return value


def nearest(word: str, flags: Iterable[str], misspelt: Mapping[str, Sequence[str]]) -> str | None:
    """The flag that is most like a word, or flags, joined by "or"; None if no flag is.

    Args:
        word: of the command line.
        flags: the flags that there are.
        misspelt: other spellings, each with the flags that it may mean.
    """
    near = difflib.get_close_matches(flag_in(word), [*flags, *misspelt], 1)
    return " or ".join(misspelt.get(near[0], near)) if near else None
