"""A network in Equinox learns digits from few, unequal and partly missing labels.

    pip install -e ".[examples]"
    python examples/equinox_classifier.py

The digits 5 to 9 are ten times rarer than 0 to 4 in the training set, and every third
label is missing. `class_weight` makes up for the first; `ignore_index`, -100, marks the
second: such a row has loss 0 and gradient exactly 0, so batches keep their shape. The
mean divides by the weights that were counted. The images come with scikit-learn.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxsoft

CLASSES = 10
NO_LABEL = -100


def unequal_data(rng):
    """Training images with rare classes and missing labels; test images as they are."""
    images, digits = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (images / 16).astype(np.float32),
        digits.astype(np.int32),
        test_size=0.25,
        random_state=0,
        stratify=digits,
    )
    kept = (y_train < 5) | (rng.random(len(y_train)) < 0.1)
    x_train, y_train = x_train[kept], y_train[kept]
    y_train[rng.random(len(y_train)) < 1 / 3] = NO_LABEL
    return x_train, x_test, y_train, y_test


def loss_of(model, x, y, class_weight):
    logits = jax.vmap(model)(x)
    return jaxsoft.cross_entropy(
        logits, y, class_weight=class_weight, ignore_index=NO_LABEL, reduction="mean"
    )


def train(data, class_weight, steps, batch=64):
    x_train, x_test, y_train, y_test = data
    model = eqx.nn.MLP(64, CLASSES, 128, 1, jax.nn.gelu, key=jax.random.key(0))
    optimizer = optax.adamw(1e-3, weight_decay=1e-2)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def train_step(model, state, x, y):
        loss, gradient = eqx.filter_value_and_grad(loss_of)(model, x, y, class_weight)
        arrays = eqx.filter(model, eqx.is_array)
        updates, state = optimizer.update(gradient, state, arrays)
        return eqx.apply_updates(model, updates), state, loss

    rng = np.random.default_rng(1)
    progress = tqdm(range(steps), unit="step")
    for step in progress:
        rows = rng.integers(0, len(x_train), batch)
        model, state, loss = train_step(model, state, x_train[rows], y_train[rows])
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss:.3f}")
    answers = np.asarray(jnp.argmax(jax.vmap(model)(x_test), -1))
    return balanced_accuracy_score(y_test, answers)


def main(steps: int) -> tuple[float, float]:
    data = unequal_data(np.random.default_rng(0))
    labels = data[2]
    counts = np.bincount(labels[labels != NO_LABEL], minlength=CLASSES)
    print(f"labels of each digit: {counts}, missing: {np.sum(labels == NO_LABEL)}")

    inverse_frequency = counts.sum() / (CLASSES * np.maximum(counts, 1))
    plain = train(data, None, steps)
    weighted = train(data, jnp.asarray(inverse_frequency, jnp.float32), steps)
    print(f"balanced accuracy without class weights: {plain:.2%}")
    print(f"balanced accuracy with class weights:    {weighted:.2%}")
    return plain, weighted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
