"""Foreign text made fit to be shown: what a device, a file or a command line says reaches terminals and pages.

Control characters move the cursor and retitle windows, and bidirectional marks reorder what is read; both are removed
here, in one place. Escaping for markup (HTML, rich) is left to what prints, which knows its markup.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST_MESSAGE = 1500
"""Characters of an error's message or hint."""

LONGEST_WORD = 300
"""Characters without a blank in a message: room for any usual path."""

# CSI; strings (OSC, DCS, SOS, PM, APC) to their terminator or the line's end; other escapes: ECMA-48, 5.4 and 5.6
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\r\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)


def plain(text: str, *, lines: bool = False) -> str:
    r"""The text without terminal sequences, control characters, and bidirectional and other format marks.

    Blanks of any kind become a plain blank, and undecodable bytes of a file's name the replacement character.

    Args:
        text: From anywhere.
        lines: Whether line breaks and tabs stay; else they become blanks.

    >>> plain("bad \x1b[2J\x1b]0;title\x07\u202ename")
    'bad name'
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        char if char in kept or char.isprintable() else _instead(char)
        for char in _SEQUENCE.sub("", text.replace("\r\n", "\n"))
    )


def _instead(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cs":  # half of a pair, as Python writes bytes of a file's name that are no UTF-8
        return "\ufffd"
    return " " if category[0] == "Z" or char in "\t\n\v\f\r\x85" else ""


def short(text: str, longest: int) -> str:
    """The text in at most `longest` characters: where it is longer, its middle is left out."""
    if len(text) <= longest:
        return text
    tail = (longest - 5) // 3
    return f"{text[: longest - 5 - tail]} ... {text[len(text) - tail :]}"


def message_text(text: str) -> str:
    """What an error says: plain, each word and the whole of bounded length, whatever was put into it."""
    bounded = re.sub(
        rf"\S{{{LONGEST_WORD + 1},}}",
        lambda word: short(word[0], LONGEST_WORD // 2),
        plain(text, lines=True),
    )
    return short(bounded, LONGEST_MESSAGE)
