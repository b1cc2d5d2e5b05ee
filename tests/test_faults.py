"""Runs that are killed, stopped, moved to other processes, or find their files damaged."""

import gc
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from supcon_jax import config as configuration
from supcon_jax import parallel, stages
from supcon_jax.checkpoints import LATER, NOTE, Checkpoints, check_path, leaves, load
from supcon_jax.logs import read_metrics
from supcon_jax.state import TrainState, from_variables

TRAINER = Path(__file__).with_name("trainer.py")
SMALL = {  # short and thin: 10 steps of pre-training, 5 of the linear stage
    "model.width": 0.0625,
    "log.every_steps": 3,
    "evaluation.every_epochs": 1.0,
    "checkpoint.every_epochs": 1.0,
    "supcon.batch_size": 256,
    "supcon.epochs": 2.0,
    "supcon.warmup_epochs": 0.0,
    "linear.batch_size": 256,
    "linear.epochs": 1.0,
    "linear.warmup_epochs": 0.0,
}
LONGER = ("--config.supcon.epochs=4", "--config.linear.epochs=3")  # 20 and 15 steps
ENDLESS = "--config.supcon.epochs=400"
ON_THE_WAY = "the same command goes on from the last checkpoint"


def start(workdir, *arguments, devices=8, environment=None):
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    small = [f"--config.{name}={value}" for name, value in SMALL.items()]
    return subprocess.Popen(
        [sys.executable, TRAINER, "--config=digits", f"--workdir={workdir}", *small, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "XLA_FLAGS": " ".join(flags), **(environment or {})},
        cwd=TRAINER.parent.parent,
    )


def finish(process, status=0):
    out = process.communicate(timeout=300)[0]
    assert process.returncode == status, out
    return out


def run(workdir, *arguments, status=0, **options):
    return finish(start(workdir, *arguments, **options), status)


def without_times(tree):
    if isinstance(tree, dict):
        return {k: without_times(v) for k, v in tree.items() if not k.startswith("time/")}
    return [without_times(x) for x in tree] if isinstance(tree, list) else tree


def arrays(workdir, stage, kind="last"):
    """All arrays of a stage's newest (or best) checkpoint, by their path."""
    folder = workdir / "checkpoints" / stage / kind
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    as_saved = ocp.args.StandardRestore(fallback_sharding=here)
    with jax.enable_x64(True), ocp.CheckpointManager(folder.absolute()) as manager:
        restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(state=as_saved))
    state = {**restored.state, "key": jax.random.key_data(restored.state["key"])}
    flat = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def results_of(workdir):
    """All but the commit: one can be made while the tests run."""
    results = json.loads((workdir / "results.json").read_text())
    return {name: value for name, value in results.items() if name != "commit"}


def assert_same_run(workdir, other):
    """Metrics, results and all arrays, bit for bit."""
    assert without_times(read_metrics(workdir)) == without_times(read_metrics(other))
    assert without_times(results_of(workdir)) == without_times(results_of(other))
    for stage in ("supcon", "linear"):
        for kind in ("last", "best"):
            actual, expected = (arrays(folder, stage, kind) for folder in (workdir, other))
            assert actual.keys() == expected.keys() and len(expected) > 60
            for name, array in expected.items():
                np.testing.assert_array_equal(actual[name], array, err_msg=f"{stage} {name}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    workdir = tmp_path_factory.mktemp("faults") / "whole"
    run(workdir, *LONGER)
    return workdir


RANDOM = random.Random(0)
KILLS = [  # in the order in which a run that is started again each time comes to them
    "stage:1",
    "look:1",
    "step:1",
    "step:4",
    "save:1",  # step 5, nothing saved yet
    "sealing:1",
    f"writing:1:{RANDOM.randrange(1, 40)}",
    f"writing:1:{RANDOM.randrange(40, 200)}",
    "offer:1",
    f"writing:1:{RANDOM.randrange(200, 800)}",
    "offered:1",
    "flush:1",
    "restore:1",
    f"step:2:{RANDOM.randrange(1, 100)}",
    f"step:1:{RANDOM.randrange(1, 1000)}",
    "save:2",
    "close:1",  # between the stages
    "stage:2",
    "look:2",
    f"writing:2:{RANDOM.randrange(1, 400)}",
    "step:7",
    "save:3",
    "close:2",
    "evaluation:1",
    "evaluation:2",  # the test images are embedded
    "scored:1",
    "results:2",  # after config.json
    "pictures:1",
]


@pytest.mark.slow
def test_killed_run_ends_in_the_same_bits(whole, tmp_path):
    killed = in_a_write = 0
    for kill in KILLS:
        process = start(tmp_path, *LONGER, "--die", kill)
        out = process.communicate(timeout=300)[0]
        assert process.returncode in (0, -signal.SIGKILL), out
        killed += process.returncode == -signal.SIGKILL
        in_a_write += any(tmp_path.rglob("*.orbax-checkpoint-tmp"))
    assert killed >= 20 and in_a_write >= 1
    run(tmp_path, *LONGER)
    assert_same_run(tmp_path, whole)


def wait_for_metrics(process, workdir, count=3):
    """Until a run is in its loop."""
    while not (workdir / "metrics.jsonl").exists() or len(read_metrics(workdir)) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_says_how_to_go_on(whole, tmp_path, number):
    process = start(tmp_path, ENDLESS)
    wait_for_metrics(process, tmp_path)
    since = time.perf_counter()
    process.send_signal(number)
    out = finish(process, 128 + number)
    assert time.perf_counter() - since < 30
    line = out.splitlines()[-1]
    assert f"stopped by {number.name} at step " in line and line.endswith(ON_THE_WAY)
    step = int(line.split("at step ")[1].split()[0])
    assert (tmp_path / "checkpoints" / "supcon" / "last" / str(step)).is_dir()


@pytest.mark.slow
def test_sigterm_does_not_wait_for_a_compiler(tmp_path):
    """The first step stays outside of Python, where no handler runs."""
    process = start(tmp_path, "--block")
    assert "blocked\n" in iter(process.stdout.readline, "")
    time.sleep(1)  # it says so in Python
    process.send_signal(signal.SIGTERM)
    try:
        out = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert out.splitlines()[-1] == f"stopped by SIGTERM; {ON_THE_WAY}"


@pytest.mark.slow
def test_looks_that_a_signal_breaks_off_are_made_up_for(whole, tmp_path):
    """In a look after step 5, then in step 10, after which one is due."""
    for point, step in (("look:2", 5), ("step:5", 10)):
        out = run(tmp_path, *LONGER, "--term", point, status=128 + signal.SIGTERM)
        line = f"stopped by SIGTERM at step {step} of 20 of stage supcon; {ON_THE_WAY}"
        assert out.splitlines()[-1] == line
        assert not any("heldout/knn" in r for r in read_metrics(tmp_path) if r["step"] == step)
        assert (tmp_path / "checkpoints" / "supcon" / "last" / str(step)).is_dir()
    out = run(tmp_path, *LONGER, "--term", "evaluation:1", status=128 + signal.SIGTERM)
    assert out.splitlines()[-1] == f"stopped by SIGTERM; {ON_THE_WAY}"
    run(tmp_path, *LONGER)
    assert_same_run(tmp_path, whole)


FIRST_PORT = 65535 - 2**12 + 1  # JAX takes one of the last 2^12, by the number of the job


def free_port():
    for port in random.SystemRandom().sample(range(FIRST_PORT, 65536), 100):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def place_by_flags(port, count, index):
    address = f"127.0.0.1:{port}"
    flags = (f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}")
    return flags, {}


def place_by_slurm(port, count, index):
    """What srun tells a task."""
    return ("--distributed",), {
        "SLURM_JOB_ID": f"{port - FIRST_PORT}",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": f"{count}",
        "SLURM_PROCID": f"{index}",
        "SLURM_LOCALID": f"{index}",
    }


def place_by_open_mpi(port, count, index):
    """What mpirun tells a process."""
    job = 2**12 * (port - FIRST_PORT)
    return ("--distributed",), {
        "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1,10.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": f"{count}",
        "OMPI_COMM_WORLD_RANK": f"{index}",
        "OMPI_COMM_WORLD_LOCAL_RANK": f"{index}",
    }


def start_processes(workdir, count, arguments, place=place_by_flags):
    """The same run as `count` processes with one device each; arguments of all, or of each."""
    port = free_port()
    started = []
    for index in range(count):
        flags, environment = place(port, count, index)
        own = arguments[index] if isinstance(arguments, list) else arguments
        started.append(start(workdir, *own, *flags, devices=1, environment=environment))
    return started


def run_processes(workdir, count, *arguments, place=place_by_flags):
    started = start_processes(workdir, count, arguments, place)
    try:
        return [finish(process) for process in started]
    finally:
        for process in started:
            process.kill()


def assert_close_run(workdir, other):
    """float64: sums over the devices in another order."""
    for stage in ("supcon", "linear"):
        actual, expected = (arrays(folder, stage) for folder in (workdir, other))
        assert actual.keys() == expected.keys() and len(expected) > 60
        assert sum(array.dtype == np.float64 for array in expected.values()) > 60
        for name, array in expected.items():
            np.testing.assert_allclose(actual[name], array, rtol=1e-8, atol=1e-8, err_msg=name)
    for record, same in zip(read_metrics(workdir), read_metrics(other), strict=True):
        assert record["step"] == same["step"]
        if "loss" in same:
            np.testing.assert_allclose(record["loss"], same["loss"], rtol=1e-8)
        if "heldout/knn" in same:
            assert record["heldout/knn"] == same["heldout/knn"]
    assert results_of(workdir)["test"] == results_of(other)["test"]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A run of one process with one device, in float64."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    run(workdir, "--float64", devices=1)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "place"),
    [(2, place_by_flags), (2, place_by_slurm), (2, place_by_open_mpi), (4, place_by_flags)],
)
def test_processes_end_in_the_parameters_of_one(single, tmp_path, count, place):
    printed = run_processes(tmp_path / "run", count, "--float64", place=place)
    assert_close_run(tmp_path / "run", single)
    assert all("supcon 10/10" not in out for out in printed[1:])  # one of them talks


@pytest.mark.slow
def test_processes_stop_together(tmp_path):
    """A SIGTERM to one of them, as when its host is taken away."""
    both = start_processes(tmp_path, 2, (ENDLESS,))
    wait_for_metrics(both[0], tmp_path)
    since = time.perf_counter()
    both[1].send_signal(signal.SIGTERM)
    first, second = (finish(process, 128 + signal.SIGTERM) for process in both)
    assert time.perf_counter() - since < 30
    line = next(line for line in first.splitlines() if "stopped by SIGTERM" in line)
    step = int(line.split("at step ")[1].split()[0])
    assert (tmp_path / "checkpoints" / "supcon" / "last" / str(step)).is_dir()
    assert "stopped by" not in second  # the first process talks


@pytest.mark.slow
def test_death_of_one_process_ends_the_others(single, tmp_path):
    """They notice it by themselves, and all go on together later."""
    workdir = tmp_path / "run"
    each = [("--float64",), ("--float64", "--die", "step:7")]
    left, dying = start_processes(workdir, 2, each)
    finish(dying, -signal.SIGKILL)
    left.communicate(timeout=300)
    assert left.returncode != 0
    assert (workdir / "checkpoints" / "supcon" / "last" / "5").is_dir()
    run_processes(workdir, 2, "--float64")
    assert_close_run(workdir, single)


@pytest.mark.slow
def test_processes_pass_over_a_damaged_checkpoint_together(single, tmp_path):
    """Process 0 alone compares the files."""
    workdir = tmp_path / "run"
    shutil.copytree(single, workdir)
    cut_largest_file(workdir / "checkpoints" / "supcon" / "last" / "10")
    printed = run_processes(workdir, 2, "--float64")
    assert "last/10 is not usable: 1 of its files are damaged" in printed[0]
    assert_close_run(workdir, single)


@pytest.mark.slow
def test_resume_with_other_devices_and_processes(single, tmp_path):
    workdir = tmp_path / "run"
    run(workdir, "--float64", "--die", "step:6", status=-signal.SIGKILL, devices=4)
    run(workdir, "--float64", "--die", "stage:2", status=-signal.SIGKILL, devices=2)
    run_processes(workdir, 2, "--float64")
    assert_close_run(workdir, single)


@pytest.mark.slow
def test_second_run_in_a_workdir_is_refused(whole, tmp_path):
    first = start(tmp_path, ENDLESS)
    wait_for_metrics(first, tmp_path, 1)
    before = (tmp_path / "config.json").read_bytes()
    out = run(tmp_path, ENDLESS, status=1)
    assert f"another run is going on in {tmp_path} (process {first.pid} on " in out
    assert (tmp_path / "config.json").read_bytes() == before
    first.kill()
    first.communicate()


@contextmanager
def mounted(folder, options):
    """A file system of its own in a folder, or None where the tests may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    may = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder if may else None
    finally:
        if may:
            subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_folder_that_is_read_only_is_told(tmp_path):
    """Root may write in spite of permissions, so that it needs a file system."""
    folder, reason = tmp_path / "disk", "Read-only file system"
    with mounted(folder, "ro") as disk:
        if disk is None and os.geteuid() == 0:
            pytest.skip("root may not mount here")
        if disk is None:
            folder.chmod(0o500)
            reason = "Permission denied"
        out = run(folder / "run", status=1)
    assert out.splitlines() == [f"error: cannot write to the workdir {folder}/run: {reason}"]


@pytest.mark.slow
def test_disk_that_is_full_leaves_the_earlier_checkpoint(whole, tmp_path):
    """It has room for some checkpoints; where none can be mounted, writes to larger files fail from
    the second checkpoint on.
    """
    workdir = tmp_path / "disk" / "run"
    with mounted(tmp_path / "disk", "size=1200k") as disk:
        out = run(workdir, *LONGER, *(() if disk else ("--full", "2")), status=1)
        (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: cannot write ") and f" to {workdir}" in line
        assert "ake room, and the same command goes on from the " in line
        kept = (workdir / "checkpoints/supcon/last").iterdir()
        assert {p.name for p in kept if p.name.isdigit()} == {"5"}
        if disk:
            subprocess.run(["mount", "-o", "remount,size=100M", disk], check=True)
        run(workdir, *LONGER)
        assert_same_run(workdir, whole)


@pytest.mark.slow
def test_too_little_memory_is_told_in_one_line(tmp_path):
    """Batches of the evaluation that need 8 GB where the process may have 5."""
    large = ("--gigabytes", "5", "--config.evaluation.batch_size=4000000")
    out = run(tmp_path, *large, status=1, devices=1)
    assert out.splitlines()[-1].startswith("error: RESOURCE_EXHAUSTED: Out of memory allocating ")
    assert "--plan --memory_gb=GB tells what fits" in out.splitlines()[-1]
    assert "Traceback" not in out


@pytest.mark.slow
def test_warm_cache_has_all_programs(tmp_path, monkeypatch):
    """A run that goes on compiles nothing that the first one has compiled."""
    cache = tmp_path / "programs"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

    def programs():
        return {p.name for p in cache.iterdir() if p.name.startswith("jit_train_step")}

    run(tmp_path / "run", "--die", "step:7", status=-signal.SIGKILL)
    first = programs()
    run(tmp_path / "run", "--die", "stage:2", status=-signal.SIGKILL)
    assert first and programs() == first


def cut_largest_file(checkpoint):
    file = max(files_of(checkpoint), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.slow
def test_damages_of_a_finished_run_are_mended(whole, tmp_path):
    """The newest checkpoint of the first stage is written again, its metrics in their places; that
    of the best of the second is put aside.
    """
    workdir, best = tmp_path / "run", "checkpoints/linear/best"
    shutil.copytree(whole, workdir)
    cut_largest_file(workdir / "checkpoints" / "supcon" / "last" / "20")
    (score,) = (workdir / best).glob("*/metrics/metrics")
    score.write_text("{")
    out = run(workdir, *LONGER)
    assert "supcon/last/20 is not usable" in out and "linear/best/" in out
    shutil.copytree(whole / best, workdir / best, dirs_exist_ok=True)
    assert_same_run(workdir, whole)


@pytest.fixture(scope="module")
def first_stage():
    """The state that the runs above begin with."""
    config = configuration.load("digits")
    config.update_from_flattened_dict(SMALL)
    mesh = parallel.make_mesh()
    stage = stages.build_stage(config, "supcon", stages.open_data(config), mesh)
    return stages.create(stage, config, mesh, None)


def restored_from(folder, like):
    """What is restored there, and the lines that were said."""
    checkpoints, said = Checkpoints(folder, keep=2), []
    with closing(checkpoints):
        return checkpoints.restore(like, warn=said.append), said


def files_of(checkpoint):
    return sorted(p for p in checkpoint.rglob("*") if p.is_file())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's
def test_flipped_bits_are_noticed(whole, tmp_path, first_stage):
    """100 flips anywhere in the newest checkpoint: the one before is used. Orbax's notes, which are
    written last and are not needed, may have them.
    """
    rng, in_notes = random.Random(1), 0
    expected = leaves(restored_from(whole / "checkpoints" / "supcon", first_stage)[0])
    for _ in range(100):
        copy = tmp_path / "supcon"
        shutil.copytree(whole / "checkpoints" / "supcon", copy)
        files = files_of(copy / "last" / "20")
        (file,) = rng.choices(files, [p.stat().st_size for p in files])
        data = bytearray(file.read_bytes())
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        restored, said = restored_from(copy, first_stage)
        if not said:
            assert file.name in LATER, f"{file.relative_to(copy)} byte {place}"
            assert leaves(restored) == expected
            in_notes += 1
        else:
            assert int(restored.step) == 15 and "last/20 is not usable" in said[0]
        shutil.rmtree(copy)
    gc.collect()
    assert in_notes < 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's
def test_damaged_files_are_noticed(whole, tmp_path, first_stage):
    """Each file of the newest checkpoint cut short, emptied, removed, or overwritten in part."""
    rng, original = random.Random(2), whole / "checkpoints" / "supcon"
    names = [p.relative_to(original) for p in files_of(original / "last" / "20")]
    names = [name for name in names if name.name not in LATER]
    damages = {
        "cut": lambda data: data[: rng.randrange(len(data))],
        "emptied": lambda data: b"",
        "removed": None,
        "overwritten": lambda data: rng.randbytes(len(data) // 2) + data[len(data) // 2 :],
    }
    for name in names:
        for kind, damage in damages.items():
            copy = tmp_path / "supcon"
            shutil.copytree(original, copy)
            data = (copy / name).read_bytes()
            (copy / name).unlink()
            if damage is not None:
                (copy / name).write_bytes(damage(data))
            restored, said = restored_from(copy, first_stage)
            assert int(restored.step) == 15 and "last/20 is not usable" in said[0], (name, kind)
            assert len(said) == 1 and "\n" not in said[0]
            shutil.rmtree(copy)
    gc.collect()
    assert len(names) * len(damages) > 40


def tiny(step, **changes):
    """A state that is saved in no time."""
    arrays = {"kernel": jax.numpy.arange(6.0).reshape(2, 3) + step, "bias": jax.numpy.zeros(3)}
    return TrainState(
        step=jax.numpy.int32(step),
        params={"encoder": {**arrays, **changes}},
        frozen={},
        batch_stats={},
        opt_state={},
        key=jax.random.key(step),
    )


@pytest.fixture
def two_saved(tmp_path):
    """A folder with the checkpoints 5 and 10, and 5 as the best."""
    folder = tmp_path / "supcon"
    with closing(Checkpoints(folder, keep=2)) as checkpoints:
        for step, score in ((5, 0.75), (10, 0.5)):
            checkpoints.save(tiny(step))
            checkpoints.offer(tiny(step), score)
    assert {p.name for p in folder.glob("*/*")} == {"5", "10"}
    return folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's
@pytest.mark.parametrize("name", ["a[1]", "[ab]", "a\\1b", "a[b", "[]", "a?b*", "$a %41 ~{b}:#"])
def test_paths_that_are_patterns_are_refused(tmp_path, name):
    """Where Orbax would not find its checkpoints again, and nowhere else."""
    with closing(Checkpoints(tmp_path / name, keep=1)) as checkpoints:
        checkpoints.save(tiny(5))
    with closing(Checkpoints(tmp_path / name, keep=1)) as checkpoints:
        if name in ("a[1]", "[ab]", "a\\1b"):
            with pytest.raises(ValueError, match="no usable checkpoint"):
                checkpoints.restore(tiny(0), warn=lambda line: None)
            with pytest.raises(ValueError, match="brackets or the backslash in its name: use an"):
                check_path(tmp_path / name)
        else:
            assert int(checkpoints.restore(tiny(0)).step) == 5
            check_path(tmp_path / name)


SCORES = {
    "garbage": b"\xff{",
    "empty": b"",
    "flipped": b'{"score": 0.74}',
    "renamed": b'{"scoer": 0.75}',
    "words": b'{"score": "a"}',
    "nan": b'{"score": NaN}',
}


@pytest.mark.parametrize("content", SCORES.values(), ids=SCORES)
def test_damaged_best_is_put_aside(two_saved, content):
    said = []
    (two_saved / "best" / "5" / "metrics" / "metrics").write_bytes(content)
    with closing(Checkpoints(two_saved, keep=2, warn=said.append)) as checkpoints:
        restored = checkpoints.restore(tiny(0), warn=said.append)
        checkpoints.offer(restored, 0.5)
    (line,) = said
    assert line.startswith(f"checkpoint {two_saved}/best/5 is not usable: 1 of its files are dama")
    assert f"put aside as {two_saved}/best-5-damaged" in line
    assert leaves(restored) == leaves(tiny(10))
    assert (two_saved / "best-5-damaged" / "state").is_dir()
    assert [p.name for p in (two_saved / "best").iterdir()] == ["10"]


NOTES = {
    "garbage": b"\xff",
    "empty": b"",
    "list": b"[1]",
    "number": b'{"item_handlers": 5}',
    "nothing": b"{}",
}


@pytest.mark.parametrize("content", NOTES.values(), ids=NOTES)
@pytest.mark.parametrize("place", ["last/10", "best/5"])
def test_damaged_notes_are_not_needed(two_saved, place, content):
    (two_saved / place / NOTE).write_bytes(content)
    restored, said = restored_from(two_saved, tiny(0))
    assert leaves(restored) == leaves(tiny(10)) and not said
    assert (two_saved / "best" / "5").is_dir()


def test_checkpoints_that_cannot_be_opened_are_named(tmp_path):
    (tmp_path / "supcon").write_text("in the way")
    with pytest.raises(OSError, match=f"^cannot open the checkpoints in {tmp_path}/supcon/last: "):
        Checkpoints(tmp_path / "supcon", keep=1)


def test_checkpoint_with_other_names_is_told_from_both_sides(two_saved):
    renamed = tiny(0, weight=jax.numpy.zeros((2, 3)))
    del renamed.params["encoder"]["kernel"]
    said, checkpoints = [], Checkpoints(two_saved, keep=2)
    with closing(checkpoints), pytest.raises(ValueError, match=f"no usable .* in {two_saved}/last"):
        checkpoints.restore(renamed, warn=said.append)
    there, here = (f".params['encoder']['{name}']" for name in ("kernel", "weight"))
    reason = f"of another model: 1 only there, such as {there}; 1 only here, such as {here}"
    assert [line.partition(" it is ")[2] for line in said] == [reason, reason]


def test_encoder_with_other_names_is_told_from_both_sides(unchecked):
    def fit(found):
        variables = {"params": {"encoder": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}}}
        return from_variables(
            SimpleNamespace(frozen=()), None, variables, None, {"params": found, "batch_stats": {}}
        )

    with pytest.raises(ValueError, match="does not fit this model") as refusal:
        fit({"weight": np.zeros((2, 3)), "bias": np.zeros(3)})
    assert "1 parameters only in that encoder, such as ['weight'] (2, 3)" in str(refusal.value)
    assert "1 parameters only in this model, such as ['kernel'] (2, 3)" in str(refusal.value)


def test_nothing_is_pickled(two_saved, monkeypatch):
    """A pickle that is loaded can run anything."""
    for file in files_of(two_saved):  # from protocol 2 on they begin so and end with a dot
        data = file.read_bytes()
        assert not (data[:1] == b"\x80" and data[-1:] == b"."), file
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    restored, said = restored_from(two_saved, tiny(0))
    assert leaves(restored) == leaves(tiny(10)) and not said
    assert leaves(load(two_saved, 5, tiny(0))) == leaves(tiny(5))
