"""What the experiments share: the rule by which claims are judged, records, runs that go on."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats
from short_runs import small

from experiments import claims, runner
from experiments.learning_rate.run import chance, spreads
from experiments.runner import Claim
from supcon_jax.interruption import Stopped

CLAIM = Claim("a is larger", "1 over 0", "a/top1", "b/top1")
NAN = float("nan")


def judged(first, second):
    return claims.judged(CLAIM, {"a/top1": first, "b/top1": second})


@pytest.mark.parametrize(
    ("first", "verdict"),
    [
        ([3.0, 3.5, 4.5, 3.2], "reproduced"),
        ([0.0, -0.5, 0.7, 0.1], "not reproduced"),  # below 0
        ([3.0, -0.5, 4.5, 2.0], "not reproduced"),  # across 0
    ],
)
def test_the_interval_is_that_of_the_paired_t_test(first, verdict):
    second = [1.0, 1.4, 1.5, 1.3]
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    found = judged(first, second)
    np.testing.assert_allclose(found["interval"], expected, atol=1e-4)
    assert found["verdict"] == verdict
    assert found["difference"]["mean"] == pytest.approx(np.subtract(first, second).mean(), abs=1e-4)


def test_what_has_no_interval_is_not_judged():
    one, several, diverged = judged([2.0], [1.0]), judged([2.0, 9.0], [1.0]), judged([2.0], [NAN])
    assert one["interval"] == several["interval"] == diverged["interval"] == [None, None]
    assert one["verdict"] == several["verdict"] == "not judged: one seed"
    assert diverged["verdict"] == "no interval"
    assert judged([2.0, 3.0], [1.0, NAN])["verdict"] == "no interval"
    assert claims.verdict(one) == "a is larger: **not judged: one seed** (+1.00)"
    assert claims.verdict(diverged) == "a is larger: **no interval** (diverged)"


def test_a_run_that_diverged_has_every_metric_of_the_others():
    rows = {"a": [{"top1": 90.0, "knn": 80.0}] * 2, "b": [{}, {}], "c": [{"loss": 1.0}, {}]}
    record = runner.summary(rows, [CLAIM])
    found = {name: of["values"] for name, of in record["quantities"].items()}
    assert found["a/top1"] == [90.0, 90.0] and "a/loss" not in found
    assert found["b/top1"] == found["b/knn"] == [None, None]
    assert found["c/loss"] == [1.0, None]
    assert [claim["verdict"] for claim in record["claims"]] == ["no interval"]
    assert "| b | diverged | diverged | diverged |" in claims.table(record)


def test_claims_on_runs_that_all_diverged_are_listed():
    record = runner.summary({"a": [{}, {}], "b": [{}, {}]}, [CLAIM])
    assert [claim["verdict"] for claim in record["claims"]] == ["no interval"]


def test_derived_quantities_wait_for_all_settings_and_have_the_seeds_of_all():
    def total(values):
        return {"total": [sum(of_seed) for of_seed in zip(*values.values(), strict=True)]}

    part = {"a": [{"top1": 1.0}, {"top1": 2.0}], "b": []}
    assert set(runner.summary(part, derive=total)["quantities"]) == {"a/top1"}
    whole = part | {"b": [{"top1": 5.0}]}
    assert runner.summary(whole, derive=total)["quantities"]["total"]["values"] == [6.0]


def test_a_learning_rate_that_diverges_counts_as_chance():
    rows = {
        f"{factor}: {name}": [{"top1": top1}]
        for name, accuracies in (("SupCon", (60.0, 70.0)), ("cross-entropy", (80.0, NAN)))
        for factor, top1 in zip((1.0, 3.0), accuracies, strict=True)
    }
    rows["3.0: cross-entropy"] = [{}]
    config = ConfigDict({"data": {"name": "cifar100", "source": "folder"}})
    found = runner.summary(rows, derive=spreads, stand_ins=dict.fromkeys(rows, chance(config)))
    of = {name: quantity["mean"] for name, quantity in found["quantities"].items()}
    assert of["3.0: cross-entropy/top1"] is None
    assert of["cross-entropy, best less worst"] == 79.0
    assert of["SupCon, best less worst"] == 10.0


class Training:
    """Stands for the training: tells what it was asked for, and stops or diverges where told."""

    def __init__(self):
        self.runs, self.data, self.ends = [], [], {}

    def __call__(self, config, workdir, *, pictures, data):
        assert not pictures
        self.data.append(data)
        rate = config.supcon.schedule.learning_rate
        self.runs.append((rate, config.seed))
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(json.dumps({"commit": f"commit{len(self.runs)}"}))
        if (rate, config.seed) in self.ends:
            raise self.ends[rate, config.seed]
        results = {"test": {"top1": (rate + config.seed) / 100}}
        (workdir / "results.json").write_text(json.dumps(results))


RATES = {"a": 2.0, "b": 1.0}


@pytest.fixture
def training(monkeypatch):
    made = Training()
    monkeypatch.setattr(runner, "train_and_evaluate", made)
    monkeypatch.setattr(runner, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(runner, "quieten", lambda: None)
    return made


@pytest.fixture
def experiment(training, tmp_path, monkeypatch):
    """`experiment(options...)`: the command, with a stand-in for the training; its record."""

    def settings(scale, data):
        return {n: small(supcon__schedule__learning_rate=rate) for n, rate in RATES.items()}

    def command(*options, scratch="scratch", **changes):
        folders = ["--scratch", str(tmp_path / scratch), "--out", str(tmp_path / "out")]
        # a test's worker has no file
        monkeypatch.setattr(sys.modules["__main__"], "__file__", "mine/run.py", raising=False)
        monkeypatch.setattr(sys, "argv", ["run.py", "--scale", "cpu", *folders, *options])
        drawn = {"draw": lambda record, file: file.write_text(str(record["workdirs"]))}
        runner.main(settings, [CLAIM], **(drawn | changes))

    def recorded(*options, **changes):
        command(*options, **changes)
        return json.loads((tmp_path / "out" / "results.json").read_text())["cpu"]

    return recorded


def test_a_second_call_trains_nothing_and_says_the_same(experiment, training):
    first = experiment("--seeds", "2")
    assert training.runs == [(2.0, 0), (1.0, 0), (2.0, 1), (1.0, 1)]
    assert experiment("--seeds", "2") == first
    assert len(training.runs) == 4
    assert [run["commit"] for run in first["runs"]["a"]] == ["commit1", "commit3"]
    assert len({run["config"] for runs in first["runs"].values() for run in runs}) == 4
    assert first["quantities"]["a/top1"]["values"] == [2.0, 3.0]


def test_runs_of_the_same_images_have_them_opened_once(experiment, training):
    experiment("--seeds", "2")
    first = training.data[0]
    assert all(data is first for data in training.data)
    assert runner.opened(small(data__per_class=10)).train.size == 100 < first.train.size
    assert runner.opened(small(evaluation__references=20)).references.size == 20
    assert runner.opened(small()).references.size == first.references.size


def test_an_experiment_that_keeps_more_takes_no_run_of_another(experiment, training, tmp_path):
    experiment("--seeds", "1")
    record = experiment("--seeds", "1", apart=True)
    assert training.runs == [(2.0, 0), (1.0, 0)] * 2
    run = record["runs"]["a"][0]
    assert run["commit"] == "commit3" and (tmp_path / "scratch" / "mine" / run["config"]).is_dir()
    experiment("--seeds", "1", apart=True)
    assert len(training.runs) == 4


def test_parts_become_one_record(experiment):
    part = experiment("--only", "a", "--seeds", "1")
    assert set(part["runs"]) == {"a"} and part["claims"] == []
    assert part["command"].endswith("--scale cpu --seeds 1 --only a")
    both = experiment("--only", "b", "--seeds", "2")
    assert {name: len(runs) for name, runs in both["runs"].items()} == {"a": 1, "b": 2}
    assert both["claims"][0]["verdict"] == "not judged: one seed"
    whole = experiment("--seeds", "3")
    again = experiment("--only", "a", "--seeds", "1")
    assert again["quantities"] == whole["quantities"] and again["seeds"] == 3


def test_a_record_is_not_replaced_by_one_that_has_less(experiment, tmp_path):
    whole = experiment("--seeds", "2")
    with pytest.raises(SystemExit, match="more seeds of b; run them too"):
        experiment("--seeds", "2", "--only", "a", scratch="another")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == {"cpu": whole}


def test_a_run_that_was_stopped_goes_on_and_its_time_adds_up(
    experiment, training, tmp_path, monkeypatch
):
    ticks = count(step=5.0)  # seconds between two looks at the clock
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    training.ends[1.0, 0] = Stopped(15, "in a test")
    with pytest.raises(SystemExit, match="the same command goes on"):
        experiment("--seeds", "1")
    record = json.loads((tmp_path / "out" / "results.json").read_text())["cpu"]
    assert set(record["runs"]) == {"a"}  # what has been finished is recorded
    training.ends.clear()
    record = experiment("--seeds", "1")
    assert training.runs == [(2.0, 0), (1.0, 0), (1.0, 0)]
    assert record["runs"]["a"][0]["seconds"] == 10.0  # training and measuring
    assert record["runs"]["b"][0]["seconds"] == 15.0  # the stopped start too


def test_no_run_starts_after_the_minutes(experiment, training, tmp_path):
    with pytest.raises(SystemExit, match="the same command goes on"):
        experiment("--minutes", "-1")
    assert training.runs == [] and not (tmp_path / "out").exists()


def test_a_run_that_diverges_is_recorded_once(experiment, training):
    for seed in (0, 1):
        training.ends[1.0, seed] = FloatingPointError("the loss is nan")
    record = experiment("--seeds", "2")
    assert record["quantities"]["b/top1"]["values"] == [None, None]
    assert record["claims"][0]["verdict"] == "no interval"
    assert experiment("--seeds", "2")["claims"] == record["claims"]
    assert len(training.runs) == 4


def test_what_another_version_of_a_measure_has_measured_is_measured_again(
    experiment, training, tmp_path
):
    def version(number):
        """Of a module with a measure."""
        file = tmp_path / f"version{number}" / "run.py"
        file.parent.mkdir()
        file.write_text(f"def scores(workdir, config, results):\n    return {{'top1': {number}}}\n")
        spec = spec_from_file_location(f"version{number}", file)
        module = module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module.scores

    for number in (1.0, 2.0):
        record = experiment("--seeds", "1", measure=version(number))
        assert record["quantities"]["a/top1"]["values"] == [number]
    assert len(training.runs) == 2


def test_a_record_is_written_where_nothing_can_draw(experiment, tmp_path, capsys):
    def draw(record, file):
        import no_such_module  # noqa: F401

    assert experiment("--seeds", "1", draw=draw)["seeds"] == 1
    assert "no picture: No module named 'no_such_module'" in capsys.readouterr().out
    experiment("--seeds", "1")
    assert "workdirs" not in (tmp_path / "out" / "results.json").read_text()
    assert (tmp_path / "out" / "cpu.png").exists()
