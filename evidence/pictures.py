"""The pictures of README and the site: python -m evidence.pictures."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxsoft

PICTURES = Path(__file__).parent.parent / "docs" / "_static"
GAPS = np.geomspace(0.25, 80, 110).astype(np.float32)
SMALLEST_SHOWN = 1e-9
ROUNDING = 2.0**-24


def with_jax_nn(logits, label):
    return -jax.nn.log_softmax(logits)[label]


# The colours are those of Okabe and Ito, which colour-blind people tell apart.
BLUE, ORANGE = "#0072B2", "#E69F00"
LIBRARIES = {
    "optax": (
        optax.softmax_cross_entropy_with_integer_labels,
        {"marker": "s", "color": ORANGE, "markersize": 7, "fillstyle": "none"},
    ),
    "jax.nn": (with_jax_nn, {"marker": "x", "color": "black", "markersize": 4}),
    "jaxsoft": (
        jaxsoft.cross_entropy,
        {"marker": "o", "color": BLUE, "markersize": 4},
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


def draw_sure_model() -> plt.Figure:
    """Errors of a loss over the lead of the right one of two classes."""
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


TOKENS = ("The", "cat", "sat", "[pad]")
LABELS = (1, 0, 2, -100)
WORDS = ("sat", "cat", "on", "[unused]")


def draw_masks() -> plt.Figure:
    """What each of the three masks takes away from a grid of logits."""
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.3), layout="constrained")
    counts = np.ones((3, len(TOKENS), len(WORDS)))
    counts[0, :, 3] = 0
    counts[1] *= np.array([0.0, 1.0, 0.5, 1.0])[:, None]
    counts[2, 3] = 0
    weights = [f"{TOKENS[i]}: {w}" for i, w in enumerate((0, 1, 0.5, 1))]
    labels = [f"{token}: {y}" for token, y in zip(TOKENS, LABELS, strict=True)]
    for ax, count, rows, title in (
        (axes[0], counts[0], TOKENS, "where: classes that exist"),
        (axes[1], counts[1], weights, "sample_weight: what a token weighs"),
        (axes[2], counts[2], labels, "ignore_index: tokens by their label"),
    ):
        ax.imshow(count, cmap="Blues", vmin=0, vmax=1.8, aspect="auto")
        for row, column in np.ndindex(count.shape):
            text = {0.0: "out", 0.5: "half"}.get(count[row, column], "in")
            ax.text(column, row, text, ha="center", va="center", fontsize=9)
        ax.set_xticks(range(len(WORDS)), WORDS, fontsize=9)
        ax.set_yticks(range(len(rows)), rows, fontsize=9)
        ax.set_xticks(np.arange(len(WORDS) - 1) + 0.5, minor=True)
        ax.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=2)
        ax.tick_params(which="both", length=0)
        ax.set_xlabel("class")
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("token")
    return figure


def main() -> None:
    for name, draw in (("sure_model", draw_sure_model), ("masks", draw_masks)):
        draw().savefig(PICTURES / f"{name}.png", dpi=110)
        print(f"written to {PICTURES / name}.png")


if __name__ == "__main__":
    main()
