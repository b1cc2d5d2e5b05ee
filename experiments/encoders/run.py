"""SupCon against cross-entropy on several encoders (Table 3 of the paper)."""

from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import RECIPES, base, published, with_fields
from experiments.runner import Claim, main

SMALL = {"model.name": "vit", "model.size": "ti"}
ENCODERS = {
    "smoke": {"ResNet-10": {"model.depth": 10}},
    "cpu": {
        "ResNet-10": {"model.depth": 10},
        "ResNet-18": {"model.depth": 18},
        "ViT-Ti": {**SMALL, "model.patch": 7},
    },
    "gpu": {
        "ResNet-18": {"model.depth": 18},
        "ResNet-50": {"model.depth": 50},
        "ViT-Ti": {**SMALL, "model.patch": 4},
    },
}
PUBLISHED = {f"ResNet-{depth}": f"resnet{depth}" for depth in (50, 101, 200)}  # recipe files
ADAMW = {"optimizer.name": "adamw", "optimizer.weight_decay_kind": "decoupled",
         "optimizer.weight_decay": 0.05, "schedule.learning_rate": 1e-3}  # fmt: skip
PART = 0.2  # of the length of training, for a ViT at the cpu scale: its steps take so much longer


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """Both losses on every encoder; a ViT is trained by AdamW, at a rate that was set by hand."""
    if scale == "paper":
        return {
            f"{encoder}: {name}": published(file, recipe, data)
            for encoder, file in PUBLISHED.items()
            for name, recipe in RECIPES.items()
        }
    found = {}
    for encoder, fields in ENCODERS[scale].items():
        for name, recipe in RECIPES.items():
            config = with_fields(base(scale, recipe, data), fields)
            if "ViT" in encoder:
                stage = config[recipe]
                with_fields(stage, ADAMW)
                for length in ("epochs", "warmup_epochs") if scale == "cpu" else ():
                    stage[length] *= PART
            found[f"{encoder}: {name}"] = config
    return found


CLAIMS = [
    Claim(
        f"SupCon is more accurate than cross-entropy on {encoder}",
        numbers,
        f"{encoder}: SupCon/top1",
        f"{encoder}: cross-entropy/top1",
    )
    for encoder, numbers in {
        "ResNet-10": "not given",
        "ResNet-18": "not given",
        "ResNet-50": "ImageNet 78.7 over 77.6",
        "ResNet-101": "ImageNet 80.2; cross-entropy not given",
        "ResNet-200": "ImageNet 81.4 over 80.9",
        "ViT-Ti": "not given",
    }.items()
]

if __name__ == "__main__":
    main(settings, CLAIMS)
