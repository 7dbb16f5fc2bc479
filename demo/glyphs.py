"""Characters as the designers of many fonts drew them: which fonts have which, and the ink of one.

Used by make_data.py; fonts are any folder of TrueType or OpenType files, by default those inside the package trdg.
"""
import functools
import importlib.util
import os
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CATEGORIES = "LNSP"         # letters, numbers, symbols, punctuation: all that leave ink
EM = 40                     # pixels per em of a glyph's mask: its ink is then about as large as in the final image
SMALL_EM = 96               # for glyphs such as "." that would have a few pixels otherwise


def default_fonts():
    """Folder of the fonts inside the package trdg, which is not imported: its dependencies are not installed."""
    spec = importlib.util.find_spec("trdg")
    folder = spec and os.path.join(spec.submodule_search_locations[0], "fonts", "latin")
    if not folder or not os.path.isdir(folder):
        raise ValueError("the package trdg, whose fonts draw the images, is not installed: "
                         "pip install --no-deps -r requirements-demo.txt, or name a folder of fonts by --fonts")
    return folder


def find_fonts(folder):
    """Paths of the .ttf and .otf files of a folder and those below it that have the letters A-Z, sorted by their names there."""
    from fontTools.ttLib import TTFont, TTLibError
    if not os.path.isdir(folder):
        raise ValueError(f"--fonts {folder} is not a folder")
    found, seen, paths = [], set(), []
    for at, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if os.path.realpath(at) in seen:        # a link to a folder above leads around for ever
            folders.clear()
            continue
        seen.add(os.path.realpath(at))
        found += [os.path.relpath(os.path.join(at, name), folder) for name in names]
    for name in sorted(found):
        path = os.path.join(folder, name)
        if name.lower().endswith((".ttf", ".otf")) and os.path.isfile(path):
            try:
                with TTFont(path, lazy=True) as font:
                    if set(range(ord("A"), ord("Z") + 1)) <= set(font.getBestCmap() or ()):
                        paths.append(path)
            except (TTLibError, OSError, KeyError, AssertionError) as e:
                raise ValueError(f"{path} is not a font that can be read: {e}")
    if not paths:
        raise ValueError(f"{folder} and the folders below it have no .ttf or .otf font with the letters A-Z")
    return paths


def coverage(path):
    """Code points that a font draws, and those that it draws unlike any lower code point.

    Returns two sorted lists. A character counts if its category is letter, number, symbol or punctuation, it leaves
    ink, and it is not the font's sign for a missing character. The second list leaves out what is a second name for
    the same picture, such as Greek Alpha beside Latin A, or a small letter in a font of capitals.
    """
    from fontTools.ttLib import TTFont
    with TTFont(path, lazy=True) as font:
        cmap = font.getBestCmap()
        missing = font.getGlyphOrder()[0]
    drawn, distinct, seen = [], [], set()
    for code in sorted(cmap):
        if unicodedata.category(chr(code))[0] not in CATEGORIES or cmap[code] == missing:
            continue
        mask = _draw(path, code, EM)
        if mask is None:
            continue
        drawn.append(code)
        picture = mask.size, mask.tobytes()
        if picture not in seen:
            distinct.append(code)
            seen.add(picture)
    return drawn, distinct


@functools.lru_cache(None)
def _font(path, em):
    return ImageFont.truetype(path, em, layout_engine=ImageFont.Layout.BASIC)


def _draw(path, code, em):
    """Mask of a glyph cut to its ink, mode L, or None if it has none."""
    font, text = _font(path, em), chr(code)
    x0, y0, x1, y1 = font.getbbox(text)
    if x1 <= x0 or y1 <= y0:
        return None
    image = Image.new("L", (x1 - x0, y1 - y0))
    ImageDraw.Draw(image).text((-x0, -y0), text, 255, font)
    box = image.getbbox()
    return image if box == (0, 0, *image.size) else image.crop(box) if box else None


@functools.lru_cache(16384)
def glyph(path, code):
    """(mask of the ink, mode L; longer side of the ink in em). The cache holds about 16 MB."""
    mask = _draw(path, code, EM)
    extent = max(mask.size) / EM
    if extent < 0.4:
        mask = _draw(path, code, SMALL_EM)
    return mask, extent


def choose_distinct(paths, codes, distinct, count):
    """Choose the `count` of `codes` that are easiest to tell apart, in the order given.

    paths: n fonts; distinct: for each font the set of code points that it draws unlike others; codes: candidates.
    A pair is as easy as its d': glyphs fitted into one square (as images vary in size and place) and projected on the
    difference of the two characters' means over the fonts; the distance of the projected means is divided by the
    spread over fonts. So C and c, or full stop and middle dot, whose difference is less than that of two fonts, are
    twins, while an accent tells characters apart. Of the least distinct pair the later code goes, until `count` remain.
    """
    n = len(codes)
    if count > n:
        raise ValueError(f"{count} characters wanted, but only {n} are in enough fonts of the folder")
    pictures = [np.stack([_fitted(p, c) for p, have in zip(paths, distinct) if c in have]) for c in codes]
    means = np.stack([x.mean(axis=0) for x in pictures])                  # (n, d)
    centre, spread = np.empty((n, n)), np.empty((n, n))
    for i, x in enumerate(pictures):
        y = x @ means.T                                                   # (fonts, n)
        y = y[:, i:i + 1] - y                                             # on mean i - mean j
        centre[i], spread[i] = y.mean(axis=0), y.var(axis=0)
    apart = (centre + centre.T) / np.sqrt((spread + spread.T) / 2 + 1e-9)
    apart[np.tril_indices(n)] = np.inf                                    # pairs (earlier, later)
    keep = np.ones(n, bool)
    for _ in range(n - count):
        drop = np.unravel_index(np.argmin(apart), apart.shape)[1]
        keep[drop] = False
        apart[drop] = apart[:, drop] = np.inf
    return [code for code, kept in zip(codes, keep) if kept]


def _fitted(path, code):
    """Mask of a glyph scaled into a square, as a unit vector float32 (side * side,)."""
    side, (mask, _) = 20, glyph(path, code)
    scale = side / max(mask.size)
    w, h = (max(1, round(s * scale)) for s in mask.size)
    x = np.zeros((side, side), np.float32)
    top, left = (side - h) // 2, (side - w) // 2
    x[top:top + h, left:left + w] = np.asarray(mask.resize((w, h), Image.Resampling.BOX))
    return x.ravel() / max(np.linalg.norm(x), 1e-9)
