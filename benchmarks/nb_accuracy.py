"""How right is the negative binomial of vampsc, of scvi-tools and of TensorFlow Probability in
float32?

    python benchmarks/nb_accuracy.py
        in an environment with benchmarks/requirements.txt; writes nb_accuracy.csv

Values and gradients by log mu and log theta at 2,601 points: x from 0 to 1e5, mu and theta from
1e-6 to 1e8, e^-30 and e^30, against mpmath with 50 digits at the very float32 numbers that were
handed in.
"""

# before TensorFlow: both bring an LLVM, and only in this order do they get along
# isort: off
from scvi.distributions import NegativeBinomial
# isort: on

import sys
from importlib.metadata import version
from pathlib import Path

import mpmath
import numpy as np
import pandas as pd
import tensorflow as tf
import tensorflow_probability as tfp
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from vampsc.likelihood import nb_log_prob  # noqa: E402

LOGS = np.r_[np.log(10.0) * np.arange(-6, 9), -30, 30]
GRID = [
    v.ravel().astype("float32")
    for v in np.meshgrid([0, 1, 2, 3, 10, 100, 1e3, 1e4, 1e5], LOGS, LOGS, indexing="ij")
]


def exact(x, m, r):
    "log NB and its derivatives by log mu and log theta."
    with mpmath.workdps(50):
        x, m, r = (mpmath.mpf(float(v)) for v in (x, m, r))
        mu = mpmath.exp(m)
        theta = mpmath.exp(r)
        log_sum = mpmath.log(mu + theta)
        value = (
            mpmath.loggamma(x + theta)
            - mpmath.loggamma(theta)
            - mpmath.loggamma(x + 1)
            + x * (m - log_sum)
            + theta * (r - log_sum)
        )
        by_theta = (
            mpmath.digamma(x + theta)
            - mpmath.digamma(theta)
            + r
            - log_sum
            + 1
            - (x + theta) / (mu + theta)
        )
        return float(value), float(theta * (x - mu) / (mu + theta)), float(theta * by_theta)


def by_torch(log_prob):
    x, m, r = (torch.tensor(v) for v in GRID)
    m.requires_grad_(), r.requires_grad_()
    value = log_prob(x, m, r)
    value.sum().backward()
    return value.detach().numpy(), m.grad.numpy(), r.grad.numpy()


def by_tensorflow(log_prob):
    x, m, r = (tf.constant(v) for v in GRID)
    with tf.GradientTape() as tape:
        tape.watch([m, r])
        value = log_prob(x, m, r)
    return value.numpy(), *(g.numpy() for g in tape.gradient(value, [m, r]))


def plain(x, m, r):
    mu = m.exp()
    theta = r.exp()
    return (
        torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
        + x * torch.log(mu / (mu + theta))
        + theta * torch.log(theta / (mu + theta))
    )


def judge(value, by_m, by_r, truth):
    """Worst errors and how many of the points are off by more than the tolerance, or are not
    numbers at all.
    """
    x, (true, *true_gradients) = GRID[0], truth.T
    error = np.abs(value.astype("float64") - true) / np.maximum(1, np.abs(true))
    wrong = ~(error <= np.where(x <= 1e3, 1e-4, 1e-3))
    off = [
        ~(np.abs(g - t) <= np.maximum(1e-3 * np.abs(t), 1e-5))
        for g, t in zip((by_m, by_r), true_gradients)
    ]
    return {
        "worst error, x <= 1e3": np.nanmax(error[x <= 1e3]),
        "worst error, x > 1e3": np.nanmax(error[x > 1e3]),
        "values off": wrong.mean(),
        "gradients off": (off[0] | off[1]).mean(),
        "NaN or infinite": (~np.isfinite(value) | ~np.isfinite(by_m) | ~np.isfinite(by_r)).mean(),
    }


def main():
    truth = np.array([exact(*point) for point in zip(*GRID)])
    found = {
        "vampsc": by_tensorflow(nb_log_prob),
        "lgamma as it stands": by_torch(plain),
        f"scvi-tools {version('scvi-tools')}": by_torch(
            lambda x, m, r: NegativeBinomial(
                mu=m.exp(), theta=r.exp(), validate_args=False
            ).log_prob(x)
        ),
        f"TensorFlow Probability {version('tensorflow-probability')}": by_tensorflow(
            lambda x, m, r: tfp.distributions.NegativeBinomial(
                total_count=tf.exp(r), logits=m - r
            ).log_prob(x)
        ),
    }
    table = pd.DataFrame({name: judge(*parts, truth) for name, parts in found.items()}).T
    table.to_csv(HERE / "nb_accuracy.csv", index_label="implementation", float_format="%.3g")
    print(table.to_string(float_format="%.3g"))


if __name__ == "__main__":
    main()
