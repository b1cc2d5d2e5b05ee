"""The evaluation command on a short run of the digits, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from short_runs import small

from supcon_jax import evaluate, train
from supcon_jax.data.sources import open_source
from supcon_jax.evaluation.corruptions import corrupted

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
    assert (workdir / "evaluation" / "confusion-encoder.png").read_bytes().startswith(b"\x89PNG")
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


def test_few_images_a_class(finished, monkeypatch):
    monkeypatch.setattr(evaluate, "SHOTS", (1, 20, 1000))
    found = evaluate.evaluate(finished[0], ["few_shot"])["suites"]["encoder, length 1"]["few_shot"]
    assert found.keys() == {"draws", "1", "20"}  # no class has 1,000 images
    for name in ("probe", "class_mean"):
        assert found["20"][name]["mean"] > found["1"][name]["mean"] > 0.2
        assert found["20"][name]["sd"] < found["1"][name]["sd"]


def test_corrupted_images(finished, monkeypatch):
    names = ("gaussian_noise", "contrast")
    monkeypatch.setattr(evaluate, "CORRUPTIONS", names)
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
    subject = subject_of(workdir)
    noisy = subject.look(corrupted(subject.data.test, "gaussian_noise", 3))
    assert errors[0, 2] == pytest.approx((noisy.outputs.argmax(-1) != noisy.labels).mean())


def subject_of(workdir):
    run = evaluate.open_run(workdir)
    return evaluate.Subject(run, evaluate.parallel.make_mesh(), "encoder", True)


def test_an_interrupted_suite_goes_on(copy, monkeypatch):
    monkeypatch.setattr(evaluate, "CORRUPTIONS", ("contrast", "brightness"))
    original, calls = evaluate._on_corrupted, []

    def failing(subject, name, severity):
        calls.append((name, severity))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(subject, name, severity)

    monkeypatch.setattr(evaluate, "_on_corrupted", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(copy, ["robustness"])
    log = copy / "evaluation" / "corruptions-encoder-unit.jsonl"
    log.write_text(log.read_text() + '{"name": "contrast", "sev')  # it was killed while writing
    found = evaluate.evaluate(copy, ["robustness"])["suites"]["encoder, length 1"]["robustness"]
    assert calls[4:] == [
        ("contrast", 4),
        ("contrast", 5),
        *(("brightness", s) for s in range(1, 6)),
    ]
    monkeypatch.setattr(evaluate, "_on_corrupted", original)
    log.unlink()
    whole = evaluate.evaluate(copy, ["robustness"])["suites"]["encoder, length 1"]["robustness"]
    assert whole == found


def test_linear_stage_by_sgd(copy):
    record = evaluate.evaluate(copy, ["sgd_probe"])
    found = record["suites"]["encoder, length 1"]["sgd_probe"]
    results = json.loads((copy / "results.json").read_text())
    # the same stage as the run's own, from the same encoder, seed and order of images
    assert found["top1"] == pytest.approx(results["test"]["top1"], abs=1e-9)
    assert found["epochs"] == 1.0
    with pytest.raises(ValueError, match="of the encoder's output: --features encoder"):
        evaluate.evaluate(copy, ["sgd_probe"], layer="projection")


def test_results_of_other_weights_are_not_kept(copy):
    evaluate.evaluate(copy)
    file = copy / "evaluation.json"
    record = json.loads(file.read_text())
    record["steps"]["linear"] = 3
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
    monkeypatch.setattr(evaluate, "CORRUPTIONS", ("contrast",))
    evaluate.evaluate(finished[0], ["standard", "few_shot", "robustness"])
    text = evaluate.table(json.loads((finished[0] / "evaluation.json").read_text()))
    assert max(map(len, text.splitlines())) <= 80
    assert "classifier of the run" in text
