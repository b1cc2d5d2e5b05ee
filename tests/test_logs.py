"""Logs: what a resumed run forgets, what is shown, and the warnings about the loss."""

import io
import math
from contextlib import closing

import jax.numpy as jnp
import pytest

from supcon_jax import logs
from supcon_jax.logs import Advice, Logs, Progress, Recorder, read_metrics


@pytest.fixture
def advice():
    lines = []
    return Advice(lines.append, patience=100), lines


def test_cut_forgets_later_steps_of_one_stage(tmp_path):
    log = Logs(tmp_path)
    for stage, step in (("supcon", 0), ("supcon", 10), ("supcon", 20), ("linear", 10)):
        log.write(stage, step, {"loss": 1.0 * step})
    log.cut("supcon", after=10)
    log.write("supcon", 15, {"loss": 5.0})
    log.close()
    assert order_of(tmp_path) == [("linear", 10), ("supcon", 0), ("supcon", 10), ("supcon", 15)]


def order_of(workdir):
    return [(record["stage"], record["step"]) for record in read_metrics(workdir)]


def test_earlier_stage_that_is_done_again_comes_before_the_later_one(tmp_path):
    with closing(Logs(tmp_path)) as log:
        for stage, step in (("supcon", 5), ("supcon", 10), ("linear", 5)):
            log.write(stage, step, {"loss": 1.0 * step})
        log.cut("supcon", after=5)
        log.write("supcon", 10, {"loss": 10.0})
        log.cut("linear", after=5)
    assert order_of(tmp_path) == [("supcon", 5), ("supcon", 10), ("linear", 5)]


def test_scores_come_to_the_record_of_a_step_that_was_stopped_before(tmp_path):
    with closing(Logs(tmp_path)) as log:
        log.write("supcon", 5, {"loss": 5.0, "grad_norm": 1.0})
        log.cut("supcon", after=5)
        log.complete("supcon", 5, {"heldout/knn": 0.5})
        assert log.scores_at("supcon", 5) == {"heldout/knn": 0.5}
    whole = {"stage": "supcon", "step": 5, "loss": 5.0, "grad_norm": 1.0, "heldout/knn": 0.5}
    assert read_metrics(tmp_path) == [whole]


@pytest.mark.parametrize("step", ["Infinity", "-Infinity", "NaN", "1e999", "null", '"five"'])
def test_damaged_step_is_named_by_its_line(tmp_path, step):
    lines = ['{"stage": "supcon", "step": 1}', f'{{"stage": "supcon", "step": {step}}}', ""]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"^line 2 of .*metrics\.jsonl is damaged: repair or "):
        read_metrics(tmp_path)


def test_half_a_line_at_the_end_is_ignored(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "supcon", "step": 1}\n{"stage": "sup')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    log = Logs(tmp_path)
    log.cut("supcon", after=5)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"stage": "supcon", "step": 1}\n'


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress("supcon", 0, 100, stream)
    progress.move(20)
    progress.show(20, {"loss": 4.25, "excess": 1.5, "heldout/knn": 0.875, "grad_norm": 1.0})
    progress.note("warning: something")
    progress.close()
    assert stream.getvalue() == (
        "supcon 20/100  loss 4.250  excess 1.500  k-NN 87.5%\nwarning: something\n"
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress("supcon", 0, 100, stream)
    progress.move(50)
    progress.show(50, {"loss": 4.25, "excess": 1.5})
    progress.close()
    shown = stream.getvalue().split("\r")[-1]
    assert shown.startswith("supcon |")
    assert "50/100" in shown
    assert "loss 4.250" in shown


def test_bar_leaves_whole_metrics_out_where_there_is_no_room(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    progress = Progress("supcon", 0, 400, stream)
    scores = {"heldout/knn": 0.977, "contrastive_accuracy": 0.996, "time/images_per_s": 4383.0}
    progress.show(400, {"loss": 3.293, "excess": 0.064, **scores})
    progress.close()
    shown = stream.getvalue().split("\r")[-1].rstrip("\n")
    assert len(shown) <= 80 and shown.rstrip().endswith("match 99.6%")


def test_bar_in_the_cell_of_a_notebook():
    # the class of sys.stderr there, which says that it is no terminal
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    progress = Progress("supcon", 0, 100, stream)
    for step in (20, 40, 60):
        progress.move(step)
        progress.show(step, {"loss": 4.25, "excess": 1.5, "heldout/knn": 0.875})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert stream.getvalue().count("\n") == 1  # each drawing takes the place of the one before
    assert lines[-1].startswith("supcon |") and "60/100" in lines[-1]
    assert {len(line) for line in lines if line} == {100}


def test_loss_at_the_collapsed_value_is_told_once(advice):
    see, lines = advice[0].see, advice[1]
    for step in range(0, 400, 20):
        see(step, {"loss": 6.23, "collapsed": 6.236})
    assert len(lines) == 1
    assert lines[0].startswith("warning: the loss has been at a collapsed encoder's value, 6.236")
    assert "learning rate" in lines[0]


def test_loss_that_leaves_the_collapsed_value_is_not_told(advice):
    see, lines = advice[0].see, advice[1]
    for step in range(0, 400, 20):
        see(step, {"loss": 6.23 if step % 80 else 6.0, "collapsed": 6.236})
    assert not lines


def test_batches_without_positives_are_told_once(advice):
    see, lines = advice[0].see, advice[1]
    for step in range(3):
        see(step, {"loss": 1.0, "collapsed": 6.0, "lonely": 0.63})
    assert len(lines) == 1
    assert "63% of the samples have no positive from another sample" in lines[0]
    assert "larger batch" in lines[0]


def test_few_lonely_samples_are_not_told(advice):
    advice[0].see(1, {"loss": 1.0, "collapsed": 6.0, "lonely": 0.2})
    assert not advice[1]


def record(workdir, losses, **options):
    """What a recorder writes of steps with these losses and gradient norms."""
    workdir.mkdir(exist_ok=True)
    settings = dict(images_per_step=8, every=2, checkpoints=workdir, **options)
    with closing(Logs(workdir)) as logs:
        recorder = Recorder("supcon", lambda step: 0.5, 0, len(losses), logs=logs, **settings)
        for step, (loss, norm) in enumerate(losses, start=1):
            recorder.add(step, {"loss": jnp.asarray(loss), "grad_norm": jnp.asarray(norm)})
        recorder.pause()
        recorder.catch_up({})
    return read_metrics(workdir)


GOOD, NAN, STEEP = (1.5, 2.0), (math.nan, math.nan), (1.5, math.inf)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (NAN, "^the loss of stage supcon is nan at step 3 .learning rate 0.5.. Likely"),
        (STEEP, "^the gradient's norm of stage supcon is inf at step 3 "),
    ],
)
def test_step_that_is_not_finite_stops_the_run(tmp_path, bad, message):
    with pytest.raises(FloatingPointError, match=message):
        record(tmp_path, [GOOD, GOOD, bad, GOOD])


def test_so_many_steps_in_a_row_may_not_be_finite(tmp_path, capsys):
    losses = [GOOD, NAN, STEEP, GOOD, STEEP, NAN, GOOD, GOOD]
    found = record(tmp_path / "two", losses, skips=2)
    assert [r["step"] for r in found] == [2, 4, 6, 8]
    assert ["loss" in r for r in found] == [False, True, False, True]  # JSON has no NaN
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    counts = [line.partition(": left out ")[2] for line in lines]
    numbers = ((1, 1), (2, 2), (1, 3), (2, 4))
    assert counts == [f"({row} in a row, {total} in all)" for row, total in numbers]
    with pytest.raises(FloatingPointError, match="is inf at step 3 "):
        record(tmp_path / "one", losses, skips=1)


@pytest.mark.parametrize("waits", [False, True])
def test_only_training_counts_as_time_of_training(tmp_path, monkeypatch, waits):
    """3 s to compile, 1 s a step on a device that works by itself or one that is waited for, and
    200 s for each look.
    """
    now, done, ends = [0.0], [0.0], {}

    def wait(values):
        for metrics in [values] if isinstance(values, dict) else [m for _, m in values]:
            now[0] = max(now[0], ends[id(metrics)])
        return values

    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(logs.jax, "block_until_ready", wait)
    monkeypatch.setattr(logs.jax, "device_get", wait)
    monkeypatch.setattr(logs, "_ready", lambda metrics: now[0] >= ends[id(metrics)])
    options = dict(images_per_step=8, every=2, checkpoints=tmp_path)
    steps = [{"loss": jnp.asarray(1.5), "grad_norm": jnp.asarray(2.0)} for _ in range(8)]
    with closing(Logs(tmp_path)) as found:
        recorder = Recorder("supcon", lambda step: 0.5, 0, 8, logs=found, **options)
        now[0] += 100
        recorder.start({})
        for step, metrics in enumerate(steps, start=1):
            done[0] = max(now[0], done[0]) + (3 if step == 1 else 1)
            ends[id(metrics)] = done[0]
            if waits:
                wait(metrics)
            recorder.add(step, metrics)
            if step in (3, 6, 8):
                recorder.pause()
                now[0] += 100
                recorder.catch_up({"heldout/knn": 0.5})
                now[0] += 100
                recorder.resume()
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [2, 3, 4, 6, 8]
    assert records[0]["time/compile_s"] == 3
    assert sum(record["time/seconds"] for record in records) == 7
    assert {record["time/images_per_s"] for record in records} == {8}
