"""Charts, read back as SVG."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from gpt2_ladder.reporting import charts

FIELDS = ("level", "start", "end", "low", "high", "verdict", "label")
STEPS = [
    dict(zip(FIELDS, row, strict=True))
    for row in (
        ("fp32", 0, 100.0, 100.0, 100.0, "baseline", ""),
        ("tf32", 100.0, 101.0, 97.0, 104.0, "no measurable gain", "1.01 x"),
        ("bf16", 101.0, 190.0, 180.0, 200.0, "faster", "1.88 x"),
    )
]
LOSSES = [{"level": level, "step": step, "loss": 9.0 - step} for level in ("fp32", "bf16") for step in range(3)]
CHARTS = {
    "ladder": charts.waterfall(STEPS),
    "losses": charts.losses(LOSSES, "speed levels"),
    "memory": charts.memory({"fp32": 3000.0, "bf16": 2500.0}),
}


def words(svg: str) -> list[str]:
    elements = ElementTree.fromstring(svg).iter()
    return [element.text for element in elements if element.tag.endswith("text") and element.text]


@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_drawn_without_a_network(name, tmp_path):
    charts.save_png(CHARTS[name], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search(r'(src|href)="http', charts.svg(CHARTS[name]))


def test_the_waterfall_shows_levels_in_order_with_gains_and_verdicts():
    shown = words(charts.svg(CHARTS["ladder"]))
    assert [word for word in shown if word in ("fp32", "tf32", "bf16")] == ["fp32", "tf32", "bf16"]
    assert {"1.01 x", "1.88 x", "baseline", "no measurable gain", "faster"} <= set(shown)
    assert "slower" not in shown  # no level was
