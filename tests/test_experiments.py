"""Every experiment runs from its command, at the scale that is there for that."""

import importlib
import json
import operator
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from experiments import bases, claims, pictures
from experiments.classification import rates
from experiments.probes import run as probes

SCRIPTS = {
    file.parent.name: file.read_text()
    for file in sorted((ROOT / "experiments").glob("*/run.py"))
    if "from experiments.runner import" in file.read_text()
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """The folder of all runs: experiments share those of the base recipe."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_experiment_runs(name, scratch, tmp_path):
    seeds = 2 if name == "temperature" else 1  # one has an interval, the others take less time
    command = [sys.executable, "-m", f"experiments.{name}.run", "--scale", "smoke"]
    # one device, as most have; the flags that only compile quickly stay
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    done = subprocess.run(
        [*command, "--seeds", str(seeds), "--scratch", str(scratch), "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "results.json").read_text())["smoke"]
    assert record["seeds"] == seeds
    values = [found["values"] for found in record["quantities"].values()]
    assert values
    assert all(len(found) == seeds for found in values)
    assert np.isfinite(np.array(values, float)).all()
    for claim in record["claims"]:
        judged = ("reproduced", "not reproduced") if seeds > 1 else ("not judged: one seed",)
        assert claim["verdict"] in judged
        assert [end is None for end in claim["interval"]] == [seeds == 1] * 2
    assert (tmp_path / "smoke.png").read_bytes().startswith(b"\x89PNG")


def test_the_pages_show_the_records():
    for file, text in claims.pages().items():
        assert file.read_text() == text, f"{file}: run python -m experiments.claims"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_cpu_record_has_three_seeds_and_judges_what_the_script_claims(name):
    record = claims.records(name)["cpu"]
    values = {of: np.array(found["values"], float) for of, found in record["quantities"].items()}
    assert min(map(len, values.values())) >= 3
    stated = importlib.import_module(f"experiments.{name}.run").CLAIMS
    judged = [claims.judged(c, values) for c in stated if {c.first, c.second} <= values.keys()]
    told = operator.itemgetter("text", "paper", "verdict")
    assert [told(claim) for claim in record["claims"]] == [told(claim) for claim in judged]


@pytest.mark.parametrize(("name", "text"), claims.SHOWN)
def test_the_project_page_shows_claims_that_are_made(name, text):
    stated = importlib.import_module(f"experiments.{name}.run").CLAIMS
    assert text in [claim.text for claim in stated]


def test_the_rates_of_the_linear_stage_were_the_best_on_held_out_images():
    searches = (
        ("classification", "fashion_mnist", rates.LINEAR, bases.LINEAR_RATES),
        ("probes", None, probes.METHODS, probes.RATES),
    )
    for experiment, part, methods, chosen in searches:
        found = json.loads((ROOT / "experiments" / experiment / "rates.json").read_text())
        heldout = found["heldout"][part] if part else found["heldout"]
        for method, recipe in methods.items():
            scores = heldout[method + ", linear stage" if part else method]
            assert scores[f"{chosen[recipe]:.3g}"] == max(scores.values())


def test_what_is_drawn_of_a_record():
    def spread(mean):
        return {"mean": mean, "sd": 0.5, "values": [1.0, 2.0]}

    quantities = {"a: b/top1": spread(1.5), "a: b/knn": spread(9.0), "c/top1": spread(None)}
    found = pictures.rows({"quantities": quantities | {"difference": spread(3.0)}})
    assert [(row.name, row.group) for row in found] == [("a: b", "b")]
    found = pictures.rows({"quantities": {"a/SGD": spread(1.5), "a/fast": spread(1.0)}})
    assert [(row.name, row.group) for row in found] == [("a: SGD", "SGD"), ("a: fast", "fast")]


def test_a_table_has_the_shorter_side_across():
    def spread(mean):
        return {"mean": mean, "sd": 0.5, "values": [mean, mean]}

    few = {"a/top1": spread(1.0), "b/top1": spread(None), "difference": spread(3.0)}
    found = claims.table({"quantities": few, "claims": []})
    assert found.splitlines() == [
        "| setting | top1 |",
        "| --- | ---: |",
        "| a | 1.00 ± 0.50 |",
        "| b | diverged |",
        "",
        "- difference: 3.00 ± 0.50",
    ]
    many = {"a/top1": spread(1.0), "a/knn": spread(2.0), "a/x at epoch 3": spread(9.0)}
    found = claims.table({"quantities": many, "claims": []})
    assert found.splitlines()[0] == "| metric | a |" and len(found.splitlines()) == 4


def test_the_experiments_are_found():
    assert {"temperature", "corruptions", "gradients", "embedding"} <= set(SCRIPTS)
