"""What is in a folder of images, before anything is trained on it."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

TRAIN = ("train", "training")
TEST = ("test", "val", "valid", "validation", "testing")
SAMPLED = 200  # images that are opened to see their sizes and colours
SMALL = 64  # pixels that they are scaled to for that


@dataclass(frozen=True)
class Found:
    """A folder of images.

    Attributes:
      train_split: folder of the training images in it; ".": itself.
      test_split: that of the test images; the same where there is none.
      counts: training images by class.
      side: median of the short sides of some training images, in pixels.
      mean: of each channel of these, on [0, 1] pixels; one number where all are grey.
      std: standard deviation of each channel.
    """

    train_split: str
    test_split: str
    counts: dict[str, int]
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def look(directory: str, train_split: str = "", test_split: str = "") -> Found:
    """Find the splits of DIR/SPLIT/CLASS/IMAGE or DIR/CLASS/IMAGE, and see some of the images.

    Args:
      directory: the folder.
      train_split: name of the split, if it is known; "": that in `TRAIN` which is there, or ".".
      test_split: likewise, of `TEST`; where none is there, the training split.

    Raises:
      FileNotFoundError: no such folder or split, or no class folders with images in it.
      ValueError: none of the images can be decoded.
    """
    root = Path(directory).expanduser()
    names = _folders(root)
    train = train_split or next((name for name in TRAIN if name in names), ".")
    test = test_split or next((name for name in TEST if name in names and train != "."), train)
    files = images_by_class(root / train)
    if not files:
        raise FileNotFoundError(
            f"no class folders with images in {root / train}: expected {root}/SPLIT/CLASS/IMAGE or "
            f"{root}/CLASS/IMAGE; set --config.data.dir, and train_split and test_split where they "
            f"are not called {' or '.join(TRAIN)} and {', '.join(TEST)}"
        )
    every = [file for name in sorted(files) for file in files[name]]
    sides, pixels = _sample(every)
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    if (pixels == pixels[..., :1]).all():
        mean, std = mean[:1], std[:1]
    return Found(
        train,
        test,
        {name: len(of_class) for name, of_class in files.items()},
        int(np.median(sides)),
        tuple(round(float(x), 4) for x in mean),
        tuple(round(max(float(x), 1e-3), 4) for x in std),
    )


def images_by_class(folder: Path) -> dict[str, list[Path]]:
    """The images of each class folder that has some."""
    found = {name: images_in(folder / name) for name in _folders(folder)}
    return {name: files for name, files in found.items() if files}


def images_in(folder: Path) -> list[Path]:
    """Files with an image's extension, at any depth, in order; hidden ones are left out."""
    known = Image.registered_extensions()
    files = (file for file in folder.rglob("*") if file.suffix.lower() in known)
    return sorted(file for file in files if file.is_file() and file.name[0] != ".")


def duplicates(first: Iterable[Path], second: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Files of two splits with the same bytes: one pair for each file of the second."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for file in first:
        by_size[file.stat().st_size].append(file)
    digests: dict[int, dict[bytes, Path]] = {}
    pairs = []
    for file in second:
        size = file.stat().st_size
        if size in by_size:
            if size not in digests:
                digests[size] = {_digest(one): one for one in by_size[size]}
            if same := digests[size].get(_digest(file)):
                pairs.append((same, file))
    return pairs


def _digest(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: set --config.data.dir to your images")
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


def _sample(files: list[Path]) -> tuple[list[int], np.ndarray]:
    """Short sides, and small copies `[n, SMALL, SMALL, 3]` in [0, 1], of evenly spaced images."""
    places = np.unique(np.linspace(0, len(files) - 1, SAMPLED).astype(int))
    sides, copies = [], []
    for file in (files[place] for place in places):
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
                copies.append(np.asarray(image.convert("RGB").resize((SMALL, SMALL))) / 255)
        except (UnidentifiedImageError, OSError, SyntaxError):
            continue  # training will name it
    if not sides:
        raise ValueError(f"none of {len(places)} images can be decoded, such as {files[0]}")
    return sides, np.array(copies)
