"""A finished run as files for other programs: weights, a card, a function.

    python -m supcon_jax.export --workdir D --out FOLDER
    python -m supcon_jax.export --workdir runs/digits-supcon --out exported/

FOLDER gets `encoder.safetensors` (a ResNet's by torchvision's names), `projection.safetensors` and
`classifier.safetensors` where the run has them, `card.json` (configuration, preprocessing, classes,
metrics, and which network of torchvision takes the encoder) and `features.stablehlo`: images to
features, to be called by `jax.export` alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from supcon_jax import command  # first: says what to install where nothing below is there

# isort: split
import jax
import numpy as np
from jax import export
from safetensors.numpy import save_file

from supcon_jax.inference import load_encoder
from supcon_jax.models import encoder_to_torch, make_encoder
from supcon_jax.models.torch_weights import torchvision_name
from supcon_jax.parallel import make_mesh
from supcon_jax.trained import Run, load_stage, open_run
from supcon_jax.workdir import write_whole

PLATFORMS = ("cpu", "cuda", "tpu")
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def export_run(workdir: str | Path, out: str | Path) -> list[Path]:
    """Write the files of a finished run to a folder, which is made.

    Args:
      workdir: of the run.
      out: folder of the files.

    Returns:
      The files.

    Raises:
      FileNotFoundError: no finished run there.
      ValueError: damaged files of the run.
      OSError: the folder cannot be written.
    """
    run, out = open_run(workdir), Path(out)
    command.make_folder(out)
    files = []
    for part, arrays in parts_of(run).items():
        files.append(out / f"{part}.safetensors")
        save_file(arrays, files[-1], metadata={"config_hash": run.config_hash})
    files.append(out / "features.stablehlo")
    files[-1].write_bytes(stablehlo(run))
    files.append(out / "card.json")
    write_whole(files[-1], json.dumps(card(run), indent=1) + "\n")
    return files


def parts_of(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """Arrays of the encoder in its last state, and of the heads, by PyTorch's names and layouts.

    The kernel of a dense layer is `weight` `[out, in]`. A ViT's encoder has its own names.
    """
    mesh, found = make_mesh(jax.devices()[:1]), {}
    for name in run.config.stages:
        variables = jax.device_get(load_stage(run, name, mesh).variables)
        encoder, head = (
            {kind: tree.get(part, {}) for kind, tree in variables.items()}
            for part in ("encoder", "head")
        )
        resnet = run.config.model.name == "resnet"
        found["encoder"] = encoder_to_torch(encoder) if resnet else plain_arrays(encoder)
        found[run.config[name].head.name] = plain_arrays(head)
    return found


def plain_arrays(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by their paths, "Dense_0.weight"; dense kernels `[out, in]`."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(dict(variables)):
        *modules, last = (entry.key for entry in path[1:])
        array = np.asarray(leaf, np.float32)
        if last == "kernel" and array.ndim == 2:
            array = np.ascontiguousarray(array.T)
        found[".".join([*modules, LEAVES.get(last, last)])] = array
    return found


def card(run: Run) -> dict[str, Any]:
    """What the weights are of, how images are made ready for them, and how good they are."""
    data = run.config.data
    results = json.loads((run.workdir / "results.json").read_text())
    name, why_none = torchvision_name(make_encoder(**run.config.model), data.channels)
    return {
        "config": run.config.to_dict(),
        "config_hash": run.config_hash,
        "steps": run.steps,
        "class_names": run.class_names,
        "preprocessing": {
            "short_side": data.load_size,
            "middle_square": data.load_size,
            "middle_crop": data.image_size,
            "channels": data.channels,
            "scale": "pixels / 255",
            "mean": data.mean,
            "std": data.std,
        },
        "torchvision": name,
        "torchvision_why_none": why_none,
        "features_of_length_1": run.normalises("encoder"),
        "test": results["test"],
        "commit": results.get("commit"),
        "versions": results.get("versions"),
    }


def torchvision_line(card: Mapping[str, Any]) -> str:
    """Whether a network of torchvision takes the encoder, in words."""
    if name := card["torchvision"]:
        return f"torchvision.models.{name}() takes the encoder: docs/inference.md"
    return f"no network of torchvision takes the encoder: {card['torchvision_why_none']}"


def stablehlo(run: Run) -> bytes:
    """Images `[n, size, size, channels]` float32, any n, to features, with the weights inside.

    Call it by `jax.export.deserialize(bytes).call(images)`.
    """
    encoder, data = load_encoder(run.workdir), run.config.data
    variables = jax.device_get(encoder.variables)

    def features(images: jax.Array) -> jax.Array:
        return encoder.apply_fn(variables, images)

    shape = export.symbolic_shape(f"n, {data.image_size}, {data.image_size}, {data.channels}")
    images = jax.ShapeDtypeStruct(shape, np.float32)
    return bytes(export.export(jax.jit(features), platforms=PLATFORMS)(images).serialize())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command.parser("export", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--out", required=True, help="folder of the files")
    options = parser.parse_args(arguments)
    with command.running(options.debug):
        files = export_run(options.workdir, options.out)
        for file in files:
            print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")
        print(torchvision_line(json.loads(files[-1].read_text())))


if __name__ == "__main__":
    main()
