"""Features of images, by the encoder of a finished run.

    python -m supcon_jax.embed --workdir D --images PATH --out features.npz
    python -m supcon_jax.embed --workdir D --images a.jpg --out new.parquet

The file has "path" and "features" of each image, in order, and what they are of. Images that cannot
be decoded are named and left out; the exit status is then 1.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from supcon_jax import command
from supcon_jax.inference import Classifier, Encoder, apply_to_files, find_images, load_encoder
from supcon_jax.logs import Progress, warn
from supcon_jax.report import DAMAGED
from supcon_jax.terminal import shown
from supcon_jax.trained import open_run

SUFFIXES = (".npz", ".parquet")
NOT_FEATURES = "is not a file of features of supcon_jax.embed, or damaged: embed the images again"
OF = {"workdir", "config_hash", "steps", "layer", "normalised"}


class Features(NamedTuple):
    """Features of images, and what they are of.

    Attributes:
      paths: of the images.
      rows: `[images, dim]` float32.
      of: "workdir", "config_hash" and "steps" of the run, "layer" and "normalised".
    """

    paths: list[str]
    rows: Float[np.ndarray, "images dim"]
    of: dict[str, Any]


def embed_images(
    workdir: str | Path,
    places: Sequence[str | Path],
    *,
    layer: str = "encoder",
    normalised: bool | None = None,
    batch_size: int = 64,
) -> tuple[Features, int]:
    """Features of all images in some files and folders, and how many could not be decoded.

    Args:
      workdir: of the finished run.
      places: images, and folders of images.
      layer: see `inference.load_encoder`.
      normalised: see there.
      batch_size: images at a time; changes speed and memory only.

    Returns:
      The features in the order of the files, and the number of files left out.

    Raises:
      FileNotFoundError: no finished run, or no images.
      ValueError: damaged files of the run, no such layer, or no image that can be decoded.
    """
    run = open_run(workdir)
    normalised = run.normalises(layer) if normalised is None else normalised
    encoder = load_encoder(workdir, layer=layer, normalised=normalised)
    files = find_images(places)
    done, rows = over_files(encoder, files, batch_size)
    if not done:
        raise ValueError(f"none of the {len(files)} images can be decoded")
    of = {
        "workdir": str(Path(workdir).resolve()),
        **run.identity,
        "layer": layer,
        "normalised": normalised,
    }
    return Features([str(file) for file in done], rows, of), len(files) - len(done)


def over_files(
    network: Encoder | Classifier, files: Sequence[Path], batch_size: int
) -> tuple[list[Path], np.ndarray]:
    """`apply_to_files` with a progress bar, and lines for what cannot be decoded."""
    done: list[Path] = []
    parts = [np.zeros((0, 0), np.float32)]
    with closing(Progress("images", 0, len(files))) as bar:
        for part, rows in apply_to_files(
            network, files, batch_size=batch_size, unreadable=bar.note
        ):
            done += part
            parts.append(rows)
            bar.move(len(done))
    return done, np.concatenate(parts[1:] or parts)


def write_features(features: Features, file: Path) -> None:
    """Write .npz ("path", "features", "of" as JSON) or .parquet (columns "path", "features").

    Raises:
      ValueError: another kind of file.
    """
    check_suffix(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    if file.suffix == ".npz":
        with unfinished.open("wb") as stream:
            of = np.array(json.dumps(features.of))
            np.savez(stream, path=np.array(features.paths), features=features.rows, of=of)
    else:
        _write_parquet(features, unfinished)
    unfinished.replace(file)


def check_suffix(file: Path) -> None:
    """Raises ValueError for other files than `write_features` writes."""
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: features are written to {' or '.join(SUFFIXES)} files")


def _write_parquet(features: Features, file: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    values = pa.array(features.rows.reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(values, features.rows.shape[1])
    table = pa.table({"path": [shown(path) for path in features.paths], "features": rows})
    of = {"supcon_jax": json.dumps(features.of)}
    parquet.write_table(table.replace_schema_metadata(of), file)


def read_features(file: str | Path) -> Features:
    """What `write_features` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another kind of file, or a damaged one.
    """
    file = Path(file)
    check_suffix(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file of features")
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                paths, rows, of = arrays["path"].tolist(), arrays["features"], str(arrays["of"])
        else:
            paths, rows, of = _read_parquet(file)
        found = Features(paths, rows.astype(np.float32), json.loads(of))
        whole = found.rows.ndim == 2 and len(found.rows) == len(paths) and found.of.keys() >= OF
    except DAMAGED as error:
        raise ValueError(f"{file} {NOT_FEATURES}") from error
    if not whole:
        raise ValueError(f"{file} {NOT_FEATURES}")
    return found


def _read_parquet(file: Path) -> tuple[list[str], np.ndarray, str]:
    from pyarrow import parquet

    table = parquet.read_table(file)
    rows = table["features"].combine_chunks()
    values = rows.flatten().to_numpy().reshape(len(rows), -1)
    return table["path"].to_pylist(), values, table.schema.metadata[b"supcon_jax"].decode()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command.parser("embed", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--images", required=True, nargs="+", help="files and folders of images")
    parser.add_argument("--out", required=True, type=Path, help="a .npz or .parquet file")
    parser.add_argument("--features", default="encoder", help="encoder, or projection")
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="features at length 1 (default: as the run's heads get them)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (64)")
    options = parser.parse_args(arguments)
    with command.running(options.debug):
        check_suffix(options.out)
        command.check_file(options.out)
        features, failed = embed_images(
            options.workdir,
            options.images,
            layer=options.features,
            normalised=options.normalize,
            batch_size=options.batch_size,
        )
        write_features(features, options.out)
        images, dim = features.rows.shape
        print(f"{options.out}: {images:,} images, {dim} features each")
        tell_failed(failed, images + failed)


def tell_failed(failed: int, images: int) -> None:
    """End the process with status 1 where images could not be decoded."""
    if failed:
        warn(f"{failed} of {images:,} images could not be decoded and are left out")
        sys.exit(1)


if __name__ == "__main__":
    main()
