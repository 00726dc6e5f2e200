"""A contrastive loss as in CLIP over two devices: which halves make one image?

    pip install -e ".[examples]"
    python examples/contrastive.py
    python examples/contrastive.py --devices 1

Two networks see the upper and the lower half of handwritten digits, which come with
scikit-learn. In a batch every upper half has one lower half that belongs to it: the
loss is the cross-entropy of that choice, and of the choice the other way round. Each
device holds a part of the batch and has the other parts' vectors sent to it. So its
logits are (batch / devices) x batch, and the labels are indices into the whole batch.
The temperature is learned.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxsoft

BATCH, HIDDEN, FEATURES = 256, 128, 32


def init(seed):
    rng = np.random.default_rng(seed)

    def network():
        return {
            "in": np.float32(rng.normal(0, 32**-0.5, (32, HIDDEN))),
            "out": np.float32(rng.normal(0, HIDDEN**-0.5, (HIDDEN, FEATURES))),
        }

    log_temperature = np.float32(np.log(0.1))
    return {"upper": network(), "lower": network(), "log_temperature": log_temperature}


def vectors(network, x):
    """One of length 1 for each half."""
    v = jax.nn.gelu(x @ network["in"]) @ network["out"]
    return v / jnp.linalg.norm(v, axis=-1, keepdims=True)


def loss_of(params, x):
    """The mean over the whole batch, of which x is this device's part."""
    upper = vectors(params["upper"], x[:, :32])
    lower = vectors(params["lower"], x[:, 32:])
    labels = jax.lax.axis_index("batch") * len(x) + jnp.arange(len(x))
    temperature = jnp.exp(params["log_temperature"])

    def one_way(mine, theirs):
        all_of_theirs = jax.lax.all_gather(theirs, "batch", tiled=True)
        return jaxsoft.cross_entropy(
            mine @ all_of_theirs.T, labels, temperature=temperature, reduction="mean"
        )

    loss = (one_way(upper, lower) + one_way(lower, upper)) / 2
    return jax.lax.pmean(loss, "batch")


def found(params, x):
    """The share of upper halves whose most similar lower half is their own."""
    upper, lower = (
        vectors(params["upper"], x[:, :32]),
        vectors(params["lower"], x[:, 32:]),
    )
    return float(jnp.mean(jnp.argmax(upper @ lower.T, -1) == jnp.arange(len(x))))


def main(steps: int, devices: int) -> tuple[float, float]:
    images = np.float32(load_digits().data / 16)
    x_train, x_test = train_test_split(images, test_size=100, random_state=0)
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(AxisType.Auto,))
    split_loss = jax.shard_map(
        loss_of, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P()
    )
    params = init(seed=0)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state, x):
        loss, gradient = jax.value_and_grad(split_loss)(params, x)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    before = found(params, x_test)
    rng = np.random.default_rng(1)
    losses = []
    progress = tqdm(range(steps), unit="step")
    for _ in progress:
        rows = rng.choice(len(x_train), BATCH, replace=False)
        params, state, loss = train_step(params, state, x_train[rows])
        losses.append(float(loss))
        progress.set_postfix(loss=f"{loss:.3f}")
    after = found(params, x_test)
    print(f"{devices} device(s), {BATCH // devices} x {BATCH} logits on each")
    print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
    print(
        f"lower halves found among 100: {before:.2%} at first, {after:.2%} in the end"
    )
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--devices", type=int, default=2)
    arguments = parser.parse_args()
    # Before JAX starts: the CPU shows itself as several devices.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    main(arguments.steps, arguments.devices)
