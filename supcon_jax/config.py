"""Every field of a configuration, once, with its meaning; recipe files change what differs.

A recipe is a sequence of stages. All stages are always declared, `config.stages` names those that
run, so that `--config.supcon.epochs=100` is spelt the same in every recipe.
"""

import difflib
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

RECIPES = {
    "supcon": ("supcon", "linear"),
    "simclr": ("simclr", "linear"),
    "cross_entropy": ("cross_entropy",),
    "linear": ("linear",),
    "finetune": ("finetune",),
}
# In this order for good: the place of a stage is in its random keys.
STAGES = ("supcon", "simclr", "linear", "cross_entropy", "finetune")

# What the result does not depend on: paths, logging, and what the hardware allows.
NOT_HASHED = (
    "data.dir",
    "data.workers",
    "data.on_error",  # or a run that it stopped could not go on with the other choice
    "model.remat",
    "log",
    "checkpoint",
    "evaluation.batch_size",
)


def base(recipe: str = "supcon") -> ConfigDict:
    """The defaults of all fields, with the stages of a recipe.

    Args:
      recipe: "supcon" (contrastive with labels, then a linear classifier on the frozen encoder),
        "simclr" (the same without labels), "cross_entropy", or of the encoder in `model.weights`
        "linear" (a classifier on it) or "finetune" (a classifier, and all of it trained on).

    Returns:
      A configuration whose fields are locked, so that values can change and names cannot.

    Raises:
      ValueError: unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}{nearest(recipe, RECIPES)}")
    config = ConfigDict(
        dict(
            seed=0,  # of initial values, data order and augmentations
            stages=RECIPES[recipe],  # run one after the other
            data=dict(
                source="digits",  # digits, folder (DIR/SPLIT/CLASS/IMAGE) or tfds
                name="",  # of the TFDS data set
                dir="",  # of the folder, or TFDS's data_dir ("": ~/tensorflow_datasets)
                train_split="train",  # name of the split that is trained on
                test_split="test",  # of the one that is seen once, at the end
                test_share=0.2,  # of each class, for the test where both splits are the same one
                holdout=0.05,  # share of the training images kept for looking at during training
                load_size=32,  # pixels; images are loaded as squares of this side
                image_size=32,  # pixels; side of the views and of the evaluation's middle crop
                channels=3,  # 1 (grey) or 3 (RGB)
                mean=(0.5, 0.5, 0.5),  # subtracted from pixels in [0, 1], one a channel
                std=(0.5, 0.5, 0.5),  # then divided by, one a channel
                memory_limit_gb=4.0,  # a split up to this size is kept decoded; others are streamed
                workers=-1,  # processes that decode streamed images; -1: one a core, 0: threads
                on_error="error",  # of an image that cannot be decoded; skip: go on without it
                fraction=1.0,  # share of each class's training images that is used, always the same
                per_class=0,  # training images of each class; 0: all
                imbalance=1.0,  # images of the first class over those of the last, an even decay
                label_noise=0.0,  # share of training labels drawn anew from all classes, once
            ),
            model=dict(
                name="resnet",  # resnet or vit
                depth=18,  # of the ResNet: 10, 18, 34, 50, 101, 152, 200
                width=1.0,  # multiplies the filters
                groups=1,  # of the 3x3 convolutions; ResNeXt 32x4d: 32, and 4 below
                group_width=64,  # filters of each in the first group of blocks
                stem="cifar",  # cifar (3x3, stride 1) or imagenet (7x7, stride 2, max-pool)
                first_shortcut="projection",  # of depths below 50; torchvision: identity
                zero_init_residual=True,  # last batch-norm scale of each block starts at 0
                batch_norm="global",  # statistics of the global batch, or local: of each device's
                batch_norm_momentum=0.9,  # share of the running statistics that stays at each step
                size="s",  # of the Vision Transformer: ti, s, b
                patch=16,  # pixels; side of the Vision Transformer's patches
                pool="token",  # of the Vision Transformer: token (the class token) or mean (of all)
                normalize=False,  # heads get the encoder's output at length 1
                weights="",  # to start from: .pth, .npz or .safetensors with torchvision's names
                remat=False,  # less memory, more time: blocks are computed again going backward
                dtype="float32",  # of the computation; parameters and losses are float32
            ),
            evaluation=dict(
                every_epochs=10.0,  # k-NN (and top-1) on the held-out images; 0: never
                batch_size=500,  # images; changes speed and memory, not results
                neighbours=20,  # k of the k-NN
                temperature=0.07,  # of the weights of its votes
                references=50_000,  # most training images that the k-NN compares with
            ),
            checkpoint=dict(
                every_epochs=10.0,  # from one to the next; another at the end of each stage
                keep=2,  # last ones of each stage; the best on held-out images is kept beside them
            ),
            log=dict(every_steps=20),  # from record to record of metrics.jsonl
            supcon=_contrastive_stage(use_labels=True, temperature=0.1),
            simclr=_contrastive_stage(use_labels=False, temperature=0.5),
            linear=_classifying_stage(frozen=("encoder",), start_from="previous"),
            cross_entropy=_classifying_stage(frozen=(), start_from="scratch"),
            finetune=_finetuning_stage(),
        )
    )
    return config.lock()


def _contrastive_stage(*, use_labels: bool, temperature: float) -> dict[str, Any]:
    return _stage(
        objective=dict(
            name="contrastive",  # fixed: it tells the two kinds of stages apart
            loss="supcon",  # supcon (Eq. 2), supcon_in (Eq. 3), or triplet
            use_labels=use_labels,  # False: SimCLR
            temperature=temperature,  # of triplet: half the margin
            contrast_mode="all",  # views that are anchors: all, or one
            denominator_mode="all",  # all, one_positive (SINCERE) or only_negatives (DCL)
            positives_cap=-1,  # most positives from other samples, a multiple of views; -1: all
            exchange="gather",  # of the features: gather, or ring, which never holds all of them
            block_size=0,  # pairs at once are so many squared; 0: 1024 where all need over 256 MiB
        ),
        head=dict(
            name="projection",  # fixed
            layers=(128,),  # output sizes; one entry is a linear projection
            batch_norm=False,  # in the hidden layers
            kernel_init="lecun_normal",  # or glorot_uniform, normal_0.01
        ),
        views=2,
        frozen=(),
        start_from="scratch",
    )


def _classifying_stage(*, frozen: tuple[str, ...], start_from: str) -> dict[str, Any]:
    return _stage(
        objective=dict(
            name="cross_entropy",  # fixed
            label_smoothing=0.0,  # share of the target that is spread over all classes
            margin=1,  # of large-margin softmax; 1: none
            margin_epochs=10.0,  # until the margin is whole; at once, nothing is learnt
        ),
        head=dict(
            name="classifier",  # fixed
            kernel_init="lecun_normal",  # or glorot_uniform, normal_0.01, zeros
        ),
        views=1,
        frozen=frozen,
        start_from=start_from,
    )


def _finetuning_stage() -> dict[str, Any]:
    """As SimCLR's appendix B.8 has it, where learning rate and weight decay are searched."""
    stage = _classifying_stage(frozen=(), start_from="previous")
    stage["optimizer"] |= dict(name="nesterov")
    stage["schedule"] |= dict(learning_rate=0.01)
    stage["augment"] |= dict(name="crop_flip", crop_area=(0.08, 1.0))
    return stage


def _stage(
    *, objective: dict, head: dict, views: int, frozen: tuple[str, ...], start_from: str
) -> dict[str, Any]:
    return dict(
        objective=objective,
        head=head,
        views=views,  # augmented copies of each image in a batch
        frozen=frozen,  # parts that are not trained: ("encoder",) or ()
        # previous: the encoder of the stage before; scratch: that of model.weights where it is set,
        # else initial values
        start_from=start_from,
        epochs=100.0,  # passes over the training images; may be fractional
        warmup_epochs=0.0,  # of them with a linearly rising learning rate
        batch_size=256,  # images (not views) in the global batch
        micro_batches=1,  # parts whose activations are held one after the other; exact gradient
        samples_per_class=0,  # of every class in a batch, all classes equally often; 0: as drawn
        mix="none",  # mixup or cutmix of two images and their labels, for cross_entropy only
        mix_alpha=1.0,  # of the Beta distribution of the first image's share
        queue=dict(
            size=0,  # features of a momentum encoder that are contrasted with too; 0: none
            momentum=0.999,  # share of that encoder that stays at each step
            from_epoch=0.0,  # from which on features are kept: the encoder moves fast at first
        ),
        # decay of a moving average of the parameters, which is evaluated, with the running batch
        # statistics; at step t it is at most (1 + t) / (10 + t): 0.999 needs 8,990 steps; 0: none
        average=0.0,
        # steps in a row without a finite gradient that are left out; the schedule waits too, so its
        # last steps are not reached, and the logged learning rate is ahead by as many; 0: stop
        skip_nonfinite=0,
        loss_scale=1.0,  # factor on the loss for the gradient; the logged loss is without it
        optimizer=dict(
            name="sgd",  # sgd, nesterov, lars, rmsprop, adamw
            momentum=0.9,  # of SGD, Nesterov, LARS and RMSProp
            decay=0.9,  # of RMSProp's mean square
            epsilon=1e-3,  # of RMSProp (inside the root) and AdamW
            betas=(0.9, 0.999),  # of AdamW
            trust_coefficient=1e-3,  # of LARS
            weight_decay=1e-4,  # factor on the weights
            weight_decay_kind="l2",  # l2: in the gradient; decoupled: of AdamW; lars: inside LARS
            clip_norm=0.0,  # largest norm of the whole gradient; 0: not clipped
            exclude="norm_and_bias",  # from decay and layer adaptation: none, norm, norm_and_bias
        ),
        schedule=dict(
            name="cosine",  # cosine, exponential (staircase), step, constant; after the warm-up
            learning_rate=0.1,  # the peak, used as it stands: nothing rescales it
            warmup_start=0.0,  # learning rate at step 0 of a warm-up
            final_ratio=0.0,  # of cosine: last learning rate / peak
            decay_rate=0.1,  # of exponential and step: factor at each drop
            decay_epochs=1.0,  # of exponential: from drop to drop
            boundaries=(),  # of step: epochs of the drops, from the end of the warm-up
        ),
        augment=dict(
            # crop_flip; sim_augment: jitter, grey, blur; auto_augment: table; rand_augment: layers,
            # magnitude; stacked_rand_augment: jitter, layers, magnitude, grey, blur
            name="sim_augment",
            crop_area=(0.2, 1.0),  # share of the image; (1, 1) and ratio (1, 1): no crop
            crop_ratio=(0.75, 4 / 3),  # width / height
            shift=0,  # pixels, after the crop, filled with black
            flip=0.5,  # probability
            jitter=0.5,  # strength s: brightness, contrast, saturation 0.8 s, hue 0.2 s; 0: off
            jitter_probability=0.8,  # of the jitter
            jitter_form="torchvision",  # or tensorflow: additive brightness
            grey=0.2,  # probability
            blur=0.0,  # probability; sigma uniform in 0.1 to 2 pixels
            table="imagenet",  # of AutoAugment: imagenet or cifar
            layers=2,  # of RandAugment: operations one after the other
            magnitude=10.0,  # of RandAugment: 0 to 10
            cutout=0,  # pixels; side of a grey square at the end
        ),
    )


def load(name: str) -> ConfigDict:
    """The configuration of a recipe file: "PATH.py[:RECIPE]", or a shipped one by name, "digits".

    Args:
      name: path or name, and the recipe after a colon (default "supcon").

    Returns:
      What the file's `get_config(recipe)` gives.

    Raises:
      FileNotFoundError: no such file or shipped configuration.
      ValueError: unknown recipe.
    """
    file, _, recipe = name.partition(":")
    path = Path(file) if file.endswith(".py") else shipped().get(file)
    if path is None or not path.is_file():
        raise FileNotFoundError(f"no configuration {file!r}{nearest(Path(file).stem, shipped())}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(recipe or "supcon")


def shipped() -> dict[str, Path]:
    """Recipe files by name: in the package where that is installed, beside it in a checkout."""
    here = Path(__file__).parent
    inside = here / "configs"
    folder = inside if inside.is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def check_names(config: ConfigDict, arguments: Iterable[str]) -> None:
    """Check that every `--config.FIELD` among the arguments names a field.

    Raises:
      ValueError: one does not; the message has the nearest name.
    """
    fields = flatten(config)
    for argument in arguments:
        flag = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and flag.startswith("config."):
            field = flag.removeprefix("config.")
            if field not in fields:
                raise ValueError(f"unknown field config.{field}{nearest(field, fields)}")


def used(config: ConfigDict) -> dict[str, Any]:
    """The configuration as a plain dictionary, without the stages that do not run."""
    plain = json.loads(json.dumps(config.to_dict()))
    unused = set(STAGES) - set(config.stages)
    return {name: value for name, value in plain.items() if name not in unused}


def unused(config: ConfigDict) -> dict[str, Any]:
    """The stages that do not run, as a plain dictionary."""
    plain = json.loads(json.dumps(config.to_dict()))
    return {name: plain[name] for name in STAGES if name not in config.stages}


def config_hash(plain: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for all fields that the result depends on."""
    text = json.dumps(hashed_fields(plain), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hashed_fields(plain: dict[str, Any]) -> dict[str, Any]:
    """`field.name -> value` of the fields that the result depends on."""
    return {
        path: value
        for path, value in flatten(plain).items()
        if not any(path == name or path.startswith(name + ".") for name in NOT_HASHED)
    }


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each hashed field that differs between two plain configurations."""
    before, after = hashed_fields(old), hashed_fields(new)
    return [
        f"{path}: {before.get(path, '(not there)')} -> {after.get(path, '(not there)')}"
        for path in sorted(before | after)
        if path not in before or path not in after or before[path] != after[path]
    ]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    return dict(_leaves(tree, prefix))


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict | ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def nearest(name: str, names: Iterable[str]) -> str:
    """Text that asks whether the nearest name was meant, or lists the names if they are few."""
    names = list(names)
    matches = difflib.get_close_matches(name, names, 1, 0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; there are {', '.join(names)}" if len(names) < 20 else ""
