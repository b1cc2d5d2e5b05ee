"""Runs that take seconds, for tests of what goes around the training."""

from supcon_jax import config as configuration


def small(recipe="supcon", **fields):
    """A recipe on the digits, short and thin: 10 steps of pre-training, 5 of the linear stage."""
    config = configuration.load(f"digits:{recipe}")
    config.model.width = 0.0625
    config.log.every_steps = 3
    config.evaluation.every_epochs = config.checkpoint.every_epochs = 1.0
    for stage, epochs in (
        ("supcon", 2.0),
        ("simclr", 1.0),
        ("linear", 1.0),
        ("cross_entropy", 2.0),
    ):
        config[stage].update(batch_size=256, epochs=epochs, warmup_epochs=0.0)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config
