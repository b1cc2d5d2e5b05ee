"""The table of runs, and the pictures."""

import json

import numpy as np
import pytest

from supcon_jax import report


@pytest.fixture
def runs(tmp_path):
    """Two finished runs, as `train_and_evaluate` leaves them."""
    made = []
    for name, recipe in (
        ("digits-supcon", "supcon"),
        ("digits-cross_entropy-short", "cross_entropy"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        stage = {"steps": 10, "passes": 5120, "time/seconds": 2.0, "time/images_per_s": 2560.0}
        results = {
            "recipe": [recipe],
            "test": {"images": 60, "top1": 0.95, "top5": 1.0, "knn": 0.9},
            "stages": {recipe: stage},
        }
        (folder / "results.json").write_text(json.dumps(results))
        records = [
            {"stage": recipe, "step": step, "loss": 5.0 / step, "heldout/knn": 0.1 * step}
            | ({"collapsed": 6.2, "floor": 3.9} if recipe == "supcon" else {"heldout/top1": 0.5})
            for step in (2, 5)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        features = np.random.RandomState(0).normal(size=(60, 8)).astype(np.float32)
        report.save_embedding(folder, features, np.arange(60) % 3, ("one", "two", "three"))
        made.append(folder)
    return made


def test_table(runs):
    lines = report.table(runs).splitlines()
    assert lines[0].split() == ["run", "top-1", "k-NN", "passes", "time", "images/s"]
    assert lines[2].split() == ["SupCon", "95.00%", "90.00%", "5,120", "2.0", "s", "2,560"]
    assert lines[3].startswith("cross-entropy (short)")
    assert all(len(line) <= 80 for line in lines)


def test_table_of_a_run_without_a_classifier(runs):
    file = runs[0] / "results.json"
    results = json.loads(file.read_text())
    results["test"] = {"images": 60, "knn": 0.9}
    file.write_text(json.dumps(results))
    assert report.table(runs).splitlines()[2].split()[:3] == ["SupCon", "-", "90.00%"]


def test_command_draws_the_runs_side_by_side(runs, tmp_path, capsys):
    report.main([*map(str, runs), "--out", str(tmp_path / "out")])
    assert "SupCon" in capsys.readouterr().out
    from PIL import Image

    with Image.open(tmp_path / "out" / "embedding.png") as both:
        assert both.width > 1.8 * both.height  # two maps beside each other
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_dead_encoder_is_drawn_as_one_point(runs):
    labels = np.arange(60) % 3
    report.save_embedding(runs[0], np.zeros((60, 8), np.float32), labels, ("one", "two", "three"))
    assert [path.name for path in report.draw(runs[:1], runs[0])] == ["curves.png", "embedding.png"]


def test_run_that_has_not_finished_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "nothing"), "--out", str(tmp_path)])
    assert "nothing has no results.json: the run has not finished there" in capsys.readouterr().err


def test_embedding_keeps_at_most_so_many_points(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAP_POINTS", 10)
    features = np.arange(50, dtype=np.float32)[:, None]
    report.save_embedding(tmp_path, features, np.arange(50) % 5, tuple("abcde"))
    saved = np.load(tmp_path / "embedding.npz")
    assert saved["features"].shape == (10, 1)
    np.testing.assert_array_equal(saved["features"][:, 0].astype(int) % 5, saved["labels"])
