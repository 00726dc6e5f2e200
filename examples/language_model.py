"""Instruction tuning of a small transformer whose vocabulary is split over devices.

    pip install -e ".[examples]"
    python examples/language_model.py
    python examples/language_model.py --devices 8

The data are the functions of Python's own standard library: the prompt is a docstring,
the answer is the code. Several pairs are packed into a row. The tokens of prompts are
read and not learned: their label is `ignore_index`, -100, with loss 0 and gradient 0.
No array of tokens x vocabulary exists. With `--devices 8`, eight virtual devices of the
CPU hold an eighth of the word vectors each.
"""

import argparse
import ast
import re
import sysconfig
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

import jaxsoft

VOCABULARY = 8192
UNKNOWN, END_OF_PROMPT, END_OF_ANSWER = 0, 1, 2
IGNORED = -100
FEATURES, ATTENTION_HEADS, LENGTH, BATCH = 64, 4, 160, 3
TOKEN = re.compile(r"\n *| +(?= )| ?\w+| ?[^\w\s]+|\s")


def pairs_of_prompt_and_answer(packages=("asyncio", "email", "http", "json")):
    """(docstring, code without it) of every documented function, as lists of tokens."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(library.glob("*.py"))
    paths += [p for name in packages for p in sorted((library / name).glob("*.py"))]
    pairs = []
    for path in paths:
        source = path.read_text("utf-8")
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                docstring = node.body[0]
                answer = lines[node.lineno - 1 : docstring.lineno - 1]
                answer += lines[docstring.end_lineno : node.end_lineno]
                prompt = ast.get_docstring(node)
                pairs.append((TOKEN.findall(prompt), TOKEN.findall("".join(answer))))
    return pairs


def packed_rows(pairs):
    """Tokens, labels and the number of the pair that each token is from, in rows.

    Labels are the tokens one further on. What a prompt predicts is ignored, and so is
    padding. Pair 0 is padding.
    """
    counts = Counter(token for pair in pairs for part in pair for token in part)
    words = [word for word, _ in counts.most_common(VOCABULARY - 3)]
    index_of = {word: index for index, word in enumerate(words, start=3)}

    rows, row, room = [], [], 0
    for number, (prompt, answer) in enumerate(pairs, start=1):
        tokens = [index_of.get(token, UNKNOWN) for token in prompt]
        prompt_length = len(tokens) + 1
        tokens += [END_OF_PROMPT]
        tokens += [index_of.get(token, UNKNOWN) for token in answer]
        tokens += [END_OF_ANSWER]
        labels = [IGNORED] * (prompt_length - 1) + tokens[prompt_length:] + [IGNORED]
        piece = np.array([tokens, labels, [number] * len(tokens)])[:, :LENGTH]
        if room < piece.shape[1]:
            row, room = np.array([[UNKNOWN], [IGNORED], [0]]).repeat(LENGTH, 1), LENGTH
            rows.append(row)
        start = LENGTH - room
        row[:, start : start + piece.shape[1]] = piece
        room -= piece.shape[1]
    return np.stack(rows, axis=1).astype(np.int32)


def init(seed):
    rng = np.random.default_rng(seed)

    def matrix(rows, columns, scale):
        return np.float32(scale * rng.standard_normal((rows, columns)))

    return {
        "words": matrix(VOCABULARY, FEATURES, 0.02),
        "positions": matrix(LENGTH, FEATURES, 0.02),
        "qkv": matrix(FEATURES, 3 * FEATURES, FEATURES**-0.5),
        "mix": matrix(FEATURES, FEATURES, FEATURES**-0.5),
        "up": matrix(FEATURES, 4 * FEATURES, FEATURES**-0.5),
        "down": matrix(4 * FEATURES, FEATURES, (4 * FEATURES) ** -0.5),
        "last": matrix(FEATURES, FEATURES, FEATURES**-0.5),
    }


def normalised(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def hidden_states(params, tokens, pair):
    """One vector per token, that has seen the tokens of its own pair up to this one."""
    batch, length = tokens.shape
    x = normalised(params["words"][tokens] + params["positions"])
    qkv = (normalised(x) @ params["qkv"]).reshape(batch, length, ATTENTION_HEADS, -1)
    same_pair = pair[:, None, :, None] == pair[:, None, None, :]
    attended = jax.nn.dot_product_attention(
        *jnp.split(qkv, 3, -1), mask=same_pair, is_causal=True
    )
    x = x + attended.reshape(x.shape) @ params["mix"]
    x = x + jax.nn.gelu(normalised(x) @ params["up"]) @ params["down"]
    return normalised(x) @ params["last"]


def main(steps: int, devices: int = 1) -> list[float]:
    mesh = jax.make_mesh((devices,), ("vocab",), axis_types=(AxisType.Auto,))
    head_loss = jaxsoft.linear_cross_entropy
    if devices > 1:
        head_loss = jaxsoft.shard_vocab(head_loss, mesh, "vocab")

    def loss_of(params, tokens, labels, pair):
        hidden = hidden_states(params, tokens, pair)
        return head_loss(
            hidden, params["words"], labels, ignore_index=IGNORED, reduction="mean"
        )

    # The word vectors are split, everything else is on every device.
    params = init(seed=0)
    shardings = {name: NamedSharding(mesh, PartitionSpec()) for name in params}
    shardings["words"] = NamedSharding(mesh, PartitionSpec("vocab"))
    params = jax.device_put(params, shardings)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state, tokens, labels, pair):
        loss, gradient = jax.value_and_grad(loss_of)(params, tokens, labels, pair)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    rows = packed_rows(pairs_of_prompt_and_answer())
    learned = np.mean(rows[1] != IGNORED)
    print(f"{rows.shape[1]} rows of {LENGTH} tokens, {learned:.0%} of them learned")

    rng = np.random.default_rng(1)
    losses = []
    progress = tqdm(range(steps), unit="step")
    for _ in progress:
        tokens, labels, pair = rows[:, rng.integers(0, rows.shape[1], BATCH)]
        params, state, loss = train_step(params, state, tokens, labels, pair)
        losses.append(float(loss))
        progress.set_postfix(loss=f"{loss:.3f}")
    here = len(params["words"].addressable_shards[0].data)
    print(f"{devices} device(s), {here} of {VOCABULARY} words on each")
    print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--devices", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.devices > 1:
        # Before JAX starts: the CPU shows itself as several devices.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    main(arguments.steps, arguments.devices)
