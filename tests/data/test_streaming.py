"""Streamed batches: the same whoever makes them, from wherever they start, with bad images too."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_tfds
from data.test_decode import OPENCV_ERROR, bilinear
from PIL import Image
from sklearn.datasets import load_sample_image

from supcon_jax.data import decode, pipeline, sources, streaming

SIZE, BATCH, VIEWS, IMAGES = 12, 40, 2, 125
AREA, RATIO = (0.2, 0.5), (3 / 4, 4 / 3)
RUN = dict(seed=0, stage="supcon", batch_size=BATCH, area=AREA, ratio=RATIO, size=SIZE, channels=3)
OPTIONS = dict(start=0, stop=5, views=VIEWS, workers=0, **RUN)
PER_EPOCH = IMAGES // BATCH


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """`train/{a,b,c}`: 125 parts of two photographs, all different, in different sizes."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.RandomState(0)
    for number in range(IMAGES):
        pixels = load_sample_image(("flower.jpg", "china.jpg")[number % 2])
        top, left = random.randint(0, 300), random.randint(0, 500)
        height, width = random.randint(24, 60, 2)
        part = Image.fromarray(pixels[top : top + height, left : left + width])
        path = folder / "train" / "abc"[number * 3 // IMAGES] / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.save(path, quality=95)
    return folder


def read_folder(folder, **options):
    settings = dict(name="", load_size=SIZE, channels=3, memory_limit_gb=0.0)
    return sources.open_source("folder", "train", directory=str(folder), **{**settings, **options})


@pytest.fixture
def source(photographs):
    return read_folder(photographs)


def batches(source, **options):
    return list(streaming.stream(source, **{**OPTIONS, **options}))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def order_of(k, **run):
    """The images of batch k, from what `pipeline` documents."""
    settings = {"seed": 0, "stage": "supcon", **run}
    order = pipeline.epoch_order(IMAGES, epoch=k // PER_EPOCH, **settings)
    return order[k % PER_EPOCH * BATCH :][:BATCH]


# What is in a batch.


def test_batch_has_the_shapes_of_the_design(source):
    found = batches(source)
    assert len(found) == 5
    for batch in found:
        assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
            "image": ((BATCH, VIEWS, SIZE, SIZE, 3), "uint8"),
            "label": ((BATCH,), "int32"),
            "position": ((BATCH,), "int32"),
        }
        np.testing.assert_array_equal(batch["position"], np.arange(BATCH))


def test_batch_has_the_crops_of_the_images_that_the_order_names(source):
    """Pillow's pixels, interpolated in float64 at the boxes of the documented random numbers."""
    compared = 0
    for k, batch in enumerate(batches(source)):
        rows = source.read(order_of(k))
        np.testing.assert_array_equal(batch["label"], [row.label for row in rows])
        draws = streaming.crop_draws((BATCH, 1, VIEWS), 0, "supcon", k)[:, 0]
        for place, view in itertools.product(range(k, BATCH, 7), range(VIEWS)):
            pixels = np.asarray(Image.open(rows[place].image))
            shape = dict(height=pixels.shape[0], width=pixels.shape[1], area=AREA, ratio=RATIO)
            box = decode.random_crop_box(draws[place, view], **shape)
            if min(box[2:]) < 2 * SIZE:  # else it may be decoded at half its size
                found, expected = batch["image"][place, view], bilinear(pixels, box, SIZE)
                np.testing.assert_allclose(found, expected, atol=OPENCV_ERROR)
                compared += 1
    assert compared > 20


def test_labels_and_images_are_those_of_the_batches_in_memory(photographs, source):
    """With the whole image as the crop, the pixels are those that fit into memory otherwise."""
    memory = read_folder(photographs, memory_limit_gb=1.0)
    for k, batch in enumerate(batches(source)):
        expected = pipeline.training_batch(memory, k, seed=0, stage="supcon", batch_size=BATCH)
        np.testing.assert_array_equal(batch["label"], expected["label"])
        means = [
            images.reshape(BATCH, -1).mean(1) for images in (batch["image"], expected["image"])
        ]
        assert np.corrcoef(*means)[0, 1] > 0.8


@pytest.mark.parametrize("epoch", [0, 1])
def test_epoch_reads_no_image_twice(source, epoch):
    calls = []
    spied = replace(source, read=lambda indices: calls.extend(indices) or source.read(indices))
    batches(spied, start=epoch * PER_EPOCH, stop=(epoch + 1) * PER_EPOCH)
    assert len(set(calls)) == len(calls) == PER_EPOCH * BATCH == IMAGES - 5


def test_crops_differ_between_views_images_batches_seeds_and_stages(source):
    draws = [
        streaming.crop_draws((8, 1, 3), seed, stage, k)
        for seed in (0, 1)
        for stage in ("supcon", "linear")
        for k in range(5)
    ]
    assert len(np.unique(np.stack(draws))) == 20 * 8 * 3 * 4
    order = pipeline.epoch_order(8, seed=0, stage="supcon", epoch=0)
    assert (np.argsort(draws[0][:, 0, 0, 0]) != order).any()


def test_random_numbers_never_change():
    """Recorded with NumPy 2.4.6: a run that was stopped must go on with the same crops."""
    found = streaming.crop_draws((2, 1, 1), 0, "supcon", 7).ravel()
    expected = [0.4407410275798792, 0.890902072132708, 0.6216242902392719]
    np.testing.assert_allclose(found[:3], expected, rtol=1e-12)


def test_grey_images(source):
    rgb, grey = batches(source, stop=1)[0], batches(source, stop=1, channels=1)[0]
    assert grey["image"].shape == (BATCH, VIEWS, SIZE, SIZE, 1)
    expected = [np.asarray(Image.fromarray(x).convert("L")) for x in rgb["image"][:, 0]]
    np.testing.assert_array_equal(grey["image"][:, 0, ..., 0], expected)


# Whoever makes them.


@pytest.fixture(scope="module")
def whole(photographs):
    """Batches 0 to 8 in one process, with threads."""
    return batches(read_folder(photographs), stop=8)


@pytest.mark.parametrize("start", [1, 3, 7, 8])
def test_stream_that_starts_later_is_the_rest(source, whole, start):
    assert_same(batches(source, start=start, stop=8), whole[start:])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches_from_any_start(source, whole, workers):
    """Also for one who takes them slowly, so that the workers have to wait."""
    pytest.importorskip("grain")
    found = []
    for batch in streaming.stream(source, **{**OPTIONS, "start": 1, "stop": 8, "workers": workers}):
        found.append(batch)
        time.sleep(0.05)
    assert_same(found, whole[1:])


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_size_of_the_chunks_changes_nothing(source, whole, chunk, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", chunk)
    assert_same(batches(source, stop=3), whole[:3])


def test_rows_of_a_batch_can_be_made_alone(source, whole):
    """Neighbours, as a process of a run has them, or any others."""
    for places in (np.arange(20, 40), np.array([0, 3, 4, 17, 39])):
        parts = batches(source, stop=3, places=places.astype(np.int32))
        rows = [{name: array[places] for name, array in batch.items()} for batch in whole[:3]]
        assert_same(parts, rows)


def test_two_stored_images_beside_each_other(source, whole):
    """Labels and views of both; each has random numbers of its own."""

    def pairs(k):
        return np.stack([order_of(k), order_of(k)[mixing(k)[0]]], 1)

    def mixing(k):
        return pipeline.mixing(BATCH, k, seed=0, stage="supcon", alpha=0.5)

    found = batches(source, stop=3, mix_alpha=0.5)
    for k, batch in enumerate(found):
        assert batch["image"].shape == (BATCH, 2 * VIEWS, SIZE, SIZE, 3)
        np.testing.assert_array_equal(batch["label"], source.labels()[pairs(k)])
        np.testing.assert_array_equal(batch["share"], mixing(k)[1])
        draws = streaming.crop_draws((BATCH, 2, VIEWS), 0, "supcon", k)
        for place, column in ((0, 0), (5, 1), (39, 1)):
            row = source.read(pairs(k)[[place], column])[0]
            options = dict(size=SIZE, channels=3, area=AREA, ratio=RATIO)
            crops = decode.random_crops(row.where, row.image, draws[place, column], **options)
            views = slice(column * VIEWS, (column + 1) * VIEWS)
            np.testing.assert_array_equal(batch["image"][place, views], crops)


# Images that cannot be decoded.


@pytest.fixture
def damaged(source, tmp_path):
    """`damaged(*indices)`: the source, where these images are not images; perhaps a larger one."""

    def make(*indices, size=IMAGES):
        bad = tmp_path / "bad.jpg"
        bad.write_text("not an image")

        def read(wanted):
            rows = source.read(wanted % IMAGES)
            return [
                row._replace(where=f"image {i}", image=bad) if i in indices else row
                for i, row in zip(wanted, rows, strict=True)
            ]

        return replace(source, size=size, read=read)

    return make


@pytest.fixture
def forgiving(monkeypatch):
    """A fifth of the images may be bad: there are few here."""
    monkeypatch.setattr(sources, "BAD_SHARE", 0.2)


def lines_and_batches(source, **options):
    lines = []
    return lines, batches(source, **{"on_error": "skip", "warn": lines.append, **options})


def at(k, *places):
    """The images at these places of batch k."""
    return order_of(k)[list(places)]


def assert_stands_in(source, batch, k, place, index):
    """The crops of an image with the random numbers of this place, and its label."""
    where, image, label = source.read(np.array([index]))[0]
    draws = streaming.crop_draws((BATCH, 1, VIEWS), 0, "supcon", k)[place, 0]
    options = dict(size=SIZE, channels=3, area=AREA, ratio=RATIO)
    crops = decode.random_crops(where, image, draws, **options)
    np.testing.assert_array_equal(batch["image"][place], crops)
    assert batch["label"][place] == label


def test_next_image_of_the_epochs_order_takes_the_place_of_a_bad_one(source, damaged, forgiving):
    """That at the same place of the next batch; what is at other places stays as it is."""
    bad = [*at(0, 3, 4, 39), *at(1, 7), *at(3, 0)]
    lines, found = lines_and_batches(damaged(*bad))
    expected = batches(source)
    for k, batch in enumerate(found):
        np.testing.assert_array_equal(batch["position"], np.arange(BATCH))
        good = ~np.isin(order_of(k), bad)
        for name in ("image", "label"):
            np.testing.assert_array_equal(batch[name][good], expected[k][name][good])
    for k, place in ((0, 3), (0, 4), (0, 39), (1, 7), (3, 0)):
        assert_stands_in(source, found[k], k, place, at(k + 1, place)[0])
    assert len(lines) == len(bad)
    for index in bad:
        assert sum(line.startswith(f"cannot decode image {index}: ") for line in lines) == 1
    for count, line in enumerate(lines, start=1):
        assert line.endswith(f"; the next image stands in for it (bad images so far: {count})")


def test_bad_image_whose_stand_in_is_bad_too(source, damaged, forgiving):
    bad = [*at(0, 3), *at(1, 3)]
    _, found = lines_and_batches(damaged(*bad), stop=2)
    assert_stands_in(source, found[0], 0, 3, at(2, 3)[0])


def test_order_of_an_epoch_goes_on_at_its_start(source, damaged, forgiving):
    """Behind the last batch are the five images that the epoch leaves out, then the first batch."""
    order = pipeline.epoch_order(IMAGES, seed=0, stage="supcon", epoch=0)
    _, found = lines_and_batches(damaged(*at(2, 3, 20)), stop=3)
    assert_stands_in(source, found[2], 2, 3, order[3 * BATCH + 3])
    assert_stands_in(source, found[2], 2, 20, order[20 - 5])


def test_bad_image_of_a_class_gives_way_to_one_of_its_class(damaged, forgiving):
    options = dict(samples_per_class=20, stop=2)
    source = damaged(*order_in_classes(0)[:3])
    lines, found = lines_and_batches(source, **options)
    assert len(lines) == 3
    for batch in found:
        assert sorted(np.bincount(batch["label"], minlength=3)) == [0, 20, 20]


def order_in_classes(k):
    settings = dict(seed=0, stage="supcon", batch_size=BATCH, samples_per_class=20)
    by_class = np.split(np.arange(IMAGES), [42, 84])
    return pipeline.batch_indices(IMAGES, k, by_class=by_class, **settings)


def test_bad_image_stops_the_run_by_default(damaged):
    (bad,) = at(1, 7)
    made = streaming.stream(damaged(bad), **OPTIONS)
    assert next(made)["image"].any()  # it is in the second batch
    message = rf"^cannot decode image {bad}: .*, or skip such images: --config.data.on_error=skip$"
    with pytest.raises(ValueError, match=message):
        list(made)


def test_replaced_images_are_the_same_in_parts_and_from_a_later_start(damaged, forgiving):
    source = damaged(*at(0, 3, 19, 39), *at(1, 3), *at(2, 20))
    _, expected = lines_and_batches(source)
    assert_same(lines_and_batches(source, start=2)[1], expected[2:])
    for parts in (2, 4):
        places = np.split(np.arange(BATCH, dtype=np.int32), parts)
        made = [lines_and_batches(source, places=part)[1] for part in places]
        for *of_processes, batch in zip(*made, expected, strict=True):
            joined = np.concatenate([part["image"] for part in of_processes])
            np.testing.assert_array_equal(joined, batch["image"])


def test_warning_goes_to_standard_error(damaged, capsys):
    batches(damaged(*at(0, 3)), on_error="skip")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"cannot decode image {at(0, 3)[0]}: ")


@pytest.mark.parametrize(
    ("size", "most", "of"),
    [(100_000, 10, 1000), (301, 3, 301), (299, 2, 299)],
    ids=["1,000 where fewer have been seen", "its size if that is less", "or a little less"],
)
def test_more_than_one_per_cent_of_bad_images_is_an_error(damaged, size, most, of):
    bad = pipeline.epoch_order(size, seed=0, stage="supcon", epoch=0)[: most + 1]
    lines, _ = lines_and_batches(damaged(*bad[:-1], size=size), stop=1)
    assert len(lines) == most
    message = rf"^{most + 1} images cannot be decoded, more than 1% of {of}; the last: cannot "
    with pytest.raises(ValueError, match=message):
        lines_and_batches(damaged(*bad, size=size), stop=1)


def test_no_good_image_is_an_error_and_not_all_are_tried(damaged):
    source = damaged(*range(IMAGES))
    with pytest.raises(
        ValueError, match=r"^101 images in turn cannot be decoded; the last: cannot"
    ):
        lines_and_batches(source)


# What cannot be.


def test_source_in_memory_is_refused(photographs):
    memory = read_folder(photographs, memory_limit_gb=1.0)
    with pytest.raises(ValueError, match="train is decoded in memory: there is nothing to stream"):
        batches(memory)


def test_missing_grain_is_asked_for(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ModuleNotFoundError, match="pip install grain; or use 0 workers: threads"):
        batches(source, workers=2)
    assert len(batches(source)) == 5


def test_too_little_shared_memory_is_told_before_it_crashes(source, monkeypatch):
    pytest.importorskip("grain")
    little = types.SimpleNamespace(free=64_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(ValueError, match=r"^2 workers need 0 MB of shared memory, .*--shm-size"):
        batches(source, workers=2)


# Processes and threads come to an end.


def test_closing_early_ends_the_threads(source):
    before = threading.active_count()
    stream = streaming.stream(source, **{**OPTIONS, "stop": 10_000})
    next(stream)
    stream.close()
    assert threading.active_count() == before


PROGRAM = """
import multiprocessing, os, time
from supcon_jax.data import sources, streaming

if __name__ == "__main__":
    settings = dict(name="", load_size=1, channels=3, memory_limit_gb=0.0, directory={folder!r})
    source = sources.open_source("folder", "train", **settings)
    stream = streaming.stream(source, **{options!r})
    next(stream)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    {end}
"""


@pytest.fixture
def program(photographs):
    """`program(code)`: starts a stream with two workers, then does that; `(process, workers)`."""
    pytest.importorskip("grain")
    started = []

    def start(end):
        options = {**OPTIONS, "stop": 10_000, "workers": 2}
        code = PROGRAM.format(folder=str(photographs), options=options, end=end)
        run = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(run)
        workers = [int(number) for number in run.stdout.readline().split()]
        assert len(workers) == 2, run.stderr.read()
        return run, workers

    yield start
    for run in started:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # the workers too, if they did not end
        run.communicate()


def alive(number):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def assert_they_end(numbers, seconds=10):
    deadline = time.monotonic() + seconds
    while any(map(alive, numbers)):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


@needs_proc
def test_closing_ends_the_workers_and_frees_the_memory(program):
    before = set(os.listdir("/dev/shm"))
    run, workers = program("stream.close(); print('closed', flush=True); time.sleep(60)")
    assert run.stdout.readline() == "closed\n"
    assert not any(map(alive, workers))
    left = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("psm_")}
    assert not left


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_main_process(program, number):
    run, workers = program("time.sleep(60)")
    assert all(map(alive, workers))
    os.kill(run.pid, number)
    assert_they_end(workers)


@needs_proc
@pytest.mark.slow
def test_signals_to_all_processes_are_for_the_main_process(program):
    """As a scheduler sends them: the main process must get its batches until it has saved."""
    end = (
        "import signal; signal.signal(signal.SIGTERM, lambda *_: print('told', flush=True)); "
        "print('listening', flush=True); time.sleep(2); next(stream); "
        "[next(stream) for _ in range(20)]; stream.close(); print('saved', flush=True)"
    )
    run, workers = program(end)
    assert run.stdout.readline() == "listening\n"
    os.killpg(run.pid, signal.SIGTERM)
    assert run.stdout.read() == "told\nsaved\n"
    assert run.wait(20) == 0 and not any(map(alive, workers))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("end", ["time.sleep(2)", "time.sleep(2); raise RuntimeError('held')"])
def test_stream_that_nobody_closed_holds_nothing_up(program, end):
    run, workers = program(end)
    started = time.monotonic()
    _, errors = run.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert_they_end(workers)
    assert "leaked" not in errors and ("held" in errors) == ("held" in end)


@pytest.mark.slow
def test_worker_uses_one_thread_and_no_accelerator(source, monkeypatch):
    pytest.importorskip("grain")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    whole = source.read

    def read(indices):
        import cv2
        import jax

        state = (jax.config.jax_platforms == "cpu") + 2 * (cv2.getNumThreads() == 1)
        return [row._replace(label=int(state)) for row in whole(indices)]

    found = batches(replace(source, read=read), stop=1, workers=1)
    assert (found[0]["label"] == 3).all()


@pytest.mark.slow
def test_error_of_a_worker_is_raised(source):
    pytest.importorskip("grain")

    def read(indices):
        raise ValueError("record 7 has label 9, expected 0 to 8")

    with pytest.raises(ValueError, match=r"^record 7 has label 9, expected 0 to 8"):
        batches(replace(source, read=read), workers=2)


@pytest.mark.slow
def test_worker_that_is_killed_is_reported(source):
    pytest.importorskip("grain")
    whole = source.read

    def read(indices):
        if 5 in indices:
            os._exit(9)
        return whole(indices)

    with pytest.raises(RuntimeError, match="terminated unexpectedly with exit code 9"):
        batches(replace(source, read=read), workers=2)


# What travels to a worker.


def test_folder_is_small_enough_for_every_worker(source):
    """ImageNet's 1.3 million names are to be copied in a moment: no objects, one array."""
    cloudpickle = pytest.importorskip("cloudpickle")
    data = cloudpickle.dumps(source.read)
    rows = cloudpickle.loads(data)(np.array([5, 0, 119]))
    assert rows == source.read(np.array([5, 0, 119]))
    longest = max(len(row.where) for row in source.read(np.arange(IMAGES)))
    assert len(data) < 3000 + IMAGES * (longest + 4)


def test_tfds_streams(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    cloudpickle = pytest.importorskip("cloudpickle")
    tiny_tfds.prepare_digits(tmp_path, n_train=80, n_test=5)
    options = dict(load_size=8, channels=1, memory_limit_gb=0.0, directory=str(tmp_path))
    source = sources.open_source("tfds", "train", name="tiny_digits", **options)
    found = batches(source, channels=1, size=8, area=(1, 1), ratio=(1, 1), views=1, stop=2)
    images, labels = source.load(np.arange(80))
    rows = Counter((x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True))
    streamed = Counter(
        (x.tobytes(), int(y))
        for batch in found
        for x, y in zip(batch["image"], batch["label"], strict=True)
    )
    assert streamed == rows
    there = replace(source, read=cloudpickle.loads(cloudpickle.dumps(source.read)))
    assert_same(
        batches(there, channels=1, size=8, stop=2), batches(source, channels=1, size=8, stop=2)
    )
