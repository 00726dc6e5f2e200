"""A network in Flax NNX learns to read handwritten digits, with optax.

    pip install -e ".[examples]"
    python examples/flax_classifier.py

The loss takes the logits as they are: no softmax before it, no one-hot labels. The
images come with scikit-learn.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxsoft


class Network(nnx.Module):
    """Logits of 10 classes for one image or a batch of them."""

    def __init__(self, inputs: int, features: int, classes: int, rngs: nnx.Rngs):
        self.inner = nnx.Linear(inputs, features, rngs=rngs)
        self.last = nnx.Linear(features, classes, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.gelu(self.inner(x)))


def loss_of(model, x, y):
    return jaxsoft.cross_entropy(model(x), y, label_smoothing=0.05, reduction="mean")


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, gradient = nnx.value_and_grad(loss_of)(model, x, y)
    optimizer.update(model, gradient)
    return loss


@nnx.jit
def evaluate(model, x, y):
    """Mean loss in nats, share of right answers, mean entropy of the answers."""
    logits = model(x)
    loss = jaxsoft.cross_entropy(logits, y, reduction="mean")
    accuracy = jnp.mean(jnp.argmax(logits, -1) == y)
    return loss, accuracy, jnp.mean(jaxsoft.entropy(logits))


def main(steps: int, batch: int = 64) -> float:
    images, digits = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        jnp.asarray(images / 16, jnp.float32),
        jnp.asarray(digits, jnp.int32),
        test_size=0.25,
        random_state=0,
    )
    model = Network(x_train.shape[1], 128, 10, nnx.Rngs(0))
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)

    rng = np.random.default_rng(0)
    progress = tqdm(range(steps), unit="step")
    for step in progress:
        rows = rng.integers(0, len(x_train), batch)
        loss = train_step(model, optimizer, x_train[rows], y_train[rows])
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss:.3f}")

    loss, accuracy, entropy = jax.device_get(evaluate(model, x_test, y_test))
    print(f"{len(y_test)} test images: loss {loss:.4f} nats, accuracy {accuracy:.2%}")
    print(f"mean entropy of the answers: {entropy:.4f} nats")
    return float(accuracy)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    main(parser.parse_args().steps)
