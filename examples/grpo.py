"""A policy learns to add, from rewards alone, by group relative policy optimization.

    pip install -e ".[examples]"
    python examples/grpo.py

The prompt is two numbers below 10, the answer two characters, their sum. For every
prompt a group of answers is drawn, one character after the other: `linear_sample` gives
the character and its log-probability, without the logits. An answer's advantage is its
reward less the mean of its group, over the group's standard deviation. Then two steps
of the clipped loss raise the probability of the better ones, which `linear_log_probs`
gives under the new weights.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxsoft

CHARACTERS, LENGTH, GROUP = 128, 2, 16
FEATURES = 64
START = 0
NUMBERS = np.array([(a, b) for a in range(10) for b in range(10)])
ANSWERS = np.array([[ord(c) for c in f"{a + b:02d}"] for a, b in NUMBERS])


def init(seed):
    rng = np.random.default_rng(seed)

    def matrix(rows, columns, scale):
        return np.float32(rng.normal(0, scale, (rows, columns)))

    return {
        "numbers": matrix(100, FEATURES, 1),
        "previous": matrix(CHARACTERS, FEATURES, 1),
        "inner": matrix(2 * FEATURES, FEATURES, (2 * FEATURES) ** -0.5),
        "characters": matrix(CHARACTERS, FEATURES, 0.02),
    }


def hidden_state(params, prompt, previous):
    """For the next character, given the one before."""
    seen = params["numbers"][prompt], params["previous"][previous]
    return jax.nn.gelu(jnp.concatenate(seen, -1) @ params["inner"])


def draw_answers(params, key, prompt):
    """Characters and their log-probabilities, each (answers, LENGTH)."""

    def draw_next(previous, key):
        hidden = hidden_state(params, prompt, previous)
        of = jaxsoft.linear_sample(key, hidden, params["characters"])
        return of.token, of

    start = jnp.full(prompt.shape, START)
    _, of = jax.lax.scan(draw_next, start, jax.random.split(key, LENGTH))
    return of.token.T, of.log_prob.T


def loss_of(params, prompt, answers, old_log_prob, advantage):
    previous = jnp.pad(answers[:, :-1], ((0, 0), (1, 0)), constant_values=START)
    hidden = hidden_state(params, prompt[:, None].repeat(LENGTH, 1), previous)
    of = jaxsoft.linear_log_probs(hidden, params["characters"], answers)
    ratio = jnp.exp(of.log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 0.8, 1.2)
    gain = jnp.minimum(ratio * advantage, clipped * advantage)
    return -jnp.mean(gain) - 0.003 * jnp.mean(of.entropy)


def main(steps: int) -> tuple[float, float]:
    params = init(seed=0)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 2 * steps))
    state = optimizer.init(params)
    prompt = jnp.arange(len(NUMBERS)).repeat(GROUP)
    right = jnp.asarray(ANSWERS)[prompt]

    @jax.jit
    def train_step(params, state, key):
        answers, log_prob = draw_answers(params, key, prompt)
        reward = jnp.mean(answers == right, 1, dtype=jnp.float32)
        groups = reward.reshape(-1, GROUP)
        deviation = groups - groups.mean(1, keepdims=True)
        advantage = deviation / (groups.std(1, keepdims=True) + 1e-3)
        advantage = advantage.reshape(-1, 1)
        for _ in range(2):
            gradient = jax.grad(loss_of)(params, prompt, answers, log_prob, advantage)
            updates, state = optimizer.update(gradient, state)
            params = optax.apply_updates(params, updates)
        return params, state, reward.mean()

    rewards = []
    progress = tqdm(range(steps), unit="step")
    for key in jax.random.split(jax.random.key(1), steps):
        params, state, reward = train_step(params, state, key)
        rewards.append(float(reward))
        progress.set_postfix(reward=f"{reward:.3f}")
        progress.update()
    progress.close()
    print(f"right characters: {rewards[0]:.2%} at first, {rewards[-1]:.2%} in the end")
    return rewards[0], rewards[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    main(parser.parse_args().steps)
