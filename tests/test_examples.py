"""The training scripts run as a user starts them, and learn."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxsoft

EXAMPLES = Path(__file__).parent.parent / "examples"
PACKAGE_FOLDER = Path(jaxsoft.__file__).parent.parent

IMPORTED = ("equinox", "flax", "optax", "sklearn", "tqdm")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.exists(), reason="not in a checkout"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(module) is None for module in IMPORTED),
        reason="needs jaxsoft[examples]",
    ),
]


def run(script: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *options],
        env=os.environ | {"PYTHONPATH": str(PACKAGE_FOLDER), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "step/s" in done.stderr, "a progress bar"
    return done.stdout


def percentages(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def test_flax_classifier():
    """As printed in the end, 98 %; here after a tenth of the steps."""
    (accuracy,) = percentages(run("flax_classifier.py", "--steps", "150"))
    assert accuracy > 90


def test_equinox_classifier():
    """Class weights bring back the rare classes: 20 points and more."""
    plain, weighted = percentages(run("equinox_classifier.py"))
    assert weighted > plain + 10
    assert weighted > 85


def losses(text: str) -> tuple[float, float]:
    (pair,) = re.findall(r"loss ([\d.]+) at the first step, ([\d.]+) at the last", text)
    return float(pair[0]), float(pair[1])


def test_language_model():
    """With the vocabulary on 8 devices the losses are those of one."""
    steps = ("--steps", "12")
    on_one = run("language_model.py", *steps)
    on_eight = run("language_model.py", *steps, "--devices", "8")
    assert "8 device(s), 1024 of 8192 words on each" in on_eight
    first, last = losses(on_one)
    assert abs(first - 9.01) < 0.1  # log 8192: nothing is known yet
    assert last < first - 1
    # Sums over devices are rounded in another order, and training amplifies it.
    assert losses(on_eight) == pytest.approx((first, last), rel=1e-3)


def test_graph_attention():
    """Fifty labels among 1797 images; in the end 93 %."""
    before, after = percentages(run("graph_attention.py"))
    assert before < 30
    assert after > 85


def test_grpo():
    """One character in 128 is right by chance, and nearly all in the end."""
    before, after = percentages(run("grpo.py"))
    assert before < 3
    assert after > 75


def test_contrastive():
    """The loss of 128 x 256 logits on each of two devices is that of one device."""
    on_two = run("contrastive.py")
    before, after = percentages(on_two)
    assert before < 10
    assert after > 35
    assert "2 device(s), 128 x 256 logits on each" in on_two
    steps = ("--steps", "5")
    first, last = losses(run("contrastive.py", *steps))
    assert abs(first - 5.8) < 0.3  # above log 256 = 5.55
    on_one = run("contrastive.py", *steps, "--devices", "1")
    assert losses(on_one) == pytest.approx((first, last), rel=1e-4)
