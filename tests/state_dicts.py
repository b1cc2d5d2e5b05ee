"""Random weights of residual networks under torchvision's names."""

import numpy as np

from supcon_jax.models import DEPTHS


def state_dict_of(model, channels=3, seed=0):
    """Random weights under torchvision's names, as its `ResNet` would have them."""
    random, state, base = np.random.RandomState(seed), {}, int(64 * model.width)

    def conv(name, inputs, outputs, kernel, groups=1):
        shape = (outputs, inputs // groups, kernel, kernel)
        state[f"{name}.weight"] = random.normal(0, np.prod(shape[1:]) ** -0.5, shape)

    def norm(name, size):
        state[f"{name}.weight"] = random.uniform(0.5, 1.5, size)
        state[f"{name}.bias"] = random.normal(0, 0.3, size)
        state[f"{name}.running_mean"] = random.normal(0, 0.3, size)
        state[f"{name}.running_var"] = random.uniform(0.5, 1.5, size)
        state[f"{name}.num_batches_tracked"] = np.array(100)

    conv("conv1", channels, base, 7 if model.stem == "imagenet" else 3)
    norm("bn1", base)
    counts, bottleneck = DEPTHS[model.depth]
    expansion, inputs = (4, base) if bottleneck else (1, base)
    for layer, block in ((i, j) for i in range(4) for j in range(counts[i])):
        name, planes = f"layer{layer + 1}.{block}", base * 2**layer
        inner = planes * model.group_width // 64 * model.groups
        sizes = [(planes, 3), (planes, 3)]
        if bottleneck:
            sizes = [(inner, 1), (inner, 3), (4 * planes, 1)]
        before = inputs
        for i, (outputs, kernel) in enumerate(sizes, start=1):
            conv(f"{name}.conv{i}", before, outputs, kernel, model.groups if i == 2 else 1)
            norm(f"{name}.bn{i}", outputs)
            before = outputs
        changes = inputs != expansion * planes or (layer > 0 and block == 0)
        if changes or (model.first_shortcut == "projection" and (layer, block) == (0, 0)):
            conv(f"{name}.downsample.0", inputs, expansion * planes, 1)
            norm(f"{name}.downsample.1", expansion * planes)
        inputs = expansion * planes
    state["fc.weight"], state["fc.bias"] = random.normal(size=(10, inputs)), np.zeros(10)
    return {name: np.asarray(value, np.float32) for name, value in state.items()}
