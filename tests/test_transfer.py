"""Transfer to other data sets: what is opened, what is chosen on what, where fine-tuning starts."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from short_runs import small
from sklearn.datasets import load_digits, load_sample_image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from supcon_jax import config as configuration
from supcon_jax import evaluate, parallel, stages, suites, train, trained, transfer
from supcon_jax.evaluation.class_means import nearest_class_mean
from supcon_jax.evaluation.probe import sweep_probe

SIZES = {"train": 40, "validation": 16, "test": 16}  # images of each class
GRID = transfer.Grid((1e-3, 3e-2), (0.0, 1e-3), steps=40, batch_size=32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    config = small()
    config.stages = ("supcon",)
    train.train_and_evaluate(config, workdir, pictures=False)
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("evalu*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three digits in three splits: an official one to choose on."""
    root = tmp_path_factory.mktemp("target")
    pixels, labels = load_digits(return_X_y=True)
    for digit in (1, 4, 7):
        images = iter(pixels[labels == digit])
        for split, count in SIZES.items():
            place = root / split / f"digit {digit}"
            place.mkdir(parents=True)
            for number in range(count):
                image = np.uint8(next(images).reshape(8, 8) * 15)
                Image.fromarray(image).save(place / f"{number:02}.png")
    return root


def subject_of(workdir, normalised=True):
    return suites.Subject(trained.open_run(workdir), parallel.make_mesh(), "encoder", normalised)


def opened(workdir, on, **options):
    return transfer.open_target(trained.open_run(workdir).config, on, **options)


def contents(source):
    return source.load(np.arange(source.size))


# What is opened.


def test_an_official_split_is_what_is_chosen_on(finished, folder):
    target = opened(finished, f"folder:{folder}")
    assert target.images == {"train": 120, "validation": 48, "test": 48}
    assert target.classes == 3
    assert target.metric == "top1"
    for got, first, second in zip(
        contents(target.both), contents(target.train), contents(target.validation), strict=True
    ):
        np.testing.assert_array_equal(got, np.concatenate([first, second]))


def test_else_a_fifth_of_each_class_is_held_out(finished, folder):
    target = opened(finished, f"folder:{folder}", splits=("train", "test"))
    assert target.images == {"train": 96, "validation": 24, "test": 48}
    np.testing.assert_array_equal(np.bincount(target.validation.labels()), [8, 8, 8])
    parts = [contents(part)[0] for part in (target.train, target.validation)]
    rows = {image.tobytes() for part in parts for image in part}
    assert rows == {image.tobytes() for image in contents(target.both)[0]}
    assert len(rows) == target.both.size == 120  # no image is in both parts


def test_a_folder_without_test_images_is_tested_on_its_validation_images(
    finished, folder, tmp_path
):
    shutil.copytree(folder / "train", tmp_path / "train")
    shutil.copytree(folder / "validation", tmp_path / "val")
    target = opened(finished, f"folder:{tmp_path}")
    assert target.images == {"train": 96, "validation": 24, "test": 48}
    assert target.fields["test_split"] == "val"


def test_images_are_brought_to_what_the_encoder_takes(finished, tmp_path):
    """Coloured crops of two photographs, for an encoder of 8 x 8 grey pixels."""
    for split in ("train", "test"):
        for name in ("china", "flower"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for row in range(5):
                crop = load_sample_image(f"{name}.jpg")[32 * row :][:32, 100:132]
                Image.fromarray(crop).save(place / f"{row}.png")
    images, _ = contents(opened(finished, f"folder:{tmp_path}").both)
    assert images.shape == (10, 8, 8, 1)
    assert images.std() > 10


def test_the_data_of_the_run_are_not_needed(finished, folder, monkeypatch):
    monkeypatch.setattr(suites, "open_data", None)
    monkeypatch.setattr(transfer, "PENALTIES", (1.0,))
    evaluate.evaluate(finished, ["transfer_linear"], on=f"folder:{folder}")


def test_table_4(monkeypatch, finished):
    """Nine of its data sets, with the metrics that the table's caption gives."""
    of_classes = {"oxford_iiit_pet", "caltech101", "oxford_flowers102"}
    assert len(transfer.DATASETS) == 9
    for name, known in transfer.DATASETS.items():
        assert known.metric == ("mean_per_class" if name in of_classes else "top1")
        with pytest.raises(FileNotFoundError, match=f"data set '{name}' is not in .*nowhere"):
            opened(finished, f"tfds:{name}", data_dir="nowhere")
    official = {name for name, known in transfer.DATASETS.items() if len(known.splits) == 3}
    assert official == {"dtd", "oxford_flowers102"}


@pytest.mark.parametrize(
    ("on", "options", "message"),
    [
        ("digit", {}, "expected tfds:NAME, folder:PATH or digits to transfer to; got 'digit'"),
        ("folder:", {}, "expected tfds:NAME, folder:PATH or digits to transfer to; got 'folder:'"),
        ("digits", {"splits": ("train", "dev", "test")}, "digits has the splits train, test, .*d"),
        ("digits", {"splits": ("train",)}, r"splits must be train, \(validation,\) and test; got "),
        ("digits", {"metric": "top"}, "unknown metric 'top'; did you mean 'top1'"),
        ("folder:/nowhere/x", {}, "no image folder /nowhere/x/train"),
    ],
)  # fmt: skip
def test_what_cannot_be_opened(finished, on, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(finished, on, **options)


def test_splits_of_different_classes_are_refused(finished, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "test" / "digit 4").rename(tmp_path / "copy" / "test" / "digit 5")
    with pytest.raises(ValueError, match="must have the same classes, to be scored together"):
        opened(finished, f"folder:{tmp_path / 'copy'}")


def test_errors_of_the_command_are_one_line(finished, folder, capsys):
    command = ["--workdir", str(finished), "--suite"]
    for arguments, message in (
        (["transfer_linear"], "the suite transfer_linear needs a data set: --on tfds:NAME, fol"),
        (["standard", "--on", "digits"], "--on is for the suites few_shot, transfer_linear, tra"),
        (["transfer_linear", "--on", "digits", "--splits", "train", "x"], "digits has the splits"),
        (["transfer_finetune", "--on", "digits", "--features", "projection"], "the suite transfer"),
        (["transfer_finetune", "--on", "digits", "--steps", "0"], "fine-tuning needs steps and a"),
        (["transfer_finetune", "--on", "digits", "--learning_rates", "0"], "fine-tuning needs lea"),
        (["transfer_finetune", "--on", f"folder:{folder}"], "config.finetune.batch_size=256 is la"),
    ):
        with pytest.raises(SystemExit) as ended:
            evaluate.main([*command, *arguments])
        assert ended.value.code == 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "learning rate 0" not in x]
        assert line.startswith(f"error: {message}")


# The linear protocol.


def test_metrics():
    random = np.random.RandomState(0)
    labels = random.choice(4, 200, p=[0.7, 0.1, 0.1, 0.1])
    predicted = np.where(random.rand(200) < 0.5, 0, labels)
    balanced = balanced_accuracy_score(labels, predicted)
    assert transfer.mean_per_class(predicted, labels, 4) == pytest.approx(balanced)
    assert transfer.mean_per_class(predicted, labels, 5) == pytest.approx(balanced)  # one is empty
    assert transfer.top1(predicted, labels, 4) == (predicted == labels).mean() > balanced + 0.1


def test_the_grid_of_penalties_is_the_protocols():
    assert len(transfer.PENALTIES) == 45
    np.testing.assert_allclose(np.diff(np.log10(transfer.PENALTIES)), 0.25)
    np.testing.assert_allclose([transfer.PENALTIES[0], transfer.PENALTIES[-1]], [1e-6, 1e5])


def test_linear_protocol_is_the_sweep_and_scikit_learns_regression(finished, folder):
    penalties = (1e-3, 1e-2, 1e-1, 1.0, 100.0)
    subject = subject_of(finished)
    target = opened(finished, f"folder:{folder}", splits=("train", "test"))
    found = transfer.linear(target, subject.look, penalties=penalties)
    whole, test = subject.look(target.both), subject.look(target.test)
    swept = sweep_probe(
        whole.features,
        whole.labels,
        classes=3,
        penalties=[penalty / target.train.size for penalty in penalties],
        holdout=transfer.HOLDOUT,
    )
    assert list(found["grid"].values()) == list(dict(sorted(swept.accuracies.items())).values())
    assert found["validation"] == max(found["grid"].values())
    assert found["penalty"] == pytest.approx(swept.l2 * target.train.size)
    reference = LogisticRegression(C=1 / found["penalty"], tol=1e-7, max_iter=10_000)
    score = reference.fit(whole.features, whole.labels).score(test.features, test.labels)
    assert found["test"] == found["top1"] == pytest.approx(score, abs=1 / 48 + 1e-9)
    assert found["test"] > 0.6  # chance is 1/3


def test_results_on_several_data_sets_add_up(copy, folder, monkeypatch):
    monkeypatch.setattr(transfer, "PENALTIES", (1e-2, 1.0))
    evaluate.evaluate(copy, ["transfer_linear"], on=f"folder:{folder}", metric="mean_per_class")
    record = evaluate.evaluate(copy, ["transfer_linear"], on="digits")
    found = record["suites"]["encoder, length 1"]["transfer_linear"]
    assert found.keys() == {f"folder:{folder}", "digits"}
    assert found[f"folder:{folder}"]["metric"] == "mean_per_class"
    assert found["digits"]["test"] > 0.3
    text = evaluate.table(record)
    assert max(map(len, text.splitlines())) <= 80
    assert "mean per class" in text


def test_few_images_a_class_of_another_data_set(copy, folder, monkeypatch):
    """Of all images of each class there is one choice only, so that the score is known."""
    monkeypatch.setattr(suites, "SHOTS", (1, 56, 57))  # 40 and 16 images of each digit
    on, metric = f"folder:{folder}", "mean_per_class"
    with monkeypatch.context() as patch:
        patch.setattr(suites, "open_data", None)  # of the run, which is not needed
        record = evaluate.evaluate(copy, ["few_shot"], on=on, metric=metric)
    found = record["suites"]["encoder, length 1"][f"few_shot on {on}"]
    assert found.keys() == {"metric", "draws", "1", "56"}
    assert found["metric"] == metric
    subject, target = subject_of(copy), opened(copy, on)
    both, test = subject.look(target.both), subject.look(target.test)
    nearest = nearest_class_mean(test.features, both.features, both.labels)
    balanced = balanced_accuracy_score(test.labels, nearest)
    assert found["56"]["class_mean"] == {"mean": pytest.approx(balanced), "sd": pytest.approx(0)}
    assert found["56"]["probe"]["mean"] > found["1"]["probe"]["mean"] > 1 / 3
    longer = evaluate.evaluate(copy, ["few_shot"])
    of_features = longer["suites"]["encoder, length 1"]
    assert of_features[f"few_shot on {on}"] == found
    assert of_features["few_shot"]["metric"] == "top1"
    pictures = {file.name for file in (copy / "evaluation").glob("few_shot-encoder-unit*.png")}
    assert len(pictures) == 2
    text = evaluate.table(longer)
    assert max(map(len, text.splitlines())) <= 80
    assert "class mean  mean per class" in text and "class mean  top1" in text


# Fine-tuning.


def test_the_grid_of_fine_tuning_is_the_protocols():
    rates, decays, steps, batch_size = transfer.PROTOCOL
    np.testing.assert_allclose(np.log10(rates), np.linspace(-4, -1, 7))
    np.testing.assert_allclose(np.log10(decays[1:]), np.linspace(-6, -3, 7))
    assert (decays[0], steps, batch_size) == (0.0, 20_000, 256)
    stage = configuration.base().finetune
    assert (stage.optimizer.name, stage.optimizer.momentum) == ("nesterov", 0.9)
    assert (stage.schedule.name, stage.warmup_epochs) == ("cosine", 0.0)
    assert (stage.augment.name, stage.augment.flip) == ("crop_flip", 0.5)


@pytest.mark.parametrize(("images", "momentum"), [(2000, 0.9), (25_600, 0.9), (51_200, 0.95)])
def test_the_configuration_of_a_point(finished, folder, images, momentum):
    config, target = trained.open_run(finished).config, opened(finished, f"folder:{folder}")
    point = transfer.finetuning_config(config, target, images, rate=0.01, decay=1e-4)
    assert point.model.batch_norm_momentum == pytest.approx(momentum)
    assert point.finetune.optimizer.weight_decay == pytest.approx(0.01)
    assert point.data.dir == str(folder)
    assert point.data.image_size == config.data.image_size
    per_epoch = images // 256
    assert round(point.finetune.epochs * per_epoch) == 20_000
    model = stages.build_model(point, "finetune", classes=3)
    assert model.encoder.batch_norm_momentum == pytest.approx(momentum)
    assert config.model.batch_norm_momentum == 0.9  # the run's own is as it was


@pytest.fixture(scope="module")
def point(finished, folder):
    """One point of a grid, before its first step."""
    subject, mesh = subject_of(finished), parallel.make_mesh()
    target = opened(finished, f"folder:{folder}")
    config = transfer.finetuning_config(
        subject.run.config, target, 120, rate=0.1, decay=0.0, grid=GRID, normalised=True
    )
    data = stages.Data(target.train, target.validation, target.train, target.test)
    return subject, config, data, mesh, *transfer.start(config, subject.trained.state, data, mesh)


def test_fine_tuning_starts_from_the_encoder_of_the_run(point):
    subject, config, _, _, stage, first = point
    assert (stage.steps, stage.steps_per_epoch) == (40, 3)
    assert first.frozen == {}  # all of it is trained
    assert first.params.keys() == {"encoder", "head"}
    last = subject.trained.state
    for got, expected in ((first.params, last.params), (first.batch_stats, last.batch_stats)):
        jax.tree.map(np.testing.assert_array_equal, got["encoder"], expected["encoder"])
    assert config.model.normalize and stage.model.normalize


@pytest.mark.slow
def test_the_first_loss_is_that_of_this_encoder(point):
    """Cross-entropy on the first batch: not what it is from scratch with the same classifier."""
    _, config, data, mesh, stage, first = point
    scratch = stages.create(stage, config, mesh, previous=None)
    jax.tree.map(np.testing.assert_array_equal, first.params["head"], scratch.params["head"])
    batch = next(stages.batches(stage, 0, config, data.train, mesh))
    losses = []
    for state in (first, scratch):
        before = np.asarray(state.params["encoder"]["conv_stem"]["kernel"])
        after, metrics = stage.train_step(jax.tree.map(jax.numpy.copy, state), batch)
        losses.append(float(metrics["loss"]))
        assert np.abs(after.params["encoder"]["conv_stem"]["kernel"] - before).max() > 0
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.slow
def test_fine_tuning_chooses_by_validation_and_trains_on_both(copy, folder, monkeypatch):
    original, runs = transfer.run_stage, []

    def counted(stage, state, config, data, *rest):
        runs.append((config.finetune.schedule.learning_rate, data.train.size))
        last = original(stage, state, config, data, *rest)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return last

    monkeypatch.setattr(transfer, "run_stage", counted)
    options = dict(on=f"folder:{folder}", grid=GRID)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(copy, ["transfer_finetune"], **options)
    (place,) = (copy / "evaluation" / "transfer").iterdir()
    assert len(list(place.glob("lr-*/checkpoints"))) == 1  # of the point that goes on
    record = evaluate.evaluate(copy, ["transfer_finetune"], **options)
    found = record["suites"]["encoder, length 1"]["transfer_finetune"][options["on"]]
    assert runs[:3] == [(1e-3, 120), (1e-3, 120), (3e-2, 120)]  # the third was not finished
    assert runs[3:-1] == [(3e-2, 120), (3e-2, 120)]
    assert runs[-1] == (found["learning_rate"], 168)  # training and validation images
    points = found["grid"]
    assert found["validation"] == max(point["validation"] for point in points)
    assert found["learning_rate"] == 3e-2  # at a thousandth 40 steps change little
    assert found["test"] == found["top1"] > 0.5
    assert [p["weight_decay"] for p in points] == [0.0, 1e-3] * 2
    assert sorted(p.name for p in place.glob("*/checkpoints")) == ["checkpoints"]
    assert (place / "best" / "checkpoints" / "finetune" / "last" / "40").is_dir()
    again = evaluate.evaluate(copy, ["transfer_finetune"], **options)
    assert again["suites"] == record["suites"]
    assert len(runs) == 6  # nothing was run again
    text = evaluate.table(record)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.slow
def test_points_that_diverge_have_no_score(copy, folder):
    grid = GRID._replace(learning_rates=(1e-2, 1e30), weight_decays=(0.0,), steps=6)
    (found,) = evaluate.evaluate(copy, ["transfer_finetune"], on=f"folder:{folder}", grid=grid)[
        "suites"
    ]["encoder, length 1"]["transfer_finetune"].values()
    assert [point["validation"] is None for point in found["grid"]] == [False, True]
    assert found["learning_rate"] == 1e-2
    grid = grid._replace(learning_rates=(1e30,))
    with pytest.raises(FloatingPointError, match=r"diverges with all of the learning rates 1e\+30"):
        evaluate.evaluate(copy, ["transfer_finetune"], on=f"folder:{folder}", grid=grid)


@pytest.mark.slow
def test_points_of_other_steps_are_run_again(copy, folder):
    grid = GRID._replace(learning_rates=(1e-2,), weight_decays=(0.0,), steps=3)
    for steps in (3, 4):
        evaluate.evaluate(
            copy,
            ["transfer_finetune"],
            on=f"folder:{folder}",
            grid=grid._replace(steps=steps),
        )
        (file,) = copy.glob("evaluation/transfer/*/best/metrics.jsonl")
        assert json.loads(file.read_text().splitlines()[-1])["step"] == steps
