"""A graph attention network reads handwritten digits, of which it is told few.

    pip install -e ".[examples]"
    python examples/graph_attention.py

The images come with scikit-learn. Each is a node, with edges to it from the images that
look most like it, and five of each digit are labelled. Every other node has the label
`ignore_index`, -100, with loss 0. A node attends to its neighbours by `segment_softmax`
over the edges that lead to it: no padding, no matrix of nodes x nodes.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from tqdm import tqdm

import jaxsoft

CLASSES, NEIGHBOURS, LABELLED, FEATURES, HEADS = 10, 8, 5, 16, 4
NO_LABEL = -100


def graph_of_digits(rng):
    """(images, digits, labels, edges); edges are (from, to), by the second."""
    images, digits = load_digits(return_X_y=True)
    x = (images / 16).astype(np.float32)
    graph = kneighbors_graph(x, NEIGHBOURS, include_self=True).tocoo()
    edges = np.stack([graph.col, graph.row]).astype(np.int32)
    labels = np.full(len(x), NO_LABEL, np.int32)
    for digit in range(CLASSES):
        known = rng.choice(np.flatnonzero(digits == digit), LABELLED, replace=False)
        labels[known] = digit
    return x, digits, labels, edges[:, np.argsort(edges[1], kind="stable")]


def init(seed):
    rng = np.random.default_rng(seed)

    def layer(inputs, features):
        return {
            "weight": rng.normal(0, inputs**-0.5, (inputs, HEADS, features)),
            "of_source": rng.normal(0, features**-0.5, (HEADS, features)),
            "of_target": rng.normal(0, features**-0.5, (HEADS, features)),
        }

    params = [layer(64, FEATURES), layer(HEADS * FEATURES, CLASSES)]
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)


def attend(layer, x, edges):
    """(nodes, HEADS, features): of every node, the mean of its neighbours, weighted."""
    source, target = edges
    h = jnp.einsum("nd,dhf->nhf", x, layer["weight"])
    score = jnp.sum(h * layer["of_source"], -1)[source]
    score += jnp.sum(h * layer["of_target"], -1)[target]
    attention = jaxsoft.segment_softmax(
        jax.nn.leaky_relu(score, 0.2), target, len(x), indices_are_sorted=True
    )
    weighted = attention[..., None] * h[source]
    return jax.ops.segment_sum(weighted, target, len(x), indices_are_sorted=True)


def logits_of(params, x, edges):
    hidden = attend(params[0], x, edges).reshape(len(x), -1)
    return jnp.mean(attend(params[1], jax.nn.elu(hidden), edges), 1)


def main(steps: int) -> tuple[float, float]:
    x, digits, labels, edges = graph_of_digits(np.random.default_rng(0))
    unknown = labels == NO_LABEL
    print(f"{len(x)} images, {np.sum(~unknown)} labelled, {edges.shape[1]} edges")
    params = init(seed=0)
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, steps), weight_decay=1e-3)
    state = optimizer.init(params)

    def loss_of(params):
        logits = logits_of(params, x, edges)
        return jaxsoft.cross_entropy(
            logits, labels, ignore_index=NO_LABEL, reduction="mean"
        )

    @jax.jit
    def train_step(params, state):
        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    def accuracy(params):
        answers = np.argmax(logits_of(params, x, edges), -1)
        return np.mean(answers[unknown] == digits[unknown])

    before = accuracy(params)
    progress = tqdm(range(steps), unit="step")
    for step in progress:
        params, state, loss = train_step(params, state)
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss:.3f}")
    after = accuracy(params)
    print(f"accuracy on the others: {before:.2%} at first, {after:.2%} in the end")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
