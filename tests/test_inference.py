"""What a finished run says of image files: features, classes, neighbours."""

import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from short_runs import small

from supcon_jax import embed, explore, inference, predict, search, suites, train, trained
from supcon_jax.data.sources import open_source


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    train.train_and_evaluate(small(), workdir, pictures=False)
    return workdir


@pytest.fixture(scope="module")
def digits():
    source = open_source(
        "digits", "test", name="", directory="", load_size=8, channels=1, memory_limit_gb=1.0
    )
    return source.load(np.arange(40))


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """The first forty test digits as files, in folders of their own."""
    root = tmp_path_factory.mktemp("images")
    for i, image in enumerate(digits[0]):
        place = root / "ab"[i // 20] / f"{i:02}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(place)
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.png").write_bytes(b"nor this")
    return root


@pytest.fixture(scope="module")
def subject(workdir):
    """What the evaluation sees, by another way through the code."""

    def of(layer, normalised):
        return suites.open_subject(trained.open_run(workdir), layer, normalised, None)

    return of


@pytest.mark.parametrize(
    ("layer", "normalised"), [("encoder", True), ("encoder", False), ("projection", False)]
)
def test_features_are_those_of_the_evaluation(workdir, folder, subject, layer, normalised):
    features, failed = embed.embed_images(
        workdir, [folder], layer=layer, normalised=normalised, batch_size=16
    )
    assert failed == 0
    assert [path[-6:] for path in features.paths] == [f"{i:02}.png" for i in range(40)]
    expected = subject(layer, normalised).test.features[:40]
    np.testing.assert_allclose(features.rows, expected, rtol=1e-4, atol=1e-5)
    by_default = embed.embed_images(workdir, [folder], layer=layer)[0].of["normalised"]
    assert by_default == (layer == "encoder")


def test_every_kind_of_picture_is_preprocessed_alike(workdir, folder, digits):
    encoder = inference.load_encoder(workdir)
    file = folder / "a" / "00.png"
    kinds = [str(file), file, file.read_bytes(), Image.open(file), digits[0][0]]
    found = [encoder.preprocess(kind) for kind in kinds]
    for one in found[1:]:
        np.testing.assert_array_equal(one, found[0])
    apply_fn, variables, _ = encoder
    assert apply_fn(variables, found[0][None]).shape == (1, 32)


def test_classes_are_those_of_the_run(workdir, folder, subject):
    rows, failed = predict.predict_images(workdir, [folder], batch_size=16)
    assert failed == 0 and rows[3].path == str(folder / "a" / "03.png")
    logits = subject("encoder", True).test.outputs[:40].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert [row.class_name for row in rows] == [str(k) for k in expected.argmax(-1)]
    probabilities = [row.probability for row in rows]
    np.testing.assert_allclose(probabilities, expected.max(-1), atol=1e-4)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_features_come_back_from_files(workdir, folder, tmp_path, suffix):
    features, _ = embed.embed_images(workdir, [folder / "a"])
    embed.write_features(features, tmp_path / "new" / f"features{suffix}")
    found = embed.read_features(tmp_path / "new" / f"features{suffix}")
    assert (found.paths, found.of) == (features.paths, features.of)
    np.testing.assert_array_equal(found.rows, features.rows)
    assert [file.name for file in (tmp_path / "new").iterdir()] == [f"features{suffix}"]


def test_an_image_is_its_own_nearest(workdir, folder):
    index, _ = embed.embed_images(workdir, [folder])
    query = folder / "b" / "25.png"
    found = search.nearest(query, index, count=5)
    assert found[0] == (pytest.approx(1, abs=1e-5), str(query))
    cosines = [cosine for cosine, _ in found]
    assert cosines == sorted(cosines, reverse=True) and len(found) == 5
    rows = index.rows / np.linalg.norm(index.rows, axis=1, keepdims=True)
    order = np.argsort(-rows @ rows[25], kind="stable")[:5]
    assert {path for _, path in found} == {index.paths[i] for i in order}


def test_an_index_of_another_run_is_refused(workdir, folder):
    index, _ = embed.embed_images(workdir, [folder / "a"])
    other = index._replace(of={**index.of, "config_hash": "0" * 12})
    with pytest.raises(ValueError, match=r"the features are not of the run in .* embed the images"):
        search.nearest(folder / "a" / "00.png", other)


def run(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"supcon_jax.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_unreadable_images_are_named_and_left_out(workdir, folder, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((folder / "a" / "00.png").read_bytes()[:40])
    places = [folder / "a" / "03.png", broken, folder / "b"]
    done = run("predict", "--workdir", workdir, "--images", *places)
    assert done.returncode == 1
    assert f"cannot decode {broken}" in done.stderr
    assert "1 of 22 images could not be decoded" in done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["path"][-6:] for row in rows] == ["03.png", *(f"{i}.png" for i in range(20, 40))]
    out = tmp_path / "features.npz"
    done = run("embed", "--workdir", workdir, "--images", *places, "--out", out)
    assert done.returncode == 1
    assert len(embed.read_features(out).paths) == 21
    done = run("search", "--query", places[0], "--index", out, "--count", "2")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].endswith(f"1.000  {places[0]}")


def test_the_suffix_tells_json_lines(workdir, folder, tmp_path):
    out = tmp_path / "new" / "classes.jsonl"
    predict.main(["--workdir", str(workdir), "--images", str(folder / "a"), "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 20 and all(row.keys() == {"path", "class", "probability"} for row in rows)


AWKWARD = [os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8"), r"$\q$"]  # names of classes


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """A run with pictures on folders whose names are not UTF-8, or look like mathematics."""
    root, random = tmp_path_factory.mktemp("awkward"), np.random.RandomState(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(AWKWARD):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (random.randint(0, 60, (8, 8)) + 60 * label).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    fields = {"data__source": "folder", "data__dir": str(root / "data")}
    fields |= {f"{stage}__batch_size": 16 for stage in ("supcon", "linear")}
    workdir = root / "digits-supcon-$^$"
    train.train_and_evaluate(small(**fields), workdir)
    return workdir, root / "data" / "test"


def test_awkward_names_are_drawn(awkward, tmp_path):
    workdir, _ = awkward
    assert (workdir / "embedding.png").is_file() and (workdir / "curves.png").is_file()
    subject = suites.open_subject(trained.open_run(workdir), "encoder", None, None)
    suites.standard(subject, tmp_path)
    assert [file.name.partition("-")[0] for file in sorted(tmp_path.glob("c*.png"))] == [
        "confusion"
    ]


def test_awkward_names_come_back_from_files(awkward, tmp_path):
    workdir, images = awkward
    arguments = ["--workdir", str(workdir), "--images", str(images), "--out"]
    predict.main([*arguments, str(tmp_path / "x.csv")])
    text = (tmp_path / "x.csv").read_text(errors="surrogateescape")
    rows = list(csv.DictReader(io.StringIO(text)))
    expected = [str(images / name / f"{i}.png") for name in sorted(AWKWARD) for i in range(4)]
    assert [row["path"] for row in rows] == expected
    assert {row["class"] for row in rows} <= {*AWKWARD}
    for suffix in (".npz", ".parquet"):
        embed.main([*arguments, str(tmp_path / f"x{suffix}")])
    assert embed.read_features(tmp_path / "x.npz").paths == expected
    in_parquet = embed.read_features(tmp_path / "x.parquet").paths
    assert len({*in_parquet}) == 12 and in_parquet[-1] == str(images) + r"/caf\xe9/3.png"
    explore.main(["--workdir", str(workdir), "--out", str(tmp_path / "x.html")])
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert r"caf\xe8" in page and r"caf\xe9" in page


def test_awkward_names_are_printed_as_they_are(awkward):
    workdir, images = awkward
    command = [sys.executable, "-m", "supcon_jax.predict", "--workdir", workdir, "--images", images]
    done = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"/caf\xe9/") == 4


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["embed", "--images", "{folder}", "--out", "x.csv"], "x.csv: features are written to"),
        (["embed", "--images", "{folder}/none", "--out", "x.npz"], "there is no such file or fold"),
        (["embed", "--images", "{empty}", "--out", "x.npz"], "no images in"),
        (["embed", "--images", "{folder}/notes.txt", "--out", "x.npz"], "none of the 1 images can"),
        (
            ["embed", "--images", "{folder}", "--out", "x.npz", "--features", "head"],
            "no features 'head' in this run; there are encoder, projection",
        ),
        (["predict", "--images", "{empty}"], "no images in"),
        (["search", "--query", "{folder}/a/00.png", "--index", "{empty}/x.npz"], "no such file"),
        (
            ["search", "--query", "{folder}/a/00.png", "--index", "{bad}"],
            "is not a file of feature",
        ),
    ],
)
def test_bad_input_gets_one_line(workdir, folder, tmp_path, capsys, command, message):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "bad.npz", features=np.zeros((2, 3)))
    names = dict(folder=folder, empty=tmp_path / "empty", bad=tmp_path / "bad.npz")
    module, *arguments = [word.format(**names) for word in command]
    with pytest.raises(SystemExit) as stopped:
        {"embed": embed, "predict": predict, "search": search}[module].main(
            ["--workdir", str(workdir), *arguments]
        )
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]


def test_a_run_without_a_classifier_has_no_classes(tmp_path):
    config = small(stages=("supcon",))
    train.train_and_evaluate(config, tmp_path / "run", pictures=False)
    with pytest.raises(ValueError, match=r"has no classifier: its last stage is supcon"):
        inference.load_classifier(tmp_path / "run")
