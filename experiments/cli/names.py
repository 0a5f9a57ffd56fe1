"""Names of flags, and the one that a mistyped flag was meant to be."""

import difflib
from collections.abc import Iterable, Mapping, Sequence


def flag_of(field: str) -> str:
    """The flag of a field; its prefix, if any, ends with a dot."""
    return "--" + field.replace("_", "-")


def flag_in(word: str) -> str:
    """The flag in a word of a command line, such as --n-heads in `--n_heads=4`."""
    return word.partition("=")[0].replace("_", "-")


def nearest(word: str, flags: Iterable[str], misspelt: Mapping[str, Sequence[str]]) -> str | None:
    """The flag that is most like a word, or flags, joined by "or"; None if no flag is.

    Args:
        word: of the command line.
        flags: the flags that there are.
        misspelt: other spellings, each with the flags that it may mean.
    """
    near = difflib.get_close_matches(flag_in(word), [*flags, *misspelt], 1)
    return " or ".join(misspelt.get(near[0], near)) if near else None
