"""Our corruptions beside those of two packages, on the same photographs.

The packages need an environment of their own, of their time; ours reads what they made:

    uv venv --python 3.9 PEERS
    uv pip install --python PEERS "imagecorruptions==1.1.2" "numpy<1.24" "scipy<1.11" \
        "scikit-image<0.20" "opencv-python-headless<4.9" "pillow<11" "scikit-learn<1.3" \
        "setuptools<60"
    uv pip install --python PEERS --no-deps "imagenet_c==0.0.3"
    PEERS/bin/python experiments/agreement/corruptions.py make theirs.npz
    python experiments/agreement/corruptions.py compare theirs.npz

`imagecorruptions` (Michaelis et al., 2019) has all corruptions for any size, with the parameters of
ImageNet-C; for the small images we give it those of CIFAR-10-C (`supcon_jax` has both tables). Its
elastic_transform is another one than ImageNet-C's, so that one is taken from `imagenet_c`, by the
authors of ImageNet-C, with the same change of parameters. That package imports Wand for two
functions that we do not call; empty modules stand in for it.

Writes corruptions.json and corruptions.md beside this file.
"""

import argparse
import ast
import importlib.metadata
import inspect
import json
import sys
import time
import types
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIDES = {"imagenet": 224, "cifar": 32}
SEEDS = range(8)
MEASURES = ("mean", "std", "step", "from_clean")
RANDOM = (
    "gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost",
    "fog", "elastic_transform",
)  # fmt: skip


def photographs(side):
    """Parts of scikit-learn's two photographs, `[n, side, side, 3]`: 4 of 224 pixels, 24 of 32."""
    from sklearn.datasets import load_sample_images

    parts = []
    for photograph in load_sample_images().images:
        scaled = Image.fromarray(photograph)
        if side < 64:
            scaled = scaled.resize((scaled.width // 4, scaled.height // 4), Image.Resampling.BOX)
        pixels = np.asarray(scaled)
        across = 4 if side < 64 else 2
        rows = range(0, pixels.shape[0] - side + 1, side)
        parts += [
            pixels[top : top + side, left : left + side]
            for top in rows
            for left in range(0, across * side, side)
        ]
    return np.stack(parts)


def modules():
    """Of each corruption, the module that it is taken from."""
    import imagecorruptions

    wand = {name: types.ModuleType(name) for name in ("wand", "wand.image", "wand.api")}
    wand["wand.color"] = types.ModuleType("wand.color")
    wand["wand"].color = wand["wand.color"]
    wand["wand.image"].Image, wand["wand.api"].library = object, mock.MagicMock()
    with mock.patch.dict(sys.modules, wand):
        import imagenet_c.corruptions as imagenet_c

    names = imagecorruptions.get_corruption_names()
    return {**dict.fromkeys(names, imagecorruptions.corruptions), "elastic_transform": imagenet_c}


def peers(table):
    """Their functions, `(PIL image, severity) -> pixels`, with other parameters where wanted."""
    return {
        name: getattr(module, name) if table is None else with_parameters(module, name, table[name])
        for name, module in modules().items()
    }


def parameters_in(module, name):
    """The source of a function of theirs, and in it the list in `[...][severity - 1]`."""
    tree = ast.parse(inspect.getsource(getattr(module, name)))
    places = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and ast.unparse(node.slice) == "severity - 1"
    ]
    assert len(places) == 1, name
    return tree, places[0]


def their_parameters():
    """The parameters of ImageNet-C as their functions have them."""
    found = {}
    for name, module in modules().items():
        values = eval(ast.unparse(parameters_in(module, name)[1].value), {"np": np})
        found[name] = [np.asarray(value, float).tolist() for value in values]
    return found


def with_parameters(module, name, parameters):
    """A function of theirs with other parameters."""
    tree, place = parameters_in(module, name)
    place.value = ast.parse(repr(list(parameters))).body[0].value
    space = dict(vars(module))
    exec(compile(ast.fix_missing_locations(tree), name, "exec"), space)
    return space[name]


def cifar_parameters():
    """Our CIFAR-10-C table in the form in which their functions have theirs.

    Read from the file, since the package does not run in their environment.
    """
    file = HERE.parents[1] / "supcon_jax" / "evaluation" / "corruptions.py"
    tree = ast.parse(file.read_text())
    table = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and node.target.id == "CIFAR"
    )
    zooms = [[float(f) for f in np.arange(1, *zoom)] for zoom in table["zoom_blur"]]
    elastic = [tuple(32 * share for share in shares) for shares in table["elastic_transform"]]
    return {**table, "zoom_blur": zooms, "elastic_transform": elastic}


def frosts():
    """Of each photograph of frost: colour, deviation and steps within 224 pixels; and within 32
    pixels of it at a fifth of its size, as CIFAR-10-C has it.
    """
    import cv2
    import imagecorruptions

    found = {}
    for file in sorted((Path(imagecorruptions.__file__).parent / "frost").iterdir()):
        pixels = np.asarray(Image.open(file).convert("RGB"))
        small = cv2.resize(pixels, (0, 0), fx=0.2, fy=0.2)
        found[file.name] = {"large": look(pixels, 224), "small": look(small, 32)}
    return found


def look(pixels, side):
    random = np.random.RandomState(0)
    corners = [[random.randint(length - side) for length in pixels.shape[:2]] for _ in range(60)]
    parts = np.stack([pixels[y : y + side, x : x + side] for y, x in corners]).astype(float)
    return {
        "colour": parts.mean(axis=(0, 1, 2)).round(1).tolist(),
        "std": round(float(parts.mean(axis=3).std(axis=(1, 2)).mean()), 1),
        "std_of_means": round(float(parts.mean(axis=(1, 2, 3)).std()), 1),
        "steps": {
            str(d): round(float(np.abs(parts[:, :, d:] - parts[:, :, :-d]).mean()), 2)
            for d in (1, 4, 16)
        },
    }


def make(file):
    """What the packages make of the photographs, into a file.

    Of each corruption and severity, all images for the first two seeds, of the rest the measures.
    """
    made = {}
    for table, side in SIDES.items():
        images = photographs(side)
        made[f"{table}/clean"] = images
        functions = peers(cifar_parameters() if table == "cifar" else None)
        for name, function in functions.items():
            for severity in range(1, 6):
                key, found = f"{table}/{name}/{severity}", []
                for seed in SEEDS if name in RANDOM else SEEDS[:1]:
                    np.random.seed(seed)
                    theirs = [np.uint8(function(Image.fromarray(i), severity)) for i in images]
                    found += [[measures(*pair) for pair in zip(np.stack(theirs), images)]]  # noqa: B905
                    if seed < 2:
                        made[f"{key}/{seed}"] = np.stack(theirs)
                made[key] = np.array(found)  # [seeds, images, measures]
            print(table, name, flush=True)
    versions = {
        name: importlib.metadata.version(name)
        for name in ("imagecorruptions", "numpy", "scipy", "scikit-image", "pillow")
    }
    made["parameters"] = np.array(json.dumps(their_parameters()))
    made["frosts"] = np.array(json.dumps(frosts()))
    made["versions"] = np.array(json.dumps({**versions, "imagenet_c": "0.0.3"}))
    np.savez_compressed(file, **made)


def measures(image, clean):
    """Mean and standard deviation of the pixels, mean step to the next, distance from clean."""
    pixels = image.astype(float)
    step = np.abs(np.diff(pixels, axis=1)).mean()
    return pixels.mean(), pixels.std(), step, np.abs(pixels - clean).mean()


def summary(found):
    """Mean and standard deviation over the seeds of measures `[seeds, images, measures]`."""
    of_seeds = found.mean(axis=1)
    deviations = of_seeds.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(len(MEASURES))
    return {
        name: [round(float(mean), 3), round(float(deviation), 3)]
        for name, mean, deviation in zip(MEASURES, of_seeds.mean(axis=0), deviations, strict=True)
    }


def distance(images, others):
    return round(float(np.abs(images.astype(float) - others).mean()), 3)


def compare(file):
    from supcon_jax.evaluation.corruptions import CORRUPTIONS, corrupt

    theirs, rows = np.load(file), []
    for table, side in SIDES.items():
        clean = theirs[f"{table}/clean"]
        for name, severity in product(CORRUPTIONS, range(1, 6)):
            key = f"{table}/{name}/{severity}"
            seeds = SEEDS if name in RANDOM else SEEDS[:1]
            ours = [corrupt(clean, name, severity, seed=seed) for seed in seeds]
            pairs = [[measures(*p) for p in zip(made, clean, strict=True)] for made in ours]
            first = theirs[f"{key}/0"]
            seeds = distance(first, theirs[f"{key}/1"]) if name in RANDOM else None
            rows += [
                {
                    "table": table,
                    "side": side,
                    "corruption": name,
                    "severity": severity,
                    "ours": summary(np.array(pairs)),
                    "theirs": summary(theirs[key]),
                    "china": summary(theirs[key][:, :1]),
                    "pixels": first[0, ::32, ::32].tobytes().hex(),
                    "difference": distance(ours[0], first),
                    "their_seeds": seeds,
                }
            ]
    return rows, {
        name: json.loads(str(theirs[key]))
        for name, key in (("parameters",) * 2, ("frosts",) * 2, ("peers", "versions"))
    }


def seconds(count=10_000, side=32):
    """Seconds for `count` small images, one core, each corruption at its five severities."""
    from supcon_jax.evaluation.corruptions import CORRUPTIONS, corrupt

    images = np.resize(photographs(side), (count, side, side, 3))
    found = {}
    for name in CORRUPTIONS:
        start = time.perf_counter()
        for severity in range(1, 6):
            corrupt(images, name, severity)
        found[name] = round(time.perf_counter() - start, 2)
        print(f"{name}: {found[name]} s", flush=True)
    return found


def pair(ours, theirs):
    """Both means, and their difference in standard errors where there are any."""
    error = np.hypot(ours[1], theirs[1]) / np.sqrt(len(SEEDS))
    apart = f" ({(ours[0] - theirs[0]) / error:+.1f})" if error else ""
    return f"{ours[0]:.1f} / {theirs[0]:.1f}{apart}"


def markdown(rows, table):
    lines = [
        "| corruption | severity | mean | std | step | from clean | ours - theirs | their seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if row["table"] != table:
            continue
        pairs = [pair(row["ours"][name], row["theirs"][name]) for name in MEASURES]
        seeds = "-" if row["their_seeds"] is None else f"{row['their_seeds']:.2f}"
        cells = [row["corruption"], str(row["severity"]), *pairs, f"{row['difference']:.2f}", seeds]
        lines += [f"| {' | '.join(cells)} |"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Our corruptions beside those of others.")
    parser.add_argument("action", choices=("make", "compare"))
    parser.add_argument("file", type=Path, help="what theirs made of the photographs, .npz")
    options = parser.parse_args()
    if options.action == "make":
        return make(options.file)
    import cv2

    from supcon_jax.report import circumstances

    cv2.setNumThreads(1)
    rows, of_theirs = compare(options.file)
    took = seconds()
    record = {
        "command": "corruptions.py make FILE; corruptions.py compare FILE",
        "rows": rows,
        "seconds": {"images": 10_000, "side": 32, "severities": 5, **took},
        **of_theirs,
        **circumstances(),
    }
    (HERE / "corruptions.json").write_text(json.dumps(record, indent=1) + "\n")
    text = (HERE / "corruptions.md").read_text()
    for table in SIDES:
        start, end = f"<!-- {table} -->", f"<!-- end {table} -->"
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n{markdown(rows, table)}\n{end}{after}"
    total = "\n".join(f"| {name} | {value:.1f} |" for name, value in took.items())
    start, end = "<!-- seconds -->", "<!-- end seconds -->"
    before, after = text.split(start)[0], text.split(end)[1]
    header = "| corruption | seconds |\n| --- | ---: |\n"
    text = f"{before}{start}\n{header}{total}\n| all | {sum(took.values()):.0f} |\n{end}{after}"
    (HERE / "corruptions.md").write_text(text)
    return None


if __name__ == "__main__":
    main()
