"""What a plan says: of programs with known figures, and beside what really happens."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.scaling import memory
from supcon_jax import config as configuration
from supcon_jax import plan, programs, stages

SIZES = pytest.mark.parametrize("devices", [2, 4, 8])


def figures_of(function, mesh, *shapes):
    """Figures of a function of one device's float32 arrays, split over the mesh."""
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    split = NamedSharding(mesh, P("data"))
    arguments = [jax.ShapeDtypeStruct(shape, np.float32, sharding=split) for shape in shapes]
    return programs.compiled_figures(jax.jit(mapped), *arguments, devices=mesh.size)


@SIZES
@pytest.mark.parametrize(
    ("operation", "kind", "sent"),  # of 64 x 32 numbers a device, on n devices
    [
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", lambda n: 2 * 8192 * (n - 1) / n),
        (lambda x: jax.lax.all_gather(x, "data"), "all-gather", lambda n: 8192 * (n - 1)),
        (
            lambda x: jax.lax.psum_scatter(x, "data", tiled=True),
            "reduce-scatter",
            lambda n: 8192 * (n - 1) / n,
        ),
        (
            lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
            "collective-permute",
            lambda n: 8192,
        ),
    ],
)
def test_collectives_have_their_known_sizes(devices, operation, kind, sent, mesh_of):
    found = figures_of(operation, mesh_of(devices), (64 * devices, 32))
    assert [(one.kind, one.times) for one in found.collectives] == [(kind, 1)]
    assert found.collectives[0].bytes == pytest.approx(sent(devices))


def test_a_loop_counts_as_often_as_it_runs(mesh_of):
    def seven(x):
        move = partial(jax.lax.ppermute, axis_name="data", perm=[(0, 1), (1, 0)])
        return jax.lax.scan(lambda c, _: (move(jnp.sin(c)), None), x, length=7)[0]

    found = figures_of(seven, mesh_of(2), (64, 32))
    assert programs.sent_by_kind(found.collectives) == {"collective-permute": (7, 7 * 4096)}


def test_what_is_in_a_branch_counts_once(mesh_of):
    def sometimes(x):
        total = jax.lax.psum(x, "data")
        often = jnp.max(total) > 1
        return jax.lax.cond(often, lambda: jax.lax.psum(jnp.sin(x), "data"), lambda: total)

    found = figures_of(sometimes, mesh_of(2), (64, 32))
    assert programs.sent_by_kind(found.collectives) == {"all-reduce": (2, 2 * 4096)}


STARTS = """
ENTRY %main.1 (p: f32[8,4]) -> f32[16,4] {
  %a = f32[8,4]{1,0:T(8,128)} all-reduce-start(%p), replica_groups={{0,1}}, to_apply=%add
  %b = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%a), dimensions={0}
  %c = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%p)
  %d = (f32[8,4]{1,0}, bf16[8]{0}) all-reduce-start(%p, %q), to_apply=%add
  ROOT %e = f32[16,4]{1,0} all-gather-done(%b)
}
"""


def test_started_operations_count_their_result_alone():
    found = programs.collectives(STARTS, 2)
    assert [(one.kind, one.bytes) for one in found] == [
        ("all-reduce", 128),
        ("all-gather", 128),
        ("collective-permute", 128),
        ("all-reduce", 128 + 16),
    ]


def test_memory_and_operations_of_a_known_program(mesh_of):
    """A product of [64, 128] and [128, 32] whose operands and result are all there is."""
    placed = NamedSharding(mesh_of(1), P())
    shapes = [jax.ShapeDtypeStruct(s, np.float32, sharding=placed) for s in ((64, 128), (128, 32))]
    found = programs.compiled_figures(jax.jit(jnp.matmul), *shapes, devices=1)
    assert found.flops == pytest.approx(2 * 64 * 128 * 32, rel=0.01)
    assert found.arguments == 4 * (64 * 128 + 128 * 32)
    assert found.peak == found.arguments + 4 * 64 * 32 + found.temporary
    donated = programs.compiled_figures(
        jax.jit(lambda x: x + 1, donate_argnums=0), shapes[0], devices=1
    )
    assert donated.peak == donated.arguments + donated.temporary


def config_of(name="digits", batch=64, **objective):
    config = configuration.load(name)
    config.supcon.batch_size = batch
    config.supcon.objective.update(objective)
    return config


@SIZES
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_cost_model_of_the_exchange_is_what_the_loss_sends(devices, exchange, mesh_of):
    config = config_of(exchange=exchange)
    found = plan.plan_stage(config, "supcon", mesh_of(devices), step=False)
    sent = sum(one.bytes for one in found.loss.collectives)
    count = 2 * 4 * (devices - 1) / devices  # of the anchors with positives
    assert sent == pytest.approx(found.model["features"] + count, abs=1)


def with_queue():
    config = config_of(contrast_mode="one")
    config.supcon.queue.size = 256
    return config


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("devices", "config"),
    [(2, config_of()), slow(4, config_of()), slow(8, config_of()), slow(4, with_queue())],
)
def test_cost_model_is_what_a_step_sends(devices, config, mesh_of):
    """Within 2 %: XLA merges the sums of some batch norms' gradients with their moments'."""
    found = plan.plan_stage(config, "supcon", mesh_of(devices))
    sent = sum(one.bytes for one in found.step.collectives)
    assert sum(found.model.values()) == pytest.approx(sent, rel=0.02)
    local = config.copy_and_resolve_references()
    local.model.batch_norm = "local"
    fewer = plan.plan_stage(local, "supcon", mesh_of(devices), step=False)
    share = 4 if config.supcon.queue.size else 3  # of the running statistics
    assert fewer.model["batch norm"] == pytest.approx(found.model["batch norm"] / share)


def test_gradients_are_added_up_in_float32_also_under_bfloat16(mesh_of):
    """Every all-reduce that the step's trace has: gradients, batch norm's moments, metrics."""
    config, mesh = config_of(), mesh_of(2)
    config.model.dtype = "bfloat16"
    source = plan.stand_in(config, 64)
    stage = stages.build_stage(config, "supcon", stages.Data(*[source] * 4), mesh)
    state = stages.abstract_state(config, "supcon", stage.model, stage.tx, mesh)
    batch = plan.abstract_batch(config, "supcon", source, mesh)
    text = stage.train_step.lower(state, batch).as_text()
    types = re.findall(r"all_reduce.*?\}\) : \(tensor<(?:[0-9]+x)*(\w+)>", text, re.S)
    assert len(types) > len(jax.tree.leaves(state.params))
    assert set(types) == {"f32"}


@pytest.mark.parametrize("config", [config_of(), with_queue()])
def test_shapes_are_those_of_the_state_and_of_the_batches(config, mesh_of):
    mesh = mesh_of(2)
    data = stages.open_data(config)
    stage = stages.build_stage(config, "supcon", data, mesh)
    state = stages.create(stage, config, mesh, previous=None)
    batch = next(stages.batches(stage, 0, config, data.train, mesh))
    planned = (
        stages.abstract_state(config, "supcon", stage.model, stage.tx, mesh),
        plan.abstract_batch(config, "supcon", plan.stand_in(config, 64), mesh),
    )
    assert jax.tree.structure((state, batch)) == jax.tree.structure(planned)
    for real, shape in zip(jax.tree.leaves((state, batch)), jax.tree.leaves(planned), strict=True):
        assert (real.shape, real.dtype) == (shape.shape, shape.dtype)
        assert real.sharding.is_equivalent_to(shape.sharding, real.ndim)
    found = plan.plan_stage(config, "supcon", mesh, step=False)
    assert found.parameters == sum(x.size for x in jax.tree.leaves(state.params))


def test_parameters_of_a_frozen_encoder_are_not_trained(mesh_of):
    config = configuration.load("digits")
    found = plan.plan_stage(config, "linear", mesh_of(1), step=False)
    assert found.trained == 64 * 10 + 10
    assert found.parameters == found.trained + 77_288
    assert sum(found.model.values()) == 0  # one device


def test_streamed_and_mixed_batches(mesh_of):
    streamed = configuration.load("resnet50")
    streamed.supcon.batch_size = 8
    shapes = plan.abstract_batch(streamed, "supcon", plan.stand_in(streamed, 8), mesh_of(1))
    assert shapes["image"].shape == (8, 2, 224, 224, 3)
    mixed = configuration.load("digits:cross_entropy")
    mixed.cross_entropy.update(mix="mixup", batch_size=8)
    shapes = plan.abstract_batch(mixed, "cross_entropy", plan.stand_in(mixed, 8), mesh_of(1))
    assert shapes["image"].shape == (8, 2, 8, 8, 1)
    assert shapes["label"].shape == (8, 2) and shapes["share"].shape == (8,)


def test_a_folder_that_is_there_is_counted(tmp_path):
    from PIL import Image

    for name in ("cat", "dog", "owl"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "0.png")
    config = configuration.load("imagenette")
    assert len(plan.stand_in(config, 4).class_names) == 1000
    config.data.dir = str(tmp_path)
    source = plan.stand_in(config, 4)
    assert len(source.class_names) == 3 and source.size == 4 and source.read is None


@pytest.mark.parametrize(
    ("needs", "start", "limit", "expected"),
    [
        (lambda size: 100 + 3 * size, 8, 1000, 296),
        (lambda size: 100 + 3 * size, 4096, 1000, 296),
        (lambda size: 100 + 3 * size, 256, 870, 256),
        (lambda size: 10 + size**2 / 50, 64, 5000, 496),
        (lambda size: size + 500 * (size > 100), 64, 590, 100),
    ],
)
def test_search_finds_a_batch_that_fits_and_fills_the_memory(needs, start, limit, expected):
    called = []

    def counted(size):
        called.append(size)
        return needs(size)

    size, needed = plan.search(counted, start, needs(start), limit=limit, multiple=4)
    assert size % 4 == 0 and needed == needs(size) <= limit
    assert needed >= plan.ENOUGH * limit or size >= 0.9 * expected
    assert len(called) <= plan.MOST_PROGRAMS and len(called) == len(set(called))


def test_search_says_where_nothing_fits():
    assert plan.search(lambda size: 1e6 + size, 64, 1e6 + 64, limit=1000, multiple=8) == (0, 0)


class Refuses:
    """What a TPU's compiler does with a program that is too large."""

    def __init__(self, message):
        self.message = message

    def lower(self, *shapes):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 38.90G of 15.75G hbm. Exceeded hbm capacity by 23.15G.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (38.90G) exceeds available HBM (15.75G).",
    ],
)
def test_a_program_that_does_not_fit_says_what_it_needs(message):
    found = plan.attempt(Refuses(message), devices=8)
    assert (found.needed, found.available) == (38.9 * 2**30, 15.75 * 2**30)
    with pytest.raises(jax.errors.JaxRuntimeError, match="other"):
        plan.attempt(Refuses("INTERNAL: other"), devices=8)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("JAX TPU support not installed; cannot generate TPU topology.", r'install "jax\[tpu\]"'),
        ("Invalid TPU external name: TPU v9", "no TPU topology 'v9:2x2'; there are such as v5e:"),
    ],
)
def test_topologies_that_cannot_be_had_say_what_to_do(said, expected, monkeypatch):
    def refuse(**options):
        raise RuntimeError(said)

    monkeypatch.setattr(programs.topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match=expected):
        programs.tpu_devices("v9:2x2")


@pytest.mark.parametrize("memory_gb", [math.nan, math.inf, -math.inf, -1.0, 0.0])
def test_memory_is_positive_and_finite(memory_gb):
    message = f"^--memory_gb must be positive and finite, .*; got {memory_gb}$"
    with pytest.raises(ValueError, match=message):
        plan.report(configuration.load("digits"), memory_gb=memory_gb)


def test_the_table_fits_a_terminal():
    figures = programs.Figures(
        10**11, 10**11, 10**12, 1e18, 1e12,
        tuple(programs.Collective(kind, 10**4, 1e11) for kind in programs.SENT),
    )  # fmt: skip
    model = {"gradients": 1e11, "batch norm": 1e8, "features": 1e9}
    stage = partial(plan.StagePlan, devices=2048, batch_size=10**6, views=2, parameters=10**9,
                    trained=10**9, step=figures, loss=figures, model=model)  # fmt: skip
    text = plan.table([stage(name="supcon"), stage(name="linear")], "", [(10**6, 1e12)] * 2)
    assert max(map(len, text.splitlines())) <= 80
    failed = stage(name="supcon", step=programs.DoesNotFitError(39e9, 16e9))
    assert "39.0 GB!" in plan.table([failed], "")


def run(code, *arguments, **environment):
    """What a program prints in a process of its own, without the tests' settings of XLA."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *(["-c", code] if code else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_command_prints_the_table():
    arguments = ("-m", "supcon_jax.train", "--config=digits:cross_entropy", "--memory_gb=0.01")
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    text = run("", *arguments, XLA_FLAGS=flags)
    assert max(map(len, text.splitlines())) <= 80
    rows = {line[:29].strip(): line[29:].split() for line in text.splitlines()}
    assert rows["parameters"] == ["77,938"]
    largest = int(rows["largest batch that fits"][0].replace(",", ""))
    assert largest > 128 and largest % 2 == 0
    assert rows["its memory"][1] == "MB" and 8 < float(rows["its memory"][0]) <= 10


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory_is_what_the_process_grows_by():
    # At a size where the run-time's own tens of megabytes, which no program tells, weigh little.
    found = json.loads(run("", "experiments/scaling/memory.py", "--config=digits", "--batch=2048"))
    assert found["planned"] == pytest.approx(found["grown"], rel=0.25)


class Gpu:
    """A device whose allocator has this many bytes in use, and at most had."""

    platform, in_use, peak = "gpu", 100, 300

    def memory_stats(self):
        return {"bytes_in_use": self.in_use, "peak_bytes_in_use": self.peak}


def test_growth_on_a_gpu_is_by_the_allocators_count(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    grown = memory.growth()
    with pytest.raises(SystemExit, match="compiling used 300 bytes, the steps not more: take a la"):
        grown()
    gpu.in_use, gpu.peak = 400, 5000
    assert grown() == 4900


TPU = """
from supcon_jax import config as configuration, plan, programs, stages

mesh = plan.make_mesh("v5e:2x4")
for options in (dict(), dict(block_size=32), dict(exchange="ring"),
                dict(exchange="ring", block_size=16)):
    config = configuration.load("digits")
    config.supcon.objective.update(options)
    found = plan.plan_stage(config, "supcon", mesh, step=not options)
    sent = sum(one.bytes for one in found.loss.collectives)
    print(found.devices, found.loss.flops > 0, sent / found.model["features"])
    if not options:
        sent = sum(one.bytes for one in found.step.collectives)
        print(found.parameters, found.step.flops > 1e6, sent / sum(found.model.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU compiler is not installed: pip install "jax[tpu]" (needs no TPU)',
)
def test_loss_and_step_compile_for_a_tpu():
    """Dense, in blocks and around the ring, and one whole step, in the bytes of the cost model."""
    lines = [line.split() for line in run(TPU, JAX_PLATFORMS="cpu").splitlines()]
    assert [line[:2] for line in lines] == [["8", "True"], ["85608", "True"], *[["8", "True"]] * 3]
    for line in lines:  # the compiler may gather by an all-reduce, which sends twice as much
        assert 0.9 < float(line[2]) < 2.1
