"""The command from end to end: results, exact resume, and one clear line for what goes wrong."""

import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from short_runs import small
from sklearn.datasets import load_digits, load_sample_image
from state_dicts import state_dict_of

from supcon_jax import config as configuration
from supcon_jax import parallel, report, stages, train
from supcon_jax.checkpoints import Checkpoints
from supcon_jax.data.sources import from_arrays, hold_out
from supcon_jax.logs import Recorder, read_metrics
from supcon_jax.models import ResNet, load_torch_encoder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never stopped."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, train.train_and_evaluate(small(), workdir)


@pytest.fixture(autouse=True)
def no_pictures(finished, monkeypatch):
    """One run draws them, before this; t-SNE takes longer than the training here."""
    monkeypatch.setattr(report, "draw", lambda workdirs, out: [])


def without_times(tree):
    if isinstance(tree, dict):
        return {k: without_times(v) for k, v in tree.items() if not k.startswith("time/")}
    return [without_times(x) for x in tree] if isinstance(tree, list) else tree


def final_arrays(workdir, stage):
    """All arrays of a stage's last checkpoint, as they are stored."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / stage / "last"
    with ocp.CheckpointManager(folder.absolute()) as manager:
        restored = manager.restore(
            manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore())
        )
    state = restored.state
    return {**state, "key": jax.random.key_data(state["key"])}


def test_results_and_files(finished):
    workdir, results = finished
    assert results == json.loads((workdir / "results.json").read_text())
    assert results["recipe"] == ["supcon", "linear"]
    assert results["test"]["images"] == 360
    assert 0.1 < results["test"]["knn"] <= 1
    assert results["test"]["top1"] <= results["test"]["top5"]
    assert results["stages"]["supcon"]["passes"] == 10 * 256 * 2
    assert results["stages"]["linear"]["passes"] == 5 * 256
    recorded = json.loads((workdir / "config.json").read_text())
    assert recorded["config"] == configuration.used(small())
    assert recorded["config_hash"] == results["config_hash"]
    for picture in ("curves.png", "embedding.png"):
        assert (workdir / picture).read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))


def test_metrics_make_the_loss_readable(finished):
    records = [r for r in read_metrics(finished[0]) if r["stage"] == "supcon"]
    assert [r["step"] for r in records] == [0, 3, 5, 6, 9, 10]  # logs, and looks every 5 steps
    logged = [r for r in records if "excess" in r]
    assert [r["step"] for r in logged] == [3, 6, 9]
    for record in logged:
        np.testing.assert_allclose(record["collapsed"], np.log(511), rtol=1e-6)
        np.testing.assert_allclose(record["loss"], record["floor"] + record["excess"], rtol=1e-5)
        assert record["lonely"] == 0
    assert [r["step"] for r in records if "heldout/knn" in r] == [0, 5, 10]
    assert all("time/images_per_s" in r for r in records[1:])


def test_last_and_best_checkpoints_are_kept(finished):
    workdir, _ = finished
    folder = workdir / "checkpoints" / "supcon"
    assert {p.name for p in (folder / "last").iterdir()} == {"5", "10"}
    scores = {r["step"]: r["heldout/knn"] for r in read_metrics(workdir) if r.get("step")
              and r["stage"] == "supcon" and "heldout/knn" in r}  # fmt: skip
    (best,) = [int(p.name) for p in (folder / "best").iterdir()]
    assert scores[best] == max(scores.values())


def stop_after(monkeypatch, stage, step):
    """A run that ends after a step of a stage, as Ctrl-C would end it."""
    original = Recorder.add

    def add(self, at, metrics):
        original(self, at, metrics)
        if (self._stage, at) == (stage, step):
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "add", add)


@pytest.mark.slow
def test_resumed_run_ends_in_the_same_bits(finished, tmp_path, monkeypatch):
    whole, expected = finished
    for stage, step in (("supcon", 4), ("supcon", 8), ("linear", 3)):
        with monkeypatch.context() as patch:
            stop_after(patch, stage, step)
            with pytest.raises(KeyboardInterrupt):
                train.train_and_evaluate(small(), tmp_path)
    results = train.train_and_evaluate(small(), tmp_path)
    assert without_times(results) == without_times(expected)
    assert without_times(read_metrics(tmp_path)) == without_times(read_metrics(whole))
    for stage in ("supcon", "linear"):
        actual, wanted = final_arrays(tmp_path, stage), final_arrays(whole, stage)
        assert len(jax.tree.leaves(wanted)) > 60
        jax.tree.map(np.testing.assert_array_equal, actual, wanted)


@pytest.mark.slow
def test_encoder_from_a_file_is_scored(tmp_path):
    """The linear stage alone: the encoder stays as the file has it, the classifier learns."""
    config = small("linear", model__weights=str(tmp_path / "encoder.npz"), linear__epochs=8.0)
    encoder = ResNet(10, width=0.0625, stem="cifar")
    np.savez(config.model.weights, **state_dict_of(encoder, channels=1))
    results = train.train_and_evaluate(config, tmp_path / "run")
    assert results["recipe"] == ["linear"]
    assert results["test"]["top1"] > 0.3  # of random features; chance is 0.1
    frozen = final_arrays(tmp_path / "run", "linear")["frozen"]["encoder"]
    expected = load_torch_encoder(config.model.weights, encoder)["params"]
    jax.tree.map(np.testing.assert_array_equal, frozen, expected)


@pytest.mark.slow
def test_average_of_the_parameters_is_evaluated_and_handed_on(tmp_path):
    config = small(supcon__average=0.5, supcon__epochs=1.0)
    train.train_and_evaluate(config, tmp_path)
    state = final_arrays(tmp_path, "supcon")
    handed_on = final_arrays(tmp_path, "linear")["frozen"]["encoder"]
    jax.tree.map(np.testing.assert_array_equal, handed_on, state["aux"]["average"]["encoder"])
    assert not np.array_equal(
        handed_on["conv_stem"]["kernel"], state["params"]["encoder"]["conv_stem"]["kernel"]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 40 JPEGs each: parts of two photographs."""
    root = tmp_path_factory.mktemp("folder")
    for split, name in itertools.product(("train", "test"), ("china", "flower")):
        photo = load_sample_image(f"{name}.jpg")
        (root / split / name).mkdir(parents=True)
        for i in range(40):
            row, column = divmod(i + 40 * (split == "test"), 10)
            part = photo[48 * row : 48 * row + 40, 60 * column : 60 * column + 44]
            Image.fromarray(part).save(root / split / name / f"{i}.jpg")
    return root


@pytest.mark.parametrize("memory", [pytest.param(4.0, marks=pytest.mark.slow), 0.0])
def test_folder_trains_from_memory_and_streamed(folder, tmp_path, memory):
    """Mixed images, whose partners and shares must arrive on either way; then in the same manner
    one view an image for evaluation.
    """
    config = configuration.load("imagenette:cross_entropy")
    config.data.update(dir=str(folder), test_split="test", load_size=32, image_size=16)
    config.data.update(memory_limit_gb=memory, workers=1, holdout=0.0, per_class=32)
    config.model.update(depth=10, width=0.0625, stem="cifar")
    config.log.update(every_steps=1)
    config.cross_entropy.update(batch_size=32, epochs=2.0, warmup_epochs=0.0)
    config.cross_entropy.update(samples_per_class=16, mix="mixup", micro_batches=2)
    config.cross_entropy.augment.update(name="crop_flip")
    results = train.train_and_evaluate(config, tmp_path)
    assert results["stages"]["cross_entropy"]["steps"] == 4  # 64 images, 2 batches an epoch
    assert results["test"]["images"] == 80
    losses = [r["loss"] for r in read_metrics(tmp_path) if "loss" in r]
    assert len(losses) == 4 and 0.1 < np.mean(losses) < 2


def test_finished_run_is_only_evaluated_again(finished, monkeypatch):
    workdir, expected = finished
    monkeypatch.setattr(Recorder, "add", None)  # a step would call it
    assert without_times(train.train_and_evaluate(small(), workdir)) == without_times(expected)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(finished, tmp_path, capsys):
    import shutil

    workdir, expected = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    newest = copy / "checkpoints" / "supcon" / "last" / "10" / "state"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    results = train.train_and_evaluate(small(), copy)
    message = capsys.readouterr().err
    assert "last/10 is not usable" in message
    assert without_times(results) == without_times(expected)


def test_another_configuration_is_refused_with_the_difference(finished):
    workdir, _ = finished
    config = small(supcon__epochs=3.0, log__every_steps=1)
    with pytest.raises(ValueError, match="another configuration") as refusal:
        train.train_and_evaluate(config, workdir)
    assert "\n  supcon.epochs: 2.0 -> 3.0\n" in str(refusal.value)
    assert "log" not in str(refusal.value)
    assert "--allow_config_change" in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["simclr", "cross_entropy"])
def test_other_recipes_run(recipe, tmp_path):
    results = train.train_and_evaluate(small(recipe), tmp_path)
    assert results["recipe"][0] == recipe
    assert results["test"]["images"] == 360


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    config = small("cross_entropy", cross_entropy__epochs=3.0)
    config.cross_entropy.schedule.learning_rate = 1e30
    with pytest.raises(FloatingPointError) as stop:
        train.train_and_evaluate(config, tmp_path)
    message = str(stop.value)
    assert "the loss of stage cross_entropy is" in message
    assert "(learning rate 9" in message
    assert "Likely causes: the learning rate is too high" in message
    assert str(tmp_path / "checkpoints" / "cross_entropy") in message


def test_checkpoint_before_a_loss_that_is_not_finite_is_kept(tmp_path, monkeypatch):
    """The last of 10 steps is poisoned: step 5 stays, nothing is saved after it."""
    original = Recorder.add

    def poisoned(self, step, metrics):
        nan = {"loss": jax.numpy.nan} if step == 9 else {}
        original(self, step, {**metrics, **nan})

    monkeypatch.setattr(Recorder, "add", poisoned)
    with pytest.raises(FloatingPointError, match="is nan at step 9"):
        train.train_and_evaluate(small("cross_entropy"), tmp_path)
    folder = tmp_path / "checkpoints" / "cross_entropy" / "last"
    assert {p.name for p in folder.iterdir()} == {"5"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"supcon__batch_size": 100}, "config.supcon.batch_size=100 must be a multiple of the 8 "
         "devices, such as 104"),
        ({"linear__batch_size": 2000}, "config.linear.batch_size=2000 is larger than the 1394 "
         "training images of digits/train; set it to 1392 or less"),
        ({"model__stem": "imagenet"}, "config.data.image_size=8 is too small for this encoder, "
         "which needs 32 pixels"),
        ({"data__test_split": "tset"}, "digits has the splits train, test, first1437, last360, not "
         "'tset'"),
        ({"supcon__warmup_epochs": 2.0}, "config.supcon.warmup_epochs must be below "
         "config.supcon.epochs=2, such as 0.2; got 2.0"),
    ],
)  # fmt: skip
def test_wrong_sizes_are_refused_before_anything_is_written(fields, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as refusal:
        train.train_and_evaluate(small(**fields), tmp_path / "new")
    assert message in str(refusal.value)
    assert not (tmp_path / "new").exists()


def test_workdir_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(
        OSError, match=f"cannot write to the workdir {blocked}/run: Not a directory"
    ):
        train.train_and_evaluate(small(), blocked / "run")


def command(*arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "supcon_jax.train", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env=env,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/resnet200.py"], "error: data set 'imagenet2012' is not in"),
        (["--config=digits", "--config.supcon.epoch=3"], "did you mean 'supcon.epochs'?"),
        (["--config=digits", "--config.supcon.epochs=many"], "--config.supcon.epochs=many: could "
         "not convert string to float"),
        (["--config=digits", "--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
        (["--config=digits", "extra"], "error: not understood: extra"),
        (["--config=digits", "--process_id=0"], "error: cannot start the processes of the run: "
         "coordinator_address should be defined. Outside of SLURM"),
        (["--config=digts"], "did you mean 'digits'?"),
        ([], "error: no --config, such as --config digits; --help tells more"),
    ],
)  # fmt: skip
def test_command_says_what_is_wrong_in_one_line(arguments, message, tmp_path):
    done = command(*arguments, *([f"--workdir={tmp_path}/w"] if arguments else []))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line]) == 1
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_command_trains_and_prints_the_table(tmp_path):
    """And keeps its compiled programs, and a trace of some steps."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "caches")}
    del env["JAX_COMPILATION_CACHE_DIR"]
    done = command(
        "--config=digits", f"--workdir={tmp_path}/w", "--config.supcon.epochs=1",
        "--config.supcon.warmup_epochs=0", "--config.linear.epochs=2",
        "--config.model.width=0.0625", "--profile",
        env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for stage, steps in (("supcon", 8), ("linear", 10)):  # of 10 and 20, from the third on
        (file,) = (tmp_path / "w" / "profile" / stage).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        numbers = [e["args"]["step_num"] for e in events if e.get("name") == "train_step"]
        assert numbers == [str(step) for step in range(3, 3 + steps)]
        assert list(file.parent.glob("*.xplane.pb"))  # what TensorBoard reads
    assert any(tmp_path.glob("caches/supcon_jax/*/jit_train_step*"))
    header = ["run", "top-1", "k-NN", "passes", "time", "images/s"]
    assert done.stdout.splitlines()[0].split() == header
    assert all(len(line) <= 80 for line in done.stdout.splitlines() + done.stderr.splitlines())


def test_checkpoints_of_another_model_are_refused(finished):
    workdir, _ = finished
    config = small(model__width=0.125)
    data, mesh = stages.open_data(config), parallel.make_mesh()
    stage = stages.build_stage(config, "supcon", data, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints" / "supcon", keep=2)
    said = []
    with pytest.raises(ValueError, match="no usable checkpoint"):
        checkpoints.restore(stages.create(stage, config, mesh, None), warn=said.append)
    checkpoints.close()
    assert len(said) == 2
    assert "it is of another model" in said[0]
    assert "([4] float32 there, [8] float32 here)" in said[0]


@pytest.fixture
def with_bad_images(tmp_path):
    """Digits in a folder, 400 to train on and 80 to test; a held-out one and another are text."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images[:480], digits.target, strict=False)):
        file = tmp_path / "images" / ("train" if i < 400 else "test") / str(label) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(15 * pixels)).save(file)
    files = sorted((tmp_path / "images" / "train").rglob("*.png"))
    source = from_arrays("", np.zeros((400, 1, 1, 1), np.uint8), np.arange(400), [""] * 400)
    for part in hold_out(source, 0.2):
        files[part.labels()[5]].write_text("not an image")
    return tmp_path / "images"


@pytest.mark.parametrize("gigabytes", [0.0, 1.0], ids=["streamed", "in memory"])
def test_bad_training_images_are_skipped_from_the_first_look_to_the_last(
    gigabytes, with_bad_images, tmp_path, capsys
):
    data = dict(source="folder", dir=str(with_bad_images), test_split="test", holdout=0.2,
                memory_limit_gb=gigabytes, workers=0)  # fmt: skip
    config = small("cross_entropy", **{f"data__{name}": value for name, value in data.items()})
    config.cross_entropy.batch_size = 64
    with pytest.raises(ValueError, match=r"^cannot decode .*\.png: "):
        train.train_and_evaluate(config, tmp_path / "run")
    config.data.on_error = "skip"
    results = train.train_and_evaluate(config, tmp_path / "run")
    assert results["test"]["images"] == 80
    looks = [r["step"] for r in read_metrics(tmp_path / "run") if "heldout/knn" in r]
    assert looks == [0, 4 if gigabytes else 5, 8 if gigabytes else 10]
    left_out = [line for line in capsys.readouterr().err.splitlines() if " left out: " in line]
    assert len(left_out) == 2 and all(": 1 of " in line for line in left_out)
    again = train.train_and_evaluate(config, tmp_path / "run")  # and when it is started again
    assert without_times(again) == without_times(results)


@pytest.mark.slow
def test_parts_of_a_batch_train_as_the_whole(tmp_path):
    """Without batch norm the gradient of the parts is that of the batch."""
    vit = {"model__name": "vit", "model__size": "ti", "model__patch": 4}
    vit["supcon__head__batch_norm"] = False
    losses = []
    for parts in (1, 4):
        config = small(supcon__micro_batches=parts, linear__micro_batches=parts, **vit)
        config.log.every_steps = 1
        config.supcon.schedule.learning_rate = 0.02
        train.train_and_evaluate(config, tmp_path / str(parts), pictures=False)
        records = read_metrics(tmp_path / str(parts))
        losses.append([r["loss"] for r in records if "loss" in r])
    assert len(losses[0]) == len(losses[1]) == 15
    assert losses[0][9] < losses[0][0] - 0.02  # it learns
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


@pytest.mark.slow
def test_parts_of_a_batch_with_batch_norm_train(tmp_path):
    """Their statistics are those of each part, so that the run is another one, but as good."""
    config = small(supcon__micro_batches=4, supcon__epochs=8.0)
    results = train.train_and_evaluate(config, tmp_path, pictures=False)
    assert results["test"]["knn"] > 0.7
