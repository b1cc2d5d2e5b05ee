"""The training command, but with a death, a signal, a full disk or float64 on the way.

python tests/trainer.py [--die POINT[:CALL[:MILLISECONDS]]] [--term POINT[:CALL[:MILLISECONDS]]]
    [--block] [--full SAVE] [--gigabytes N] [--float64] FLAGS OF THE COMMAND
"""

import argparse
import os
import resource
import signal
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
from absl import app

from supcon_jax import checkpoints, parallel, train
from supcon_jax.checkpoints import Checkpoints
from supcon_jax.data import policies
from supcon_jax.logs import Logs, Recorder

POINTS = {  # name: the method whose call is the moment, and whether it is before it or after
    "step": (Recorder, "add", "after"),
    "look": (train, "heldout_scores", "before"),
    "flush": (Logs, "flush", "after"),
    "save": (Checkpoints, "save", "before"),
    "writing": (Checkpoints, "save", "after"),
    "sealing": (checkpoints, "_seal", "before"),  # the temporary folder is not yet renamed
    "offer": (Checkpoints, "offer", "before"),
    "offered": (Checkpoints, "offer", "after"),
    "restore": (Checkpoints, "restore", "after"),
    "stage": (train, "create", "before"),
    "close": (Checkpoints, "close", "after"),
    "evaluation": (train, "embed", "before"),
    "scored": (train, "scores", "after"),
    "results": (train, "write_json", "before"),
    "pictures": (train.report, "draw", "before"),
}


def send_at(number, point, call=1, milliseconds=0):
    """Send this process a signal at a call of one of POINTS, or so much later."""
    owner, name, when = POINTS[point]
    original, calls = getattr(owner, name), [0]

    def send():
        os.kill(os.getpid(), number)

    def wrapped(*arguments, **options):
        calls[0] += 1
        now = calls[0] == call
        if now and when == "before" and not milliseconds:
            send()
        if now and milliseconds:
            threading.Timer(milliseconds / 1000, send).start()
        result = original(*arguments, **options)
        if now and when == "after" and not milliseconds:
            send()
        return result

    setattr(owner, name, wrapped)


def block():
    """The first training step does not end, and leaves Python as a compiler does."""
    build = train.build_stage

    def endless(state, batch):
        same = jax.jit(lambda x: jax.lax.while_loop(lambda x: x > 0, jnp.abs, x))
        compiled = same.lower(1.0).compile()
        print("blocked", flush=True)
        return jax.block_until_ready(compiled(1.0))

    train.build_stage = lambda *arguments: replace(build(*arguments), train_step=endless)


def fill_disk(save):
    """No file may grow beyond 10 kB from a call of `Checkpoints.save` on."""
    original, calls = Checkpoints.save, [0]

    def limited(self, state):
        calls[0] += 1
        if calls[0] == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        original(self, state)

    Checkpoints.save = limited


def in_float64():
    """Everything but the images in float64, so that sums in another order differ by 1e-15."""
    jax.config.update("jax_enable_x64", True)
    create, make_views = train.create, policies.make_views
    center_crop = policies.center_crop

    def wide(tree):
        return jax.tree.map(lambda x: x.astype("float64") if x.dtype == jnp.float32 else x, tree)

    def create_wide(stage, config, mesh, previous):
        return parallel.replicate(wide(create(stage, config, mesh, previous)), mesh)

    train.create = create_wide
    policies.make_views = lambda *a, **k: make_views(*a, **k).astype(jnp.float64)
    policies.center_crop = lambda *a, **k: center_crop(*a, **k).astype(jnp.float64)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--die", default="")
    parser.add_argument("--term", default="")
    parser.add_argument("--block", action="store_true")
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--full", type=int, default=0)
    parser.add_argument("--gigabytes", type=float, default=0)
    options, flags = parser.parse_known_args()
    if options.float64:
        in_float64()
    if not options.die.startswith("pictures"):
        train.report.draw = lambda workdirs, out: []  # t-SNE takes longer than the training here
    if options.gigabytes:
        limit = int(options.gigabytes * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    if options.full:
        fill_disk(options.full)
    if options.block:
        block()
    for number, given in ((signal.SIGKILL, options.die), (signal.SIGTERM, options.term)):
        if given:
            point, *numbers = given.split(":")
            send_at(number, point, *map(int, numbers))
    app.run(train.main, argv=["train", *flags], flags_parser=train.parse)


if __name__ == "__main__":
    main()
