"""Sanitises untrusted text from devices, files and command lines for terminals and web pages.

Control characters move the cursor and change window titles; bidirectional marks reorder text. Both are removed here, in
one place. The code that prints the text escapes it for its own markup (HTML, rich).
"""

from __future__ import annotations

import re
import unicodedata

LONGEST_MESSAGE = 1500
"""Maximum number of characters of an error's message or hint."""

LONGEST_WORD = 300
"""Maximum number of characters without a blank in a message; long enough for a usual path."""

# CSI; strings (OSC, DCS, SOS, PM, APC) to their terminator or the line's end; other escapes: ECMA-48, 5.4 and 5.6
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\r\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)


def plain(text: str, *, lines: bool = False) -> str:
    r"""Remove terminal sequences, control characters, and bidirectional and other format marks.

    Whitespace of any kind becomes a plain blank, and undecodable bytes of a file name become the replacement character.

    Args:
        text: Text from any source.
        lines: Whether to keep line breaks and tabs; otherwise they become blanks.

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
    if category == "Cs":  # a lone surrogate: Python's form of bytes in a file name that are not UTF-8
        return "\ufffd"
    return " " if category[0] == "Z" or char in "\t\n\v\f\r\x85" else ""


def short(text: str, longest: int) -> str:
    """Shorten the text to at most `longest` characters by leaving out its middle."""
    if len(text) <= longest:
        return text
    tail = (longest - 5) // 3
    return f"{text[: longest - 5 - tail]} ... {text[len(text) - tail :]}"


def message_text(text: str) -> str:
    """Sanitise the text of an error, and bound the length of each word and of the whole."""
    bounded = re.sub(
        rf"\S{{{LONGEST_WORD + 1},}}",
        lambda word: short(word[0], LONGEST_WORD // 2),
        plain(text, lines=True),
    )
    return short(bounded, LONGEST_MESSAGE)
