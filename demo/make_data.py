"""Demo, first step: draw the embedded data set into the data directory.

Real images to try every stage on without ImageNet and YFCC100M: characters drawn by the designers of about 100 fonts,
under random colours, gradient, rotation, shear, scale, shift, occlusion, blur and noise, 32 x 32 pixels.

Labelled: 300 characters that at least 70 fonts have, 100 training and 30 validation images each; 75 base classes and 75
novel ones in the validation split (set 1), as many in the test split (set 2). Of the characters that qualify, those
that are hard to tell apart by shape alone (C and c) are left out. Background: characters drawn from all that at least
8 fonts have, in proportion to their number of fonts, so that most belong to no labelled class.

reads   a folder of fonts: those inside the package trdg (pip install --no-deps -r requirements-demo.txt), or --fonts
writes  $DDIR/yfcc100m/00/000.zip ...            background; 000.zip holds 000.jpg ... 999.jpg, images 0 to 999. In each
                                                 full zip one image is missing, but never its last, by which the images
                                                 are counted, and one cannot be decoded, as in YFCC100M
        $DDIR/imagenet/{train,val}/U0041/...     labelled images
        $DDIR/imagenet_meta_{train,val}.json     image_names, image_labels (0..299), label_names
        $DDIR/label_idx.json                     class split, class numbers start at 1
        $DDIR/yfcc100m_chars.npy                 uint32 (nbg,): code points of the background, which no stage reads
        $DDIR/glyphs.json                        the fonts and their characters

The same seed and fonts give the same images, whatever the number of processes. What is complete is not made again, so
a run that was cut off goes on, and a larger --nbg adds to the background that is there.

    python demo/make_data.py --nbg 60000
"""
import contextlib
import io
import multiprocessing
import os
import shutil
import signal
import sys
import unicodedata
import zipfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import lowshot  # noqa: E402 F401     before numpy: it names the number of threads
import numpy as np  # noqa: E402
from PIL import Image, ImageFilter  # noqa: E402

from demo.glyphs import choose_distinct, coverage, default_fonts, find_fonts, glyph  # noqa: E402
from lowshot.files import exclusive, full_disk_named, read_json, whole, write_json  # noqa: E402
from lowshot.layout import DataDir  # noqa: E402
from lowshot.machine import end_with_parent, thread_count  # noqa: E402
from lowshot.script import Parser, Progress, log, number, print_header, run  # noqa: E402

SIZE = 32               # pixels
PER_ZIP = 1000
RECIPE = 1              # to be raised with any change of what draw() or the choice of characters does
# streams of random numbers, one generator for each (seed, stream, number)
SPLIT, ZIP, BACKGROUND, TRAIN, VAL = range(5)
YS, XS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1) - 0.5


def arguments():
    parser = Parser(__doc__)
    parser.add_argument("--nbg", type=number(int, 0, 10 ** 8), default=60000, help="number of background images")
    parser.add_argument("--fonts", default="", metavar="DIR",
                        help="folder of .ttf and .otf files, also in folders below it; fewer fonts want a lower "
                             "--minfonts (default: the fonts inside the package trdg)")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, help="seed of all random choices")
    parser.add_argument("--nproc", type=number(int, 1), default=thread_count(),
                        help="number of processes; the images do not depend on it")
    group = parser.add_argument_group("size of the labelled set, for quick trials")
    group.add_argument("--nclass", type=number(int, 4), default=300,
                       help="labelled classes, a multiple of 4: a quarter base and a quarter novel in each split")
    group.add_argument("--ntrain", type=number(int, 1), default=100, help="training images per class")
    group.add_argument("--nval", type=number(int, 1), default=30, help="validation images per class")
    group.add_argument("--minfonts", type=number(int, 1), default=70, help="fonts that have a labelled character")
    group.add_argument("--minfontsbg", type=number(int, 1), default=8, help="fonts that have a background character")
    args = parser.parse_args()
    if args.nclass % 4:
        parser.error(f"--nclass {args.nclass} is not a multiple of 4")
    return args


def main():
    args = arguments()
    ddir = DataDir()
    print_header(args)
    with exclusive(ddir.path("glyphs.json")):
        with multiprocessing.get_context("fork").Pool(args.nproc, _begin) as pool:     # children import nothing anew
            glyphs = load_glyphs(ddir, args, pool)
        # the glyphs are drawn in processes made after they are known, and inherited by them
        with multiprocessing.get_context("fork").Pool(args.nproc, _begin, (glyphs, ddir.root)) as pool:
            make_labelled(ddir, args, glyphs, pool)
            make_background(ddir, args, glyphs, pool)


# ---------------------------------------------------------------------------------------------- characters and fonts

class Glyphs:
    """Which characters are drawn, and by which fonts.

    classes: code points of the labelled classes, increasing. fonts_of: for each the indices of fonts to draw it by.
    background: code points of the background; background_fonts: the same for them.
    """

    def __init__(self, paths, drawn, distinct, classes, minfontsbg, seed):
        self.paths, self.seed, self.classes = paths, seed, classes
        self.fonts_of = _fonts_of(classes, distinct)
        self.background = _common(drawn, minfontsbg)
        self.background_fonts = _fonts_of(self.background, drawn)
        weights = np.array([len(f) for f in self.background_fonts], float)
        self.probability = weights / weights.sum() if len(weights) else weights


def _common(lists, least):
    """The code points that are in so many of the lists, increasing."""
    counts = np.unique(np.concatenate([np.asarray(codes, np.int64) for codes in lists]), return_counts=True)
    return [int(c) for c, n in zip(*counts) if n >= least]


def _fonts_of(codes, lists):
    sets = [set(x) for x in lists]
    return [np.array([i for i, have in enumerate(sets) if c in have], np.int64) for c in codes]


def load_glyphs(ddir, args, pool):
    """Read glyphs.json if it was made from these fonts, or examine the fonts and write it."""
    paths = find_fonts(args.fonts or default_fonts())
    made_from = {"recipe": RECIPE, "seed": args.seed, "nclass": args.nclass, "ntrain": args.ntrain, "nval": args.nval,
                 "minfonts": args.minfonts, "minfontsbg": args.minfontsbg,
                 "fonts": [[os.path.basename(p), os.path.getsize(p)] for p in paths]}
    path = ddir.path("glyphs.json")
    if os.path.exists(path):
        found = read_json(path)
        if found.get("made_from") != made_from:
            old = found.get("made_from") or {}
            name = next((k for k in made_from if old.get(k) != made_from[k]), "recipe")
            change = "" if name == "fonts" else f" ({old.get(name)}, now {made_from[name]})"
            raise ValueError(f"{ddir.root} holds a data set drawn with other {name}{change}: "
                             "name another DDIR, or remove that one")
    else:
        for name in ("yfcc100m", "imagenet", "features", "knngraph", "label_idx.json"):
            if os.path.exists(ddir.path(name)):
                raise ValueError(f"{ddir.path(name)} exists and was not drawn by this script: name another DDIR")
        drawn, distinct = map(list, zip(*pool.map(coverage, paths, chunksize=4)))
        codes = _common(distinct, args.minfonts)
        if len(codes) < args.nclass:
            raise ValueError(f"--nclass {args.nclass}: only {len(codes)} characters are in --minfonts {args.minfonts} "
                             f"of the {len(paths)} fonts")
        classes = choose_distinct(paths, codes, [set(d) for d in distinct], args.nclass)
        found = {"made_from": made_from, "drawn": drawn, "distinct": distinct, "classes": classes}
        write_json(path, found)
    glyphs = Glyphs(paths, found["drawn"], found["distinct"], found["classes"], args.minfontsbg, args.seed)
    if args.nbg and not glyphs.background:
        raise ValueError(f"no character is in --minfontsbg {args.minfontsbg} of the {len(paths)} fonts")
    log(f"{len(paths)} fonts; labelled: {len(glyphs.classes)} characters; background: {len(glyphs.background)}")
    return glyphs


# ---------------------------------------------------------------------------------------------------------- one image

def draw(rs, path, code):
    """One image of a character by a font: uint8 (SIZE, SIZE, 3). All randomness comes from rs (RandomState)."""
    u = rs.uniform(size=33)
    mask, extent = glyph(path, code)
    # a full stop is not shown at the size of a capital, nor at its own
    scale = (12 + 14 * min(extent, 1)) / max(mask.size) * (0.8 + 0.35 * u[0])
    angle, shear, aspect = np.deg2rad(50 * u[1] - 25), 0.5 * u[2] - 0.25, 0.85 + 0.3 * u[3]
    shift = 6 * u[4:6] - 3
    cos, sin = np.cos(angle), np.sin(angle)
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[aspect, shear], [0, 1 / aspect]]) * scale
    inverse = np.linalg.inv(forward)                                      # image to mask
    offset = np.array(mask.size) / 2 - inverse @ (np.array([SIZE / 2, SIZE / 2]) + shift)
    ink = mask.transform((SIZE, SIZE), Image.Transform.AFFINE, (*inverse[0], offset[0], *inverse[1], offset[1]),
                         Image.Resampling.BICUBIC)
    ink = np.asarray(ink, np.float32)[:, :, None] / 255                   # (SIZE, SIZE, 1)

    paper, pen = _colours(u[6:12])
    image = _gradient(paper, u[12:17])
    image += ink * (_gradient(pen, u[17:22]) - image)
    if u[22] < 0.25:
        w, h = (4 + 8 * u[23:25]).astype(int)
        x, y = (u[25:27] * (SIZE - np.array([w, h]))).astype(int)
        image[y:y + h, x:x + w] = 255 * u[27:30]
    if u[30] < 0.6:
        picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        image = np.asarray(picture.filter(ImageFilter.GaussianBlur(float(0.4 + 0.8 * u[31]))), np.float32)
    # the sum of three uniform bytes is close to normal, standard deviation 128, and quick
    noise = rs.randint(0, 256, (3, SIZE, SIZE, 3), np.uint8).sum(axis=0, dtype=np.int16) - 382.5
    return np.clip(image + noise * ((3 + 22 * u[32] ** 2) / 128), 0, 255).astype(np.uint8)


def _colours(u):
    """Two colours, float (3,) in 0..255, from six numbers in 0..1: their brightness differs by about 70 at the least."""
    weights = np.array([0.299, 0.587, 0.114])
    a, b = 255 * u[:3], 255 * u[3:]
    # push both apart; what a colour at the end of its range cannot give, the other does
    sign = 1 if weights @ (a - b) > 0 or (weights @ (a - b) == 0 and a.sum() < 382) else -1
    for _ in range(4):
        lack = 70 - sign * (weights @ (a - b))
        if lack <= 0:
            break
        a, b = np.clip(a + sign * lack * 0.6, 0, 255), np.clip(b - sign * lack * 0.6, 0, 255)
    return a, b


def _gradient(colour, u):
    """A colour that grows brighter or darker in a random direction, float32 (SIZE, SIZE, 3)."""
    slope = 60 * u[0] * (2 * u[1:4] - 1)                                   # per channel, over the image's width
    angle = 2 * np.pi * u[4]
    ramp = np.float32(np.cos(angle)) * XS + np.float32(np.sin(angle)) * YS
    return colour.astype(np.float32) + ramp[:, :, None] * slope.astype(np.float32)


def jpeg(pixels):
    """JPEG file of uint8 (h, w, 3) as bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, subsampling=0)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------------- labelled

_glyphs = _root = None


def _begin(glyphs=None, root=None):
    """In a new process, which inherits the glyphs."""
    global _glyphs, _root
    end_with_parent(multiprocessing.parent_process().pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # one that Ctrl-C ends may hold a lock, for which the pool would wait
    _glyphs, _root = glyphs, root


def make_labelled(ddir, args, glyphs, pool):
    """Write the labelled images, their JSON files and the class split."""
    counts = {"train": args.ntrain, "val": args.nval}
    names = label_names(glyphs.classes)
    missing = [part for part in counts if not os.path.exists(ddir.path(f"imagenet_meta_{part}.json"))]
    jobs = [(part, label, counts[part]) for part in missing for label in range(args.nclass)
            if not os.path.isdir(class_folder(ddir.root, part, glyphs.classes[label]))]
    if jobs:
        log(f"labelled images: {args.nclass} classes, {args.ntrain} training and {args.nval} validation images each")
    with Progress(sum(n for _, _, n in jobs), "labelled images") as progress:
        for n in pool.imap_unordered(_draw_class, jobs):
            progress.advance(n)
    if jobs:
        os.sync()       # once, rather than for each of the small files: the JSON stands for their being there
    for part in missing:
        folders = [os.path.relpath(class_folder(ddir.root, part, c), ddir.root) for c in glyphs.classes]
        write_json(ddir.path(f"imagenet_meta_{part}.json"),
                   {"label_names": names,
                    "image_names": [f"{folder}/{i:04d}.jpg" for folder in folders for i in range(counts[part])],
                    "image_labels": [label for label in range(args.nclass) for i in range(counts[part])]})
    if not os.path.exists(ddir.path("label_idx.json")):
        write_json(ddir.path("label_idx.json"), class_split(args.nclass, args.seed, names))


def label_names(codes):
    """One name a class: the character, a space, and its Unicode name."""
    return [f"{chr(c)} {unicodedata.name(chr(c), f'U+{c:04X}')}" for c in codes]


def class_folder(root, part, code):
    return os.path.join(root, "imagenet", part, f"U{code:04X}")


def _draw_class(job):
    part, label, count = job
    code, fonts = _glyphs.classes[label], _glyphs.fonts_of[label]
    folder = class_folder(_root, part, code)
    temporary = f"{folder}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    for i in range(count):
        rs = np.random.RandomState([_glyphs.seed, {"train": TRAIN, "val": VAL}[part], code, i])
        with full_disk_named(folder), open(os.path.join(temporary, f"{i:04d}.jpg"), "wb") as f:
            f.write(jpeg(draw(rs, _glyphs.paths[fonts[rs.randint(len(fonts))]], code)))
    os.rename(temporary, folder)
    return count


def class_split(nclass, seed, names):
    """The content of label_idx.json: class numbers start at 1."""
    order = np.random.RandomState([seed, SPLIT]).permutation(nclass) + 1
    base1, base2, novel1, novel2 = (sorted(part.tolist()) for part in np.split(order, 4))
    return {"label_names": names, "base_classes": sorted(base1 + base2), "base_classes_1": base1,
            "novel_classes_1": novel1, "base_classes_2": base2, "novel_classes_2": novel2}


# -------------------------------------------------------------------------------------------------------- background

def make_background(ddir, args, glyphs, pool):
    """Write the zips of background images 0 .. nbg-1, those that are not there yet."""
    todo = [(z, min(PER_ZIP, args.nbg - z * PER_ZIP)) for z in range(-(-args.nbg // PER_ZIP))]
    todo = [(z, n) for z, n in todo if not zip_complete(ddir.root, z, n, args.seed)]
    if todo:
        log(f"background: {args.nbg} images")
    with Progress(sum(n for _, n in todo), "background images") as progress:
        for n in pool.imap_unordered(_draw_zip, todo):
            progress.advance(n)
    chars = ddir.path("yfcc100m_chars.npy")
    if args.nbg and (todo or not os.path.exists(chars) or len(np.load(chars, mmap_mode="r")) < args.nbg):
        codes = np.array(glyphs.background, np.uint32)
        drawn = [codes[zip_characters(glyphs, z)[0]] for z in range(-(-args.nbg // PER_ZIP))]
        with whole(chars) as temporary:
            np.save(temporary, np.concatenate(drawn)[:args.nbg])


def zip_path(root, z):
    return os.path.join(root, "yfcc100m", f"{z // 1000:02d}", f"{z % 1000:03d}.zip")


def zip_characters(glyphs, z):
    """Of each image of zip z: index of its character in glyphs.background and of its font in glyphs.paths."""
    rs = np.random.RandomState([glyphs.seed, ZIP, z])
    characters = rs.choice(len(glyphs.background), PER_ZIP, p=glyphs.probability)
    fonts = [glyphs.background_fonts[c][int(u * len(glyphs.background_fonts[c]))]
             for c, u in zip(characters, rs.uniform(size=PER_ZIP))]
    return characters, fonts


def damaged(seed, z):
    """Numbers within zip z of the image that is missing and of the one that cannot be decoded."""
    return np.random.RandomState([seed, ZIP, z, 1]).choice(PER_ZIP, 2, replace=False).tolist()


def zip_complete(root, z, count, seed):
    """Whether zip z is there and holds its first `count` images at least."""
    missing, _ = damaged(seed, z)
    with contextlib.suppress(OSError, zipfile.BadZipFile):
        with zipfile.ZipFile(zip_path(root, z)) as file:
            names = set(file.namelist())        # of a larger zip the missing one may be the last of `count`
            return ({f"{i:03d}.jpg" for i in range(count) if i != missing} <= names
                    and len(names) >= count - (missing < count - 1))
    return False


def _draw_zip(job):
    z, count = job
    missing, unreadable = damaged(_glyphs.seed, z)
    characters, fonts = zip_characters(_glyphs, z)
    with whole(zip_path(_root, z)) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
        for i in range(count):
            if i == missing and i < count - 1:      # the last one tells how many there are
                continue
            rs = np.random.RandomState([_glyphs.seed, BACKGROUND, z * PER_ZIP + i])
            data = jpeg(draw(rs, _glyphs.paths[fonts[i]], _glyphs.background[characters[i]]))
            if i == unreadable:
                data = data[:len(data) // 8]        # cut off within the header
            # a fixed date: the same seed gives the same bytes
            file.writestr(zipfile.ZipInfo(f"{i:03d}.jpg", (2018, 6, 18, 0, 0, 0)), data)
    return count


if __name__ == "__main__":
    run(main)
