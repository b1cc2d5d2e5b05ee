"""The cost model beside what compiled steps send, on 2, 4 and 8 simulated CPU devices.

    python experiments/scaling/cost_model.py

The pre-training step of configs/digits.py, compiled and not run. All-reduces carry gradients and
batch norm, the other collectives features and labels. Writes cost_model.json and cost_model.md.
"""

import json
import os
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax

from supcon_jax import config as configuration
from supcon_jax import parallel, plan
from supcon_jax.programs import Figures, sent_by_kind
from supcon_jax.report import circumstances

HERE = Path(__file__).parent
FORMS = {
    "gather": ("gather", "global"),
    "ring": ("ring", "global"),
    "gather, local batch norm": ("gather", "local"),
}


def measure(devices: int, form: str) -> dict[str, Any]:
    config = configuration.load("digits")
    config.supcon.objective.exchange, config.model.batch_norm = FORMS[form]
    mesh = parallel.make_mesh(jax.devices()[:devices])
    found = plan.plan_stage(config, "supcon", mesh)
    assert isinstance(found.step, Figures)
    sent = sent_by_kind(found.step.collectives)
    reduced = sent.pop("all-reduce")[1]
    model = found.model
    return {
        "devices": devices,
        "form": form,
        "gradients, model": round(model["gradients"]),
        "batch norm, model": round(model["batch norm"]),
        "all-reduces, program": round(reduced),
        "features, model": round(model["features"]),
        "other collectives, program": round(sum(size for _, size in sent.values())),
    }


def main() -> None:
    results = [measure(devices, form) for form in FORMS for devices in (2, 4, 8)]
    record = {"command": "cost_model.py", "results": results, **circumstances()}
    (HERE / "cost_model.json").write_text(json.dumps(record, indent=1) + "\n")
    names = list(results[0])
    lines = ["| " + " | ".join(names) + " |", "| ---: | --- |" + " ---: |" * (len(names) - 2)]
    for result in results:
        cells = [x if isinstance(x, str) else f"{x:,}" for x in result.values()]
        lines += ["| " + " | ".join(cells) + " |"]
    (HERE / "cost_model.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
