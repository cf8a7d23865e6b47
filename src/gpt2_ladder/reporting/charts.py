"""Draw the report's charts with altair, and save them as PNG or SVG with vl-convert, without using the network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from gpt2_ladder import files

# the colors also differ in lightness, for readers who cannot distinguish red from green
COLORS = {"baseline": "#4c78a8", "faster": "#2e8540", "slower": "#d1495b", "no measurable gain": "#b8b8b8"}
# colors and dashes make coinciding curves visible. Colors from Tol 2012, "Colour schemes", similar ones far apart
LINES = (
    *("#332288", "#cc6677", "#44aa99", "#882255", "#88ccee", "#117733"),
    *("#ddcc77", "#6699cc", "#661100", "#aa4499", "#999933", "#aa4466"),
)
DASHES = ([1, 0], [9, 3], [3, 3], [9, 3, 3, 3], [6, 6])
WIDTH = 330


def waterfall(rows: Sequence[Mapping[str, Any]]) -> alt.LayerChart:
    """Draw how each level changes tokens/s, from `start` to `end`, as facts.ladder_steps computes it."""
    order = [row["level"] for row in rows]
    base = alt.Chart(alt.Data(values=list(rows))).encode(alt.Y("level:N", title=None, sort=order))
    verdicts = [verdict for verdict in COLORS if any(row["verdict"] == verdict for row in rows)]
    colors = alt.Scale(domain=verdicts, range=[COLORS[verdict] for verdict in verdicts])
    title = "tokens/s, with the 95 % interval of the gain over the baseline"
    room_for_labels = alt.Scale(domain=[0, 1.35 * max(row["high"] for row in rows)], nice=False)
    bars = base.mark_bar(height=16).encode(
        alt.X("start:Q", title=title, scale=room_for_labels, axis=alt.Axis(tickCount=5)),
        alt.X2("end:Q"),
        alt.Color("verdict:N", scale=colors, legend=alt.Legend(title=None, orient="bottom")),
    )
    ends = base.mark_tick(thickness=2, size=20, color="black").encode(alt.X("end:Q"))
    intervals = base.mark_rule(color="black").encode(alt.X("low:Q"), alt.X2("high:Q"))
    right_ends = base.transform_calculate(right="max(datum.start, datum.high)")
    labels = right_ends.mark_text(align="left", dx=8, fontSize=12).encode(alt.X("right:Q"), alt.Text("label:N"))
    return (bars + ends + intervals + labels).properties(width=WIDTH + 60, height=alt.Step(30))


def losses(curves: Mapping[str, Sequence[float]], title: str, y_title: str = "training loss in nats") -> alt.Chart:
    """Draw the losses of each level as a line; `curves` has the losses of all steps by level, perhaps none."""
    order = [level for level, curve in curves.items() if curve]
    rows = [{"level": level, "step": step, "loss": loss} for level in order for step, loss in enumerate(curves[level])]
    legend = alt.Legend(title=None, symbolSize=900)  # long enough to show the dashes
    chart = alt.Chart(alt.Data(values=rows), title=title, width=WIDTH, height=240)
    return chart.mark_line().encode(
        alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1)),
        alt.Y("loss:Q", title=y_title, scale=alt.Scale(zero=False)),
        alt.Color("level:N", legend=legend, sort=order, scale=alt.Scale(domain=order, range=LINES)),
        alt.StrokeDash("level:N", legend=legend, sort=order, scale=alt.Scale(domain=order, range=DASHES)),
    )


def save_png(chart: alt.TopLevelMixin, path: Path) -> None:
    """Save `chart` as a PNG with doubled width and height, for high-resolution screens."""
    files.write(path, vl_convert.vegalite_to_png(_styled(chart), scale=2))


def svg(chart: alt.TopLevelMixin) -> str:
    """Return `chart` as an SVG element."""
    return vl_convert.vegalite_to_svg(_styled(chart))


def _styled(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """Return the chart's Vega-Lite specification with the style that all charts share."""
    axis = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
    legend = {"labelFontSize": 12, "symbolStrokeWidth": 2}
    config = {"axis": axis, "legend": legend, "title": {"fontSize": 13}, "view": {"stroke": "#ddd"}}
    return {**chart.to_dict(), "config": config}
