"""experiments/gpu.sh: what it does with its time, and what it leaves."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

STEPS = {
    "wheels",
    "tests",
    "cifar10",
    "tiny_imagenet32",
    "loss",
    "learning_rate",
    "cifar10-seeds",
    "gradient_cache",
    "memory",
    "corruptions",
    "augment",
}
OF_TORCH = {"speed-bfloat16", "speed-float32", "pytorch"}


def gpu(folder, *options, python=sys.executable):
    """The script, started in a folder, with --bring and --out relative to it."""
    # one device, as most have; the flags that only compile quickly stay
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "experiments" / "gpu.sh", "--scale", "smoke", *options],
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": flags, "PATH": path},
        capture_output=True,
        text=True,
    )


BRING_AND_OUT = ("--bring", "bring", "--out", "out")


@pytest.fixture
def folder(tmp_path):
    """With "bring": an archive of two images and a wheel of one module."""
    bring, image = tmp_path / "bring", tmp_path / "pictures" / "train" / "cat" / "1.png"
    bring.mkdir()
    image.parent.mkdir(parents=True)
    image.write_text("an image")
    (image.parent / "2.png").write_bytes(os.urandom(100_000))  # half an archive has the first whole
    with tarfile.open(bring / "pictures.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "pictures", "pictures")
    with zipfile.ZipFile(bring / "carried-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried-1.0.dist-info"
        wheel.writestr("carried.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        tags = "Generator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\n{tags}")
        wheel.writestr(f"{info}/RECORD", "")
    return tmp_path


def state(folder):
    """Of all that finished steps have left, when it was written."""
    out = folder / "out"
    done = {file.name for file in (out / "done").iterdir()}
    files = [out / "data" / "pictures", *(out / "done" / name for name in done)]
    files += [out / "logs" / f"{name}.log" for name in done]
    return done, {file: file.stat().st_mtime_ns for file in files}


def members(folder):
    with tarfile.open(folder / "out" / "records.tar.gz") as archive:
        return set(archive.getnames())


@pytest.mark.slow
def test_all_steps_run_once_over_two_calls(folder):
    first = gpu(folder, "--minutes", "1", *BRING_AND_OUT)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "no time left" in first.stdout
    done, before = state(folder)
    assert "wheels" in done and (folder / "out" / "site" / "carried.py").exists()
    expected = STEPS | (OF_TORCH if find_spec("torch") else set())
    assert done < expected

    second = gpu(folder, "--minutes", "60", *BRING_AND_OUT)
    logs = {file.name: file.read_text()[-2000:] for file in (folder / "out" / "logs").iterdir()}
    assert second.returncode == 0, (second.stdout, second.stderr, logs)
    done_at_last, after = state(folder)
    assert done_at_last == expected
    assert {file: after[file] for file in before} == before  # nothing was run again
    found = members(folder)
    experiments = {Path(name).parts[1] for name in found if name.startswith("experiments/")}
    assert {"classification", "learning_rate", "corruptions", "benchmarks"} <= experiments
    assert "experiments/learning_rate/smoke.png" in found
    assert {f"logs/{name}.log" for name in expected} <= found
    assert {Path(name).parts[0] for name in found} == {"experiments", "logs", "runs"}
    assert not any("checkpoints" in name for name in found)
    record = json.loads((folder / "out/experiments/classification/results.json").read_text())
    assert set(record["smoke"]["runs"]) == {"digits: SupCon", "digits: cross-entropy"}
    # to be added as it is: the scales that were there stay
    known = json.loads((ROOT / "experiments/classification/results.json").read_text())
    assert {scale: record[scale] for scale in known} == known


def test_an_archive_is_unpacked_whole_or_not_at_all(folder):
    half = folder / "out" / "unpacking" / "pictures" / "half.png"  # of a call that was killed
    half.parent.mkdir(parents=True)
    half.write_text("")
    archive = folder / "bring" / "pictures.tar.xz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    failed = gpu(folder, "--minutes", "0", *BRING_AND_OUT)
    assert failed.returncode == 1 and "pictures.tar.xz: not unpacked" in failed.stdout
    assert not (folder / "out" / "data" / "pictures").exists()

    archive.write_bytes(whole)
    done = gpu(folder, "--minutes", "0", *BRING_AND_OUT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {file.name for file in (folder / "out/data/pictures").rglob("*")}
    assert found == {"train", "cat", "1.png", "2.png"}
    assert not any(name.startswith("runs/") for name in members(folder))


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [(3, 1, "failed (exit 3)"), (124, 0, "not finished"), (0, 0, "records:")],
)
def test_the_status_tells_steps_that_failed_from_lack_of_time(folder, code, status, says):
    python = folder / "bin" / "python"  # notes its arguments instead of running them
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$*" >>{folder}/calls\nexit {code}\n')
    python.chmod(0o755)
    calls = []
    for _ in range(2):
        done = gpu(folder, "--minutes", "1", *BRING_AND_OUT, python=python)
        assert done.returncode == status and says in done.stdout
        lines = (folder / "calls").read_text().splitlines()
        calls.append([line for line in lines if not line.startswith("-c import")])
    again = calls[1][len(calls[0]) :]
    assert again == ([] if code == 0 else calls[0])  # what is done is not run again
    assert state(folder)[0] == (STEPS | OF_TORCH if code == 0 else set())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--minutes", "1"), "--out DIR is needed"),
        (("--out", "out", "--speed", "1"), "unknown option --speed"),
        (("--out",), "--out needs a value"),
        (("--out", "out", "--minutes", "half"), "whole number, not half"),
        (("--out", "out", "--scale", "cpu"), "--scale is gpu or smoke, not cpu"),
        (("--out", "out", "--bring", "large"), "--bring is 61 MB; at most 60 MB"),
    ],
)
def test_wrong_options_end_with_one_line(folder, options, message):
    (folder / "large").mkdir()
    with (folder / "large" / "images.tar.xz").open("wb") as file:
        file.truncate(61_000_000)
    done = gpu(folder, *options)
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
