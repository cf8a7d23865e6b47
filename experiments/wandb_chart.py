"""Create W&B's custom chart of gains with intervals: `python experiments/wandb_chart.py`. It needs a key.

It reads the columns of the table `gains` in the run `summary`. No training uses it.
"""

import wandb

TITLE = "gain over the previous level, with its 95 % interval"
SPEC = {
    "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
    "data": {"name": "wandb"},
    "encoding": {"y": {"field": "${field:level}", "type": "nominal", "sort": None, "title": None}},
    "layer": [
        {
            "mark": "rule",
            "encoding": {
                "x": {"field": "${field:over_previous_low}", "type": "quantitative", "title": TITLE},
                "x2": {"field": "${field:over_previous_high}"},
            },
        },
        {
            "mark": {"type": "point", "filled": True},
            "encoding": {
                "x": {"field": "${field:over_previous_ratio}", "type": "quantitative"},
                "color": {"field": "${field:over_previous_verdict}", "type": "nominal"},
            },
        },
    ],
}


def main() -> None:
    """Create the chart for the user of the key, and print its name."""
    api = wandb.Api()
    chart = api.create_custom_chart(api.default_entity, "gpt2-ladder-gains", TITLE, "vega2", "private", SPEC)
    print(f"W&B: created the chart {chart}; choose it for a custom chart of the table `gains`")


if __name__ == "__main__":
    main()
