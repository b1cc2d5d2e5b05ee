"""How much both losses depend on the learning rate, over the same grid of factors (Fig. 4a)."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from experiments.bases import RECIPES, base, with_fields
from experiments.pictures import curve
from experiments.runner import Claim, Values, main
from supcon_jax.data.datasets import COUNTS

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the base recipe's learning rate


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """Both losses at each factor; SupCon's linear stage is not changed."""
    found = {}
    for factor in FACTORS if scale != "smoke" else (0.3, 1.0):
        for name, recipe in RECIPES.items():
            config = base(scale, recipe, data)
            rate = factor * config[recipe].schedule.learning_rate
            field = f"{recipe}.schedule.learning_rate"
            found[f"{factor}: {name}"] = with_fields(config, {field: rate})
    return found


def spreads(values: Values) -> Values:
    """Standard deviation of the accuracy over the factors."""
    found = {}
    for name in RECIPES:
        grid = np.asarray([v for key, v in values.items() if key.endswith(f": {name}/top1")])
        found[f"{name}, spread over learning rates"] = list(grid.std(0, ddof=1))
        found[f"{name}, best less worst"] = list(grid.max(0) - grid.min(0))
    return found


def chance(config: ConfigDict) -> float:
    """Accuracy of guessing, in per cent: what a run that diverged counts as."""
    _, classes = COUNTS[config.data.name or config.data.source]
    return 100 / classes


CLAIMS = [
    Claim(
        "SupCon depends less on the learning rate: standard deviation of top-1 over the grid",
        "significantly lower variance; no numbers",
        "cross-entropy, spread over learning rates",
        "SupCon, spread over learning rates",
    )
]

if __name__ == "__main__":
    draw = curve("learning rate, times the recipe's")
    main(settings, CLAIMS, derive=spreads, diverged=chance, draw=draw)
