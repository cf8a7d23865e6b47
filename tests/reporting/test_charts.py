"""Charts, read back as SVG."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from gpt2_ladder.reporting import charts, facts
from helpers.common import REPOSITORY
from helpers.results import RUN, gains

LOSSES = {level: [9.0, 8.0, 7.0] for level in ("fp32", "bf16")}
CHARTS = {
    "ladder": charts.waterfall(facts.ladder_steps(gains())),
    "losses": charts.losses(LOSSES, "speed levels"),
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
    assert [word for word in shown if word in RUN.levels] == RUN.levels
    assert {"1.00 x", "2.00 x", "baseline", "no measurable gain", "faster"} <= set(shown)
    assert "slower" not in shown  # no level was


def test_each_of_16_curves_has_its_own_color_and_dashes():
    curves = {f"level{number}": [9.0, 9.0] for number in range(16)}
    lines = [
        (element.get("stroke"), element.get("stroke-dasharray"))
        for element in ElementTree.fromstring(charts.svg(charts.losses(curves, "coinciding"))).iter()
        if element.get("stroke") in charts.LINES
    ]
    assert len(lines) == 2 * 16  # a curve and its symbol in the legend
    assert len({*lines}) == 16


def test_dvcs_plots_have_the_same_colors_and_dashes():
    encoding = json.loads((REPOSITORY / ".dvc/plots/levels.json").read_text())["spec"]["encoding"]
    assert tuple(encoding["color"]["scale"]["range"]) == charts.LINES
    assert tuple(encoding["strokeDash"]["scale"]["range"]) == charts.DASHES
