"""Text in drawn images: a font that has its characters, and lines that fit."""

import re
import sys
from functools import cache, lru_cache

from matplotlib.font_manager import findSystemFonts
from PIL import ImageFont

SIZE = 18  # at which fonts are looked into
NO_CHARACTER = "\U0010fffe"  # which no font has
WIDE = r"\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"  # Chinese, Japanese, Korean
# marks that begin no line
CLOSING = r"\u3001\u3002\uff0c\uff1b\uff1a\uff01\uff1f\uff09\u300b\u300d\u300f\u3011\u2019\u201d"
# What stays together in a line: a word, blanks, or a character of WIDE with the closing marks behind it
PIECES = re.compile(rf"[^\s{WIDE}]+|\s+|[{WIDE}][{CLOSING}]*")


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font for a text: Pillow's own, or if that lacks characters, the font of this system that lacks fewest. If none
    has them all, prints once which packages bring fonts."""
    font = ImageFont.load_default(size)
    wanted = frozenset(character for character in text if character.isprintable() and not character.isspace())
    path = system_font(wanted) if lacks(font, wanted) else None
    return ImageFont.truetype(path, size) if path else font


@lru_cache(maxsize=100)
def system_font(wanted: frozenset[str]) -> str | None:
    """The font file that lacks fewest of these characters; None if Pillow's own font lacks no more."""
    best, lacking = None, lacks(ImageFont.load_default(SIZE), wanted)
    for path in system_fonts():
        try:
            left = lacks(ImageFont.truetype(path, SIZE), wanted)
        except OSError:  # bitmap fonts, and broken ones
            continue
        if len(left) < len(lacking):
            best, lacking = path, left
        if not lacking:
            break
    if any(character.isalpha() for character in lacking):
        note_once()
    return best


def lacks(font: ImageFont.FreeTypeFont, characters: frozenset[str]) -> frozenset[str]:
    """The characters that a font draws as its box for missing ones."""
    box = glyph(font, NO_CHARACTER)
    return frozenset(each for each in characters if glyph(font, each) == box)


def glyph(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    """The size and pixels of a character."""
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@cache
def system_fonts() -> list[str]:
    """The fonts of this system, those for Chinese first."""
    names = re.compile(r"cjk|wqy|wenquan|sourcehan|noto\w*sc|msyh|simhei|simsun|pingfang|heiti|droidsansfallback", re.I)
    return sorted(findSystemFonts(), key=lambda path: (not names.search(path), path))


@cache
def note_once() -> None:
    """Prints once that a drawn text has boxes in it."""
    hint = "apt install fonts-noto-cjk brings one for Chinese, Japanese and Korean (fonts-noto-core for others)"
    print(f"note: no font here has all characters of these captions; {hint}", file=sys.stderr, flush=True)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Breaks a text into at most `lines` lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    done, line = [], ""
    for word in PIECES.findall(" ".join(text.split())):
        pieces = [word] if font.getlength(word) <= width else [*word]  # a word that is longer than a line
        for piece in pieces:
            if font.getlength(line + piece.rstrip()) > width and line:
                done.append(line.rstrip())
                line = ""
            line += piece if line or piece.strip() else ""
    done.append(line.rstrip())
    if len(done) > lines:
        last = done[lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        done = [*done[: lines - 1], last + "..."]
    return done
