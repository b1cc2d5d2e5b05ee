"""A finished run is read back as it was, or refused with one clear line."""

import json
import shutil

import jax
import numpy as np
import pytest
from short_runs import small

from supcon_jax import config as configuration
from supcon_jax import parallel, report, stages, train, trained
from supcon_jax.checkpoints import Checkpoints
from supcon_jax.evaluation.embed import embed, top_k_accuracy


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    config = small()
    config.supcon.average = 0.5
    before, report.draw = report.draw, lambda workdirs, out: []
    results = train.train_and_evaluate(config, workdir)
    report.draw = before
    return workdir, config, results


@pytest.fixture
def copy(finished, tmp_path):
    """The run in a folder of its own, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def edited(file, change):
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def believed(copy):
    """The hash of results.json brought in line, as if config.json had been trained with."""
    config = json.loads((copy / "config.json").read_text())["config"]
    found = configuration.config_hash(config)
    edited(copy / "results.json", lambda record: record.update(config_hash=found))


def test_the_configuration_is_the_same(finished):
    workdir, config, _ = finished
    run = trained.open_run(workdir)
    assert run.config.to_dict() == config.to_dict()
    assert (
        configuration.config_hash(configuration.used(run.config))
        == (json.loads((workdir / "results.json").read_text())["config_hash"])
    )
    assert run.class_names == tuple("0123456789")
    assert run.steps == {"supcon": 10, "linear": 5}


@pytest.mark.parametrize("devices", [1, 2])
def test_the_last_state_scores_as_it_did(finished, mesh_of, devices):
    workdir, _, results = finished
    run, mesh = trained.open_run(workdir), mesh_of(devices)
    last = trained.load_stage(run, "linear", mesh)
    test = stages.open_data(run.config).test
    found = embed(last.eval_step, last.state, test, batch_size=100, mesh=mesh)
    assert top_k_accuracy(found, 1) == pytest.approx(results["test"]["top1"], abs=1e-9)
    first = trained.load_stage(run, "supcon", mesh)
    assert int(first.state.step) == 10
    encoder = first.state.evaluated["encoder"]  # the average, which the next stage started from
    jax.tree.map(np.testing.assert_array_equal, encoder, last.state.frozen["encoder"])
    projected = embed(first.eval_step, first.state, test, batch_size=100, mesh=mesh)
    np.testing.assert_allclose(projected.features, found.features, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(projected.outputs, axis=1), 1, rtol=1e-5)


def test_reading_writes_nothing(copy, mesh_of):
    def contents():
        return {file: file.stat().st_mtime_ns for file in copy.rglob("*")}

    before = contents()
    trained.load_stage(trained.open_run(copy), "linear", mesh_of(1))
    assert contents() == before


def test_a_folder_without_a_finished_run_is_refused(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no config.json; is it the --workdir"):
        trained.open_run(tmp_path / "nothing")
    (copy / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no results.json; start it again"):
        trained.open_run(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["config"]["model"].update(dept=18), r"unknown field config.model.dept; did "),
        (lambda r: r["config"]["model"].update(depth=19), r"model.depth"),
        (lambda r: r.pop("class_names"), r"do not belong together or are damaged.*class_names"),
        (lambda r: r["config"].update(stages=["cross_entropy"]), r"do not belong together"),
    ],
)
def test_a_changed_configuration_is_refused(copy, change, message):
    edited(copy / "config.json", change)
    with pytest.raises(ValueError, match=message):
        trained.open_run(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model"].update(normalize=not config["model"]["normalize"]),
        lambda config: config["data"].update(mean=[0.2]),
        lambda config: config["data"].update(load_size=9),
    ],
)
def test_a_configuration_of_the_same_shapes_is_refused(copy, change):
    edited(copy / "config.json", lambda record: change(record["config"]))
    with pytest.raises(ValueError, match=r"config.json is not .* it was changed after training: c"):
        trained.open_run(copy)
    # as where a training was started anew and killed
    edited(copy / "config.json", lambda record: record.update(config_hash="0" * 12))
    with pytest.raises(ValueError, match=r"not the .* a training was started there since: start"):
        trained.open_run(copy)


def test_where_the_data_are_may_be_edited(copy):
    edited(copy / "config.json", lambda record: record["config"]["data"].update(dir="elsewhere"))
    assert trained.open_run(copy).config.data.dir == "elsewhere"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["config"]["model"].update(width=0.125), r"another model: .* shape or type"),
        (lambda r: r["config"]["model"].update(depth=18), r"another model: .*only here"),
        (lambda r: r["config"]["supcon"].update(average=0.0), r"another model: .*only there"),
        (lambda r: r["class_names"].append("ten"), r"\[.*10\] float32 there, \[.*11\] float32"),
    ],
)
def test_weights_of_another_model_are_refused(copy, change, message, mesh_of):
    edited(copy / "config.json", change)
    believed(copy)
    run = trained.open_run(copy)
    with pytest.raises(ValueError, match=message):
        [trained.load_stage(run, name, mesh_of(1)) for name in run.config.stages]


def test_only_the_last_step_is_taken(copy, mesh_of):
    last = copy / "checkpoints" / "linear" / "last"
    shutil.move(last / "5", last / "4")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*linear/last/5"):
        trained.load_stage(trained.open_run(copy), "linear", mesh_of(1))


def test_damage_is_noticed(copy, mesh_of):
    run, mesh = trained.open_run(copy), parallel.make_mesh(jax.devices()[:1])
    files = [f for f in (copy / "checkpoints/linear/last/5").rglob("d/*") if f.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ValueError, match="of its files are damaged"):
        trained.load_stage(run, "linear", mesh)


def saved_anew(copy, change, mesh):
    """The last checkpoint of the linear stage, written again after a change."""
    state, folder = trained.load_stage(trained.open_run(copy), "linear", mesh).state, "linear"
    shutil.rmtree(copy / "checkpoints" / folder)
    checkpoints = Checkpoints(copy / "checkpoints" / folder, keep=1)
    checkpoints.save(change(state))
    checkpoints.close()


def test_a_checkpoint_of_another_training_is_refused(copy, mesh_of):
    mesh = mesh_of(1)
    saved_anew(copy, lambda state: state, mesh)
    trained.load_stage(trained.open_run(copy), "linear", mesh)  # copied, it is the same
    saved_anew(copy, lambda s: s.replace(params=jax.tree.map(jax.numpy.negative, s.params)), mesh)
    run = trained.open_run(copy)
    with pytest.raises(ValueError, match=r"linear/last/5 is of another training: its arrays have"):
        trained.load_stage(run, "linear", mesh)
    trained.load_stage(run, "supcon", mesh)
    for stage in ("supcon", "linear"):  # as earlier versions wrote it
        edited(
            copy / "results.json", lambda record, name=stage: record["stages"][name].pop("checksum")
        )
    old = trained.open_run(copy)
    trained.load_stage(old, "linear", mesh)
    assert old.identity == {"config_hash": run.config_hash, "steps": run.steps}
    assert run.identity == {**old.identity, "checksums": run.checksums}
    assert run.checksums.keys() == run.steps.keys()
