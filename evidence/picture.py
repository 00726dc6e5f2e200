"""The picture of README: python -m evidence.picture.

The error of the loss and of its gradient at the label, for two classes of which the right
one leads by a gap of 0.25 to 80 nats.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxsoft

OUTPUT = Path(__file__).parent.parent / "docs" / "_static" / "sure_model.png"
GAPS = np.geomspace(0.25, 80, 110).astype(np.float32)
SMALLEST_SHOWN = 1e-9
ROUNDING = 2.0**-24


def with_jax_nn(logits, label):
    return -jax.nn.log_softmax(logits)[label]


# The colours are those of Okabe and Ito, which colour-blind people tell apart.
LIBRARIES = {
    "optax": (
        optax.softmax_cross_entropy_with_integer_labels,
        {"marker": "s", "color": "#E69F00", "markersize": 7, "fillstyle": "none"},
    ),
    "jax.nn": (with_jax_nn, {"marker": "x", "color": "black", "markersize": 4}),
    "jaxsoft": (
        jaxsoft.cross_entropy,
        {"marker": "o", "color": "#0072B2", "markersize": 4},
    ),
}


def errors(loss):
    """Relative errors of the loss and of its gradient at the label, for every gap."""
    logits = jnp.stack([GAPS, np.zeros_like(GAPS)], axis=1)
    both = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(0, None)))
    values, gradients = both(logits, 0)
    gaps = GAPS.astype(np.float64)
    exact = np.log1p(np.exp(-gaps)), -1 / (1 + np.exp(gaps))
    computed = values, gradients[:, 0]
    return [np.abs(np.float64(v) / e - 1) for v, e in zip(computed, exact, strict=True)]


def draw() -> plt.Figure:
    figure, axes = plt.subplots(
        1, 2, figsize=(9.5, 3.7), layout="constrained", sharex=True, sharey=True
    )
    for name, (loss, style) in LIBRARIES.items():
        for ax, error in zip(axes, errors(loss), strict=True):
            shown = np.maximum(error, SMALLEST_SHOWN)
            ax.loglog(GAPS, shown, linestyle="none", label=name, **style)
    for ax, title in zip(axes, ("loss", "gradient at the label"), strict=True):
        ax.axhline(ROUNDING, color="black", linestyle="--", linewidth=1)
        ax.set_title(title)
        ax.set_xlabel("lead of the right class over the other (nats)")
        ax.set_xticks([0.3, 1, 3, 10, 30, 80], ["0.3", "1", "3", "10", "30", "80"])
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("relative error")
    axes[0].text(80, 1.6 * ROUNDING, "rounding of float32", ha="right", fontsize=9)
    axes[0].text(0.25, 1, "no digit is right: 1", va="center", fontsize=9)
    axes[0].legend(loc="center left")
    return figure


def main() -> None:
    draw().savefig(OUTPUT, dpi=110)
    print(f"written to {OUTPUT}")


if __name__ == "__main__":
    main()
