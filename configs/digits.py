"""scikit-learn's 1,797 handwritten digits (8 x 8), the recipe of `make demo`; no download.

python -m supcon_jax.train --config configs/digits.py
"""

from supcon_jax.config import base


def get_config(recipe: str = "supcon"):
    config = base(recipe)
    config.data.update(source="digits", load_size=8, image_size=8, channels=1)
    config.data.update(mean=(0.3,), std=(0.38,))
    config.model.update(width=0.125)
    for stage in (config.supcon, config.simclr, config.linear, config.cross_entropy):
        stage.update(batch_size=128)
        stage.augment.update(crop_area=(0.6, 1.0), flip=0.0, jitter=0.0, grey=0.0)
    return config
