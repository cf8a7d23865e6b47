"""Reported numbers equal those computed by hand."""

import pytest

from gpt2_ladder.training import metrics
from gpt2_ladder.training.metrics import Step

STEPS = [
    Step(index, 0.0, step_ms, 0.0, 1.0, 4, 0.0) for index, step_ms in enumerate([9000.0, 500.0, 100.0, 300.0, 200.0])
]


def test_the_median_excludes_the_warm_up():
    assert metrics.median_step_ms(STEPS, warmup_steps=2) == 200
    assert metrics.median_step_ms(STEPS, warmup_steps=1) == 250


def test_tokens_per_second_is_tokens_over_seconds():
    assert metrics.tokens_per_second(512, 250.0) == pytest.approx(2048)


def test_compilation_is_the_extra_time_of_the_first_step():
    assert metrics.compile_seconds(STEPS, warmup_steps=2) == pytest.approx(8.8)
    assert metrics.compile_seconds(STEPS[2:3] + STEPS[3:4], warmup_steps=1) == 0


def test_bits_per_byte_do_not_depend_on_the_vocabulary():
    # a uniform guess over 256 one-byte tokens: ln(256) nats, 8 bits
    assert metrics.bits_per_byte(5.545177444479562, tokens=10, text_bytes=10) == pytest.approx(8)
    # the same guess for the same text with two bytes a token
    assert metrics.bits_per_byte(2 * 5.545177444479562, tokens=5, text_bytes=10) == pytest.approx(8)
