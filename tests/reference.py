"""The equations of Khosla et al. (arXiv:2004.11362) as float64 loops: what the library must equal.

Indices are the paper's: i an anchor, p one of its positives, a any other view. Slow and plain on
purpose, and written from the paper rather than from the library.
"""

import numpy as np


def supcon(features, labels=None, **kwargs):
    """Eq. 2: `(losses [batch], gradient)`, see `contrastive`."""
    return contrastive(features, labels, inside=False, **kwargs)


def supcon_in(features, labels=None, **kwargs):
    """Eq. 3: `(losses [batch], gradient)`, see `contrastive`."""
    return contrastive(features, labels, inside=True, **kwargs)


def contrastive(
    features,
    labels,
    *,
    inside,
    temperature=0.1,
    contrast_mode="all",
    denominator_mode="all",
    positives_cap=None,
    mask=None,
    queue=None,
    weights=None,
    epsilon=0.0,
    beta=0.0,
):
    """Mean loss of the anchor views of each sample, and the gradient of sum(weights * losses).

    The gradient has the shape of the features and goes through the anchors and through the contrast
    set: s_ia = z_i . z_a / temperature pulls on z_i and on z_a. `epsilon` is the margin of
    epsilon-SupInfoNCE, `beta` the hardness of the negatives in H-SCL.
    """
    features = np.asarray(features, np.float64)
    batch, views = (*features.shape[:-1], 1)[:2]
    rows = batch * views
    z = features.reshape(rows, -1)
    y = list(np.repeat(np.arange(batch) if labels is None else np.asarray(labels), views))
    sample = list(np.repeat(np.arange(batch), views))
    for row, label, valid in zip(*queue, strict=True) if queue is not None else ():
        if valid:
            z = np.concatenate([z, row[None]])
            sample.append(None)
            y.append(-len(y) if labels is None else label)
    weights = np.ones(batch) if weights is None else weights
    anchors_per_sample = views if contrast_mode == "all" else 1

    losses, gradient = np.zeros(batch), np.zeros_like(z)
    for b in range(batch):
        for i in range(b * views, b * views + anchors_per_sample):
            others = [a for a in range(len(z)) if a != i]
            if mask is None:
                positives, negatives = by_label(others, i, y, sample, positives_cap, views)
            else:
                positives, negatives = by_mask(others, mask[b], sample)
            s = [z[i] @ z[a] / temperature for a in range(len(z))]
            hardness = harder(s, negatives, beta)
            loss, slopes = anchor_loss(
                s, positives, negatives, inside, denominator_mode, epsilon, hardness
            )
            losses[b] += loss / anchors_per_sample
            for a in range(len(z)):
                slope = weights[b] / anchors_per_sample * slopes[a] / temperature
                gradient[i] += slope * z[a]
                gradient[a] += slope * z[i]
    return losses, gradient[:rows].reshape(features.shape)


def by_label(others, i, y, sample, positives_cap, views):
    """`{positive: weight}` and the negatives; the cap keeps the first samples of the class."""
    same = [a for a in others if y[a] == y[i]]
    if positives_cap is not None:
        of_class = sorted({sample[a] for a in same} - {sample[i]})
        kept = [sample[i], *of_class[: positives_cap // views]]
        same_and_kept = [a for a in same if sample[a] in kept]
    else:
        same_and_kept = same
    return dict.fromkeys(same_and_kept, 1.0), [a for a in others if a not in same]


def by_mask(others, weight_of_samples, sample):
    """`{positive: weight}` and the negatives, from the anchor's row of a mask."""
    weight = {a: 0.0 if sample[a] is None else weight_of_samples[sample[a]] for a in others}
    return {a: w for a, w in weight.items() if w > 0}, [a for a in others if weight[a] == 0]


def harder(s, negatives, beta):
    """Weight of each negative: e^(beta s) over the mean of that over the negatives."""
    if not negatives:
        return {}
    log_mean = log_sum_exp(beta * s[n] for n in negatives) - np.log(len(negatives))
    return {n: np.exp(beta * s[n] - log_mean) for n in negatives}


def anchor_loss(s, positives, negatives, inside, denominator_mode, epsilon, hardness):
    """Loss of an anchor with similarities s, and its derivative by each of them.

    0 and 0 without positives, or with nothing in the denominator. The weights of the negatives are
    held still.
    """
    slopes = np.zeros(len(s))
    exponents, log_d = {}, {}
    for p in positives:
        in_denominator = denominator(p, positives, negatives, denominator_mode)
        if not in_denominator:
            return 0.0, slopes
        exponents[p] = {a: s[a] + np.log(hardness.get(a, 1.0)) for a in in_denominator}
        if p in exponents[p]:
            exponents[p][p] -= epsilon
        log_d[p] = log_sum_exp(exponents[p].values())
    if not positives:
        return 0.0, slopes

    total = sum(positives.values())
    log_ratio = {p: s[p] - log_d[p] for p in positives}
    if inside:
        log_sum = log_sum_exp(np.log(w) + log_ratio[p] for p, w in positives.items())
        loss = -(log_sum - np.log(total))
        share = {p: w * np.exp(log_ratio[p] - log_sum) for p, w in positives.items()}
    else:
        loss = -sum(w * log_ratio[p] for p, w in positives.items()) / total
        share = {p: w / total for p, w in positives.items()}

    for p in positives:
        slopes[p] -= share[p]
        for a, exponent in exponents[p].items():
            slopes[a] += share[p] * np.exp(exponent - log_d[p])
    return loss, slopes


def anchor_gradient(z, y, i, temperature, inside):
    """Eq. 4 with Eq. 5: the gradient of the loss of anchor i by z_i, all others held still."""
    others, positives, negatives = index_sets(y, i)
    e = [np.exp(z[i] @ z[a] / temperature) for a in range(len(z))]
    total = sum(e[a] for a in others)
    total_positive = sum(e[p] for p in positives)

    gradient = np.zeros_like(z[i])
    for p in positives:
        x_ip = e[p] / total_positive if inside else 1 / len(positives)
        gradient += z[p] * (e[p] / total - x_ip)
    for n in negatives:
        gradient += z[n] * e[n] / total
    return gradient / temperature


def index_sets(y, i):
    """A(i), P(i), N(i)."""
    others = [a for a in range(len(y)) if a != i]
    positives = [a for a in others if y[a] == y[i]]
    negatives = [a for a in others if y[a] != y[i]]
    return others, positives, negatives


def denominator(p, positives, negatives, denominator_mode):
    """Whose exponentials positive p is divided by."""
    return {
        "all": [*positives, *negatives],
        "one_positive": [p, *negatives],
        "only_negatives": negatives,
    }[denominator_mode]


def log_sum_exp(values):
    """log sum exp, term by term: no term overflows, none is lost to a larger one left out."""
    total = -np.inf
    for value in values:
        total = np.logaddexp(total, value)
    return total
