"""The evaluation command on a short run of the digits, and what it refuses."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tfds
from short_runs import small
from state_dicts import state_dict_of

from experiments.corruptions import run as experiment
from supcon_jax import config as configuration
from supcon_jax import evaluate, stages, suites, train, trained
from supcon_jax.data.policies import center_crop
from supcon_jax.data.sources import open_source
from supcon_jax.evaluation.corruptions import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    CORRUPTIONS,
    corrupted,
)
from supcon_jax.evaluation.embed import Embedded
from supcon_jax.models import encoder_from_torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, train.train_and_evaluate(small(), workdir, pictures=False)


@pytest.fixture
def copy(finished, tmp_path):
    without = shutil.ignore_patterns("evaluation*")
    return shutil.copytree(finished[0], tmp_path / "copy", ignore=without)


def test_standard_scores_are_those_of_the_run(finished):
    workdir, results = finished
    record = evaluate.evaluate(workdir)
    found = record["suites"]["encoder, length 1"]["standard"]
    assert found["images"] == {"train": 1394, "test": 360}  # the others were held out
    for name in ("top1", "top5"):
        assert found["classifier"][name] == pytest.approx(results["test"][name], abs=1e-9)
    assert found["knn"] == pytest.approx(results["test"]["knn"], abs=1e-9)
    mean = np.average(list(found["per_class"].values()), weights=np.bincount(labels_of("test")))
    assert mean == pytest.approx(found["classifier"]["top1"], abs=1e-4)
    assert found["probe"]["top1"] > 0.6
    assert found["class_mean"] > 0.3  # after ten steps; chance is 0.1
    assert (
        (workdir / "evaluation" / "confusion-encoder-unit.png").read_bytes().startswith(b"\x89PNG")
    )
    assert json.loads((workdir / "evaluation.json").read_text())["suites"] == record["suites"]


def labels_of(split):
    options = dict(name="", directory="", load_size=8, channels=1, memory_limit_gb=1.0)
    return open_source("digits", split, **options).labels()


def test_layers_are_kept_apart(finished):
    record = evaluate.evaluate(finished[0], layer="projection")
    found = record["suites"]["projection"]["standard"]
    assert found["dim"] == 64
    assert "classifier" not in found
    longer = evaluate.evaluate(finished[0], normalised=False)["suites"]
    assert {"projection", "encoder"} <= longer.keys()
    assert longer["projection"]["standard"] == found
    pictures = {file.name for file in (finished[0] / "evaluation").glob("*.png")}
    assert {"confusion-projection.png", "confusion-encoder.png"} <= pictures


def test_the_runs_classifier_is_of_the_features_it_was_trained_on(copy, monkeypatch):
    monkeypatch.setattr(suites, "CORRUPTIONS", ("contrast",))
    record = evaluate.evaluate(copy, ["standard", "robustness"], normalised=False)
    of_layer = record["suites"]["encoder"]
    found = of_layer["standard"]
    assert "classifier" not in found
    mean = np.average(list(found["per_class"].values()), weights=np.bincount(labels_of("test")))
    assert mean == pytest.approx(found["probe"]["top1"], abs=1e-4)
    assert of_layer["robustness"]["classifier"] == "the fast probe"
    assert of_layer["robustness"]["clean"]["top1"] == found["probe"]["top1"]


def test_few_images_a_class(finished, monkeypatch):
    monkeypatch.setattr(suites, "SHOTS", (1, 20, 1000))
    found = evaluate.evaluate(finished[0], ["few_shot"])["suites"]["encoder, length 1"]["few_shot"]
    assert found.keys() == {"metric", "draws", "1", "20"}  # no class has 1,000 images
    for name in ("probe", "class_mean"):
        assert found["20"][name]["mean"] > found["1"][name]["mean"] > 0.2
        assert found["20"][name]["sd"] < found["1"][name]["sd"]


def test_corrupted_images(finished, monkeypatch):
    names = ("gaussian_noise", "contrast")
    monkeypatch.setattr(suites, "CORRUPTIONS", names)
    drawn, draw = {}, suites.draw_reliability
    monkeypatch.setattr(
        suites, "draw_reliability", lambda *of, **how: (drawn.update(how), draw(*of, **how))
    )
    workdir, results = finished
    found = evaluate.evaluate(workdir, ["robustness"])["suites"]["encoder, length 1"]["robustness"]
    assert found["classifier"] == "the stage linear's"
    assert found["clean"]["top1"] == pytest.approx(results["test"]["top1"], abs=1e-9)
    errors = np.array([found["errors"][name] for name in names])
    assert errors.shape == (2, 5)
    np.testing.assert_allclose(found["top1"], 1 - errors.mean(0), atol=1e-12)
    assert found["mean_error"] == pytest.approx(errors.mean())
    assert errors[0, 4] > errors[0, 0]
    assert "mce" not in found  # AlexNet's errors are of ImageNet
    assert found["ece_bins"] == found["clean"]["ece_bins"] == 15
    of_severities = {f"severity {s}": ece for s, ece in enumerate(found["ece"], start=1)}
    assert drawn["errors"] == {"clean": found["clean"]["ece"], **of_severities}
    picture = workdir / "evaluation" / "reliability-encoder-unit.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    subject = subject_of(workdir)
    noisy = subject.look(corrupted(subject.data.test, "gaussian_noise", 3))
    assert errors[0, 2] == pytest.approx((noisy.outputs.argmax(-1) != noisy.labels).mean())


IMAGENET = ("n01440764", *(f"n{k:08}" for k in range(2_000_000, 2_000_998)), "n15075141")


def guesses(wrong):
    """Logits of 20 images of 1,000 classes, so many of which are wrong."""
    labels = np.arange(20)
    outputs = np.eye(1000, dtype=np.float32)[labels + (labels < wrong)]
    return Embedded(np.zeros((20, 0), np.float32), outputs, labels)


def robustness_of(class_names, folder, monkeypatch):
    """The suite with one clean image wrong of 20, and two times the severity of the others."""
    subject = SimpleNamespace(
        run=SimpleNamespace(identity={}),
        slug="encoder",
        classifier="the stage linear's",
        class_names=class_names,
        data=SimpleNamespace(test=SimpleNamespace(size=20)),
        test=guesses(1),
        logits=lambda found: found.outputs,
        look=lambda severity, show: guesses(2 * severity),
    )
    made = suites.Corrupted("made up", lambda name, severity: severity)
    monkeypatch.setattr(suites, "corrupted_images", lambda subject: made)
    return suites.robustness(subject, folder)


@pytest.mark.usefixtures("unchecked")  # the subject is made up
def test_mce_on_imagenet(tmp_path, monkeypatch):
    found = robustness_of(IMAGENET, tmp_path, monkeypatch)
    of_alexnet = np.array([np.mean(ALEXNET_ERRORS[name]) for name in CORRUPTIONS])
    assert found["mce"] == pytest.approx(100 * np.mean(0.3 / of_alexnet))
    lost = of_alexnet - ALEXNET_CLEAN_ERROR
    assert found["relative_mce"] == pytest.approx(100 * np.mean(0.25 / lost))
    row = f"mCE {found['mce']:.1f}, relative mCE {found['relative_mce']:.1f}"
    assert row in evaluate.table({"suites": {"encoder": {"robustness": found}}})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "class_names",
    [tuple(map(str, range(1000))), IMAGENET[:-1], (*IMAGENET[:-1], "n02999999")],
    ids=["other names", "999", "other ids"],
)
def test_no_mce_elsewhere(class_names, tmp_path, monkeypatch):
    assert "mce" not in robustness_of(class_names, tmp_path, monkeypatch)


def test_the_experiment_takes_the_scores_of_its_features(copy, monkeypatch):
    monkeypatch.setattr(suites, "CORRUPTIONS", ("contrast",))
    record = evaluate.evaluate(copy, ["robustness"], layer="projection")
    found = experiment.on_corrupted(copy, small(), {})
    record = json.loads((copy / "evaluation.json").read_text())
    own = record["suites"]["encoder, length 1"]["robustness"]
    assert found["error on corrupted"] == pytest.approx(100 * own["mean_error"])
    assert "mce" not in found
    own |= {"mce": 70.0, "relative_mce": 95.0}
    monkeypatch.setattr(experiment, "evaluate", lambda *arguments: record)
    found = experiment.on_corrupted(copy, small(), {})
    assert (found["mce"], found["relative_mce"]) == (70.0, 95.0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_bar_at_a_time(copy, monkeypatch):
    monkeypatch.setattr(suites, "CORRUPTIONS", ("contrast",))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        evaluate.evaluate(copy, ["robustness"], normalised=False)
        bars = [text.partition(" |")[0] for text in sys.stderr.getvalue().split("\r") if text]
    names = list(dict.fromkeys(name.strip() for name in bars if name.strip()))
    assert names[0] == "digits/test" and names[1].startswith("digits/train")
    assert names[2:] == ["corruptions"]


def test_progress_where_there_is_no_terminal(copy, monkeypatch, capfd):
    monkeypatch.setattr(suites, "CORRUPTIONS", ("contrast",))
    evaluate.evaluate(copy, ["robustness"])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("corruptions")]
    assert [line.split()[1] for line in lines] == [f"{360 * k}/1800" for k in range(1, 6)]
    assert all("  top-1 " in line for line in lines)


def subject_of(workdir):
    run = trained.open_run(workdir)
    return suites.open_subject(run, "encoder", True, None)


def test_an_interrupted_suite_goes_on(copy, monkeypatch):
    monkeypatch.setattr(suites, "CORRUPTIONS", ("contrast", "brightness"))
    original, calls = suites._on_corrupted, []

    def failing(subject, source, show):
        calls.append(source.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(subject, source, show)

    monkeypatch.setattr(suites, "_on_corrupted", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(copy, ["robustness"])
    log = copy / "evaluation" / "corruptions-encoder-unit.jsonl"
    earlier = '{"name": "contrast", "severity": 5, "error": 1.0}\n'  # of a version without "of"
    log.write_text(earlier + log.read_text() + '{"name": "contrast", "sev')  # killed while writing
    found = evaluate.evaluate(copy, ["robustness"])["suites"]["encoder, length 1"]["robustness"]
    assert calls[4:] == [
        f"digits/test ({name}, severity {severity})"
        for name, severity in [("contrast", 4), ("contrast", 5)]
        + [("brightness", s) for s in range(1, 6)]
    ]
    monkeypatch.setattr(suites, "_on_corrupted", original)
    log.unlink()
    whole = evaluate.evaluate(copy, ["robustness"])["suites"]["encoder, length 1"]["robustness"]
    assert whole == found


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A configuration whose weights are a file, with the encoder and the arrays in it."""
    config = small("linear")
    config.model.weights = str(tmp_path_factory.mktemp("weights") / "encoder.npz")
    encoder = stages.build_model(config, "linear", classes=10).encoder
    arrays = state_dict_of(encoder, channels=1)
    np.savez(config.model.weights, **arrays)
    return config, encoder, arrays


def test_imported_weights_are_evaluated_as_they_are(imported, tmp_path):
    config, encoder, arrays = imported
    record = evaluate.evaluate(tmp_path / "new", imported=config, normalised=False)
    found = record["suites"]["encoder"]["standard"]
    assert "classifier" not in found and record["steps"] == {}
    assert 0.5 < found["knn"] <= 1  # of random weights; chance is 0.1
    images, labels = open_source(
        "digits", "test", name="", directory="", load_size=8, channels=1, memory_limit_gb=1.0
    ).load(np.arange(360))
    data = config.data
    pixels = center_crop(
        jnp.asarray(images[:, None]),
        size=data.image_size,
        mean=tuple(data.mean),
        std=tuple(data.std),
    )
    expected = encoder.apply(encoder_from_torch(arrays, encoder), pixels, train=False)
    run = trained.open_weights(config, tmp_path / "new")
    subject = suites.open_subject(run, "encoder", False, None)
    np.testing.assert_array_equal(subject.test.labels, labels)
    np.testing.assert_allclose(subject.test.features, expected, rtol=1e-4, atol=1e-5)
    assert not any(path.name == "checkpoints" for path in (tmp_path / "new").iterdir())


def test_imported_weights_are_not_mixed_with_others(imported, copy, tmp_path):
    config, _, arrays = imported
    with pytest.raises(ValueError, match="is the folder of a training; give imported weights"):
        evaluate.evaluate(copy, imported=config)
    before = evaluate.evaluate(tmp_path / "new", imported=config, normalised=False)
    other = config.copy_and_resolve_references()
    other.model.weights = str(tmp_path / "other.npz")
    np.savez(other.model.weights, **{**arrays, "conv1.weight": -arrays["conv1.weight"]})
    after = evaluate.evaluate(tmp_path / "new", imported=other)
    assert after["config_hash"] != before["config_hash"]
    assert after["suites"].keys() == {"encoder, length 1"}
    Path(other.model.weights).unlink()
    with pytest.raises(FileNotFoundError, match="there is no such file of weights"):
        evaluate.evaluate(tmp_path / "new", imported=other)


def test_linear_stage_by_sgd_starts_anew_for_other_weights(imported, tmp_path):
    config, _, arrays = imported
    other = config.copy_and_resolve_references()
    other.model.weights = str(tmp_path / "other.npz")
    np.savez(other.model.weights, **{**arrays, "conv1.weight": -arrays["conv1.weight"]})

    def probe(folder, config):
        record = evaluate.evaluate(folder, ["sgd_probe"], imported=config)
        return record["suites"]["encoder, length 1"]["sgd_probe"]

    alone = probe(tmp_path / "alone", other)
    first = probe(tmp_path / "both", config)
    second = probe(tmp_path / "both", other)
    assert second == alone != first
    with (
        tmp_path / "both" / "evaluation" / "sgd_probe-encoder-unit" / "metrics.jsonl"
    ).open() as lines:
        steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps))  # of one training


def test_weights_of_another_encoder_are_refused(imported, tmp_path, capsys):
    command = ["--workdir", str(tmp_path), "--weights", imported[0].model.weights]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*command, "--config", "digits"])  # wider than the file's
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "encoder.npz" in line and "width=0.0625, the model has width=0.125" in line
    with pytest.raises(SystemExit):
        evaluate.main(command)
    assert "--weights and --config belong together" in capsys.readouterr().err


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A subject on "cifar10", and its corrupted images as TFDS has them: here, digits."""
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(suites, "CORRUPTIONS", ("contrast", "glass_blur"))
    tiny_tfds.prepare_digits(tmp_path, n_train=40, n_test=20)
    for name in ("contrast", "frosted_glass_blur"):
        for severity in suites.SEVERITIES:
            place = tmp_path / "cifar10_corrupted" / f"{name}_{severity}"
            shutil.copytree(tmp_path / "tiny_digits", place)
    (tmp_path / "tiny_digits").rename(tmp_path / "cifar10")
    config = configuration.load("digits:linear")
    config.data.update(source="tfds", name="cifar10", dir=str(tmp_path), test_split="test")
    run = trained.Run(tmp_path, config, (), {}, "")
    return suites.open_subject(run, "encoder", False, None)


def test_published_corruptions_are_used(published):
    images = suites.corrupted_images(published)
    assert images.name == "cifar10_corrupted"
    source = images.make("glass_blur", 3)
    assert source.name == "cifar10_corrupted/frosted_glass_blur_3/test"
    clean = published.data.test  # not corrupted at all, so that they can be compared
    indices = np.arange(20)
    for found, expected in zip(source.load(indices), clean.load(indices), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_part_of_the_published_corruptions_is_not_mixed_with_ours(published, capfd):
    shutil.rmtree(published.run.workdir / "cifar10_corrupted" / "contrast_4")
    images = suites.corrupted_images(published)
    assert images.name == "supcon_jax.evaluation.corruptions"
    assert "9 of 10 parts of cifar10_corrupted are prepared" in capfd.readouterr().err
    assert images.make("contrast", 2).name == "cifar10/test (contrast, severity 2)"


def test_linear_stage_by_sgd(copy):
    record = evaluate.evaluate(copy, ["sgd_probe"])
    found = record["suites"]["encoder, length 1"]["sgd_probe"]
    results = json.loads((copy / "results.json").read_text())
    # the same stage as the run's own, from the same encoder, seed and order of images
    assert found["top1"] == pytest.approx(results["test"]["top1"], abs=1e-9)
    assert found["epochs"] == 1.0
    with pytest.raises(ValueError, match="of the encoder's output: --features encoder"):
        evaluate.evaluate(copy, ["sgd_probe"], layer="projection")


@pytest.mark.parametrize(("key", "other"), [("steps", 3), ("checksums", "0" * 8)])
def test_results_of_other_weights_are_not_kept(copy, key, other):
    evaluate.evaluate(copy)
    file = copy / "evaluation.json"
    record = json.loads(file.read_text())
    record[key]["linear"] = other
    record["suites"]["projection"] = {}
    file.write_text(json.dumps(record))
    assert evaluate.evaluate(copy)["suites"].keys() == {"encoder, length 1"}


def test_what_is_refused(copy, tmp_path):
    with pytest.raises(ValueError, match=r"unknown suite 'robust'; did you mean 'robustness'\?"):
        evaluate.evaluate(copy, ["robust"])
    with pytest.raises(ValueError, match=r"no features 'projecton' in this run; there are encoder"):
        evaluate.evaluate(copy, layer="projecton")
    config = json.loads((copy / "config.json").read_text())
    config["class_names"][0] = "zero"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has other classes than the run was trained on"):
        evaluate.evaluate(copy)
    done = subprocess.run(
        [sys.executable, "-m", "supcon_jax.evaluate", "--workdir", str(tmp_path / "no")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no finished run in ")
    assert len(done.stderr.splitlines()) == 1


def test_the_table_fits_a_terminal(finished, monkeypatch):
    monkeypatch.setattr(suites, "CORRUPTIONS", ("contrast",))
    evaluate.evaluate(finished[0], ["standard", "few_shot", "robustness"])
    text = evaluate.table(json.loads((finished[0] / "evaluation.json").read_text()))
    assert max(map(len, text.splitlines())) <= 80
    assert "classifier of the run" in text
    assert "ECE (15 bins)" in text and "ECE, 15 bins" in text


def test_a_suite_that_was_added(copy, monkeypatch, capsys):
    def sizes(subject, folder):
        (folder / "sizes.txt").write_text("drawn")
        features = subject.test.features
        return {"images": len(features), "norm": {"mean": float((features**2).sum(1).mean())},
                "of": "the test images"}  # fmt: skip

    command = ["--workdir", str(copy), "--suite", "sizes"]
    with pytest.raises(SystemExit):
        evaluate.main(command)
    assert "unknown suite 'sizes'" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setitem(suites.SUITES, "sizes", sizes)
        evaluate.main(command)
    rows = ["encoder, length 1: sizes", f"  {'images':40}  360", f"  {'norm.mean':40}  1"]
    assert capsys.readouterr().out.splitlines()[:3] == rows
    assert (copy / "evaluation" / "sizes.txt").read_text() == "drawn"
    # the table of a later command, which does not know the suite, has its numbers too
    assert evaluate.table(json.loads((copy / "evaluation.json").read_text())).splitlines() == rows
