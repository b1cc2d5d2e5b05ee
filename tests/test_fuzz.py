"""Thousands of random configurations and damaged checkpoints: one clear line, or nothing wrong."""

import contextlib
import gc
import json
import math
import random
import shutil
import sys
from contextlib import closing

import pytest

from supcon_jax import checkpoints as saving
from supcon_jax import config as configuration
from supcon_jax import parallel, plan, stages, validation
from supcon_jax.checkpoints import CHECKSUMS, LATER, Checkpoints, leaves
from supcon_jax.train import MISTYPED

NUMBERS = [0, 1, -1, 2, 3, 7, 10**6, -(10**6), 0.5, -0.5, 1e-30, 1e9, math.nan, math.inf, -math.inf]
WORDS = ["", "none", "nan", "../..", "\0", "a b", "é", "*", "(((", "8"]
WORDS += sorted({word for choices in validation.CHOICES.values() for word in map(str, choices)})
ELEMENTS = ["encoder", "head", "supcon", "", 0.5, 1.0, -1.0, 128, 0, math.nan]
RECIPES = ["digits", "digits:simclr", "digits:cross_entropy"]
MOST = 64  # of what makes a program large: accepted, but not built here


def value_like(rng, value):
    """A value of the same type, which is all that flags check."""
    if isinstance(value, bool):
        return rng.random() < 0.5
    if isinstance(value, int):
        return int(rng.choice([n for n in NUMBERS if math.isfinite(n)]))
    if isinstance(value, float):
        return float(rng.choice(NUMBERS))
    if isinstance(value, str):
        return rng.choice(WORDS)
    return tuple(rng.choice(ELEMENTS) for _ in range(rng.randrange(4)))


def wrong(rng):
    """A recipe with up to four fields of random values, and these."""
    config = configuration.load(rng.choice(RECIPES))
    fields = configuration.flatten(configuration.used(config))
    names = rng.sample(sorted(fields), rng.choice([1, 1, 2, 4]))
    changed = {name: value_like(rng, fields[name]) for name in names}
    config.update_from_flattened_dict(changed)
    return config, changed


def built(config, mesh):
    """All stages, as `train_and_evaluate` builds them before it writes anything."""
    validation.validate(config)
    data = stages.open_data(config)
    for name in config.stages:
        stages.check_batch(config, name, data, mesh)
    return [stages.build_stage(config, name, data, mesh) for name in config.stages], data


def trace(stage, config, data, mesh):
    """Trace a training step, without compiling it."""
    shapes = stages.abstract_state(config, stage.name, stage.model, stage.tx, mesh)
    batch = plan.abstract_batch(config, stage.name, data.train, mesh)
    return stage.train_step.lower(shapes, batch)


def is_small(config):
    sizes = [config.data.load_size, config.model.width]
    for stage in (config[name] for name in config.stages):
        sizes += [stage.views, stage.augment.layers, stage.micro_batches]
    return max(sizes) <= MOST


@pytest.mark.slow
def test_random_configurations_are_refused_in_a_line_or_work(mesh_of):
    """2,000 of them; of those that are accepted, some are traced through their training steps."""
    rng, mesh, counts, failures = random.Random(0), mesh_of(2), [0, 0, 0], []
    for _ in range(2000):
        try:
            config, changed = wrong(rng)
        except MISTYPED:
            continue  # the flags' own refusal
        try:
            made, data = built(config, mesh)
            counts[0] += 1
            if counts[0] % 20 == 0 and is_small(config):
                for stage in made:
                    trace(stage, config, data, mesh)
                counts[1] += 1
        except (ValueError, OSError) as error:
            counts[2] += 1
            if not str(error) or "\n" in str(error):
                failures.append(repr(error))
        except Exception as error:  # noqa: BLE001  (what must not come from inside)
            failures.append(f"{type(error).__name__} of {changed}: {str(error)[:300]}")
    assert not failures, "\n".join(failures[:20])
    assert counts[0] > 300 and counts[1] > 10 and counts[2] > 700


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one checkpoint of the digits recipe, and its state."""
    config = configuration.load("digits")
    config.model.width = 0.0625
    mesh, folder = parallel.make_mesh(), tmp_path_factory.mktemp("saved")
    stage = stages.build_stage(config, "supcon", stages.open_data(config), mesh)
    state = stages.create(stage, config, mesh, None)
    with closing(Checkpoints(folder, keep=1)) as checkpoints:
        checkpoints.save(state)
        checkpoints.offer(state, 0.5)
    return folder, state


def restored_from(folder, like):
    """What is restored, or None where it is refused, and the lines that were said."""
    checkpoints, said = Checkpoints(folder, keep=1), []
    with closing(checkpoints), contextlib.suppress(ValueError):
        return checkpoints.restore(like, warn=said.append), said
    assert said[-1].startswith(f"checkpoint {folder}/last/0 is not usable: ")
    return None, said


def damage(rng, data):
    """Other bytes than these."""
    place, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    flipped = bytearray(data)
    flipped[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
    kinds = {
        "flip": bytes(flipped),
        "cut": data[:place],
        "removed": data[:place] + data[end:],
        "inserted": data[:place] + rng.randbytes(1 + rng.randrange(20)) + data[place:],
        "overwritten": data[:place] + rng.randbytes(end - place) + data[end:],
        "zeros": data[:place] + bytes(end - place) + data[end:],
    }
    damaged = rng.choice(list(kinds.values()))
    return damaged if damaged != data else data + b"\0"


def damaged(folder, rng, later=False):
    """A file of a checkpoint with a damage (or of the notes that are written later), and what it
    held before.
    """
    files = (p for p in folder.rglob("*") if p.is_file() and (p.name in LATER) == later)
    file = rng.choice(sorted(files))
    data = file.read_bytes()
    file.write_bytes(damage(rng, data))
    return file, data


@pytest.mark.slow
def test_damaged_checkpoints_are_refused(saved):
    """2,000 damages of any file, also of the one with the checksums."""
    (folder, like), rng = saved, random.Random(3)
    assert leaves(restored_from(folder, like)[0]) == leaves(like)
    for _ in range(2000):
        file, data = damaged(folder / "last" / "0", rng)
        restored, said = restored_from(folder, like)
        assert restored is None, file
        assert len(said) == 1 and "\n" not in said[0]
        file.write_bytes(data)
    assert leaves(restored_from(folder, like)[0]) == leaves(like)


@pytest.mark.slow
def test_damaged_notes_and_scores_are_not_needed(saved, tmp_path):
    """300 damages of the notes that are written last, 300 of files of the best: the newest state is
    restored, and the best put aside if need be.
    """
    (folder, like), rng, aside = saved, random.Random(5), 0
    expected = leaves(like)
    for number in range(600):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        of_best = number % 2 == 1
        file, _ = damaged(copy / ("best" if of_best else "last") / "0", rng, later=not of_best)
        restored, said = restored_from(copy, like)
        assert leaves(restored) == expected and not said, file
        aside += (copy / "best-0-damaged").is_dir()
        shutil.rmtree(copy)
    assert aside == 300


@pytest.mark.slow
def test_damages_from_before_the_checksums_are_noticed_in_the_arrays(saved, monkeypatch):
    """200 checkpoints that were damaged while they were written, so that their files are as the
    checksums say: the arrays are not, or the damage is in bytes that are not read.
    """
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)  # Orbax's coroutines
    (folder, like), rng, refused = saved, random.Random(4), 0
    checkpoint = folder / "last" / "0"
    sealed, expected = (checkpoint / CHECKSUMS).read_text(), leaves(like)
    for _ in range(200):
        (checkpoint / CHECKSUMS).unlink()
        file, data = damaged(checkpoint, rng)
        (checkpoint / CHECKSUMS).write_text(json.dumps(saving._checksums(checkpoint)))
        restored, _ = restored_from(folder, like)
        refused += restored is None
        assert restored is None or leaves(restored) == expected, file
        file.write_bytes(data)
        (checkpoint / CHECKSUMS).write_text(sealed)
    gc.collect()
    assert refused > 20
