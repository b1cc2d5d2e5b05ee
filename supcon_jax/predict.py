"""Class and probability of images, by the classifier of a finished run.

    python -m supcon_jax.predict --workdir D --images PATH
    python -m supcon_jax.predict --workdir D --images PATH --out out.jsonl
    python -m supcon_jax.predict --workdir D --images a.jpg --format jsonl

A line for each image, in order, as comma-separated values (.csv) or as JSON (.jsonl). Images that
cannot be decoded are named and left out; the exit status is then 1.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from supcon_jax import command
from supcon_jax.embed import over_files, tell_failed
from supcon_jax.inference import find_images, load_classifier
from supcon_jax.workdir import write_whole


class Prediction(NamedTuple):
    """The most probable class of an image."""

    path: str
    class_name: str
    probability: float


def predict_images(
    workdir: str | Path, places: Sequence[str | Path], *, batch_size: int = 64
) -> tuple[list[Prediction], int]:
    """Class and probability of all images in some files and folders, in order.

    Args:
      workdir: of the finished run.
      places: images, and folders of images.
      batch_size: images at a time; changes speed and memory only.

    Returns:
      The predictions, and the number of files that could not be decoded.

    Raises:
      FileNotFoundError: no finished run, or no images.
      ValueError: damaged files of the run, or a run without a classifier.
    """
    classifier, files = load_classifier(workdir), find_images(places)
    done, rows = over_files(classifier, files, batch_size)
    found = [
        Prediction(str(file), classifier.class_names[row.argmax()], round(float(row.max()), 6))
        for file, row in zip(done, rows, strict=True)
    ]
    return found, len(files) - len(done)


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Comma-separated values, with a line of names first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("path", "class", "probability"), *predictions])
    return text.getvalue()


def as_json_lines(predictions: Sequence[Prediction]) -> str:
    """A JSON object a line."""
    rows = (dict(zip(("path", "class", "probability"), p, strict=True)) for p in predictions)
    return "".join(json.dumps(row) + "\n" for row in rows)


FORMATS: dict[str, Callable[[Sequence[Prediction]], str]] = {"csv": as_csv, "jsonl": as_json_lines}


def format_of(out: Path) -> str:
    """The format of a file, by its suffix.

    Raises:
      ValueError: no format has it.
    """
    name = out.suffix.removeprefix(".")
    if name not in FORMATS:
        known = " or ".join(f".{name}" for name in FORMATS)
        raise ValueError(f"{out}: expected a {known} file; for another name, say its --format")
    return name


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command.parser("predict", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--images", required=True, nargs="+", help="files and folders of images")
    parser.add_argument("--format", choices=tuple(FORMATS), help="(that of --out, or csv)")
    parser.add_argument("--out", type=Path, help="a file (standard output)")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (64)")
    options = parser.parse_args(arguments)
    with command.running(options.debug):
        if options.out is not None:
            options.format = options.format or format_of(options.out)
            command.check_file(options.out)
        found, failed = predict_images(
            options.workdir, options.images, batch_size=options.batch_size
        )
        text = FORMATS[options.format or "csv"](found)
        if options.out is None:
            sys.stdout.write(text)
        else:
            write_whole(options.out, text)
        tell_failed(failed, failed + len(found))


if __name__ == "__main__":
    main()
