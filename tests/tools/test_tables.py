from __future__ import annotations

import math

import numpy as np

from pgl_ext.tools.tables import Estimate, Table, method_colors, plot_estimates


def test_picture_shows_values_intervals_and_cases(tmp_path):
    estimates = [
        Estimate("Dice", "liver", "B", 0.1, 0.05, 0.2, (0.0, math.nan, 0.2)),
        Estimate("Dice", "liver", "C", math.nan, math.nan, math.nan),
        Estimate("Dice", "spleen", "B", 0.3, 0.2, 0.4),
        Estimate("HD95", "liver", "C", -1.0, -2.0, 0.5),
    ]
    figure = plot_estimates(estimates, method_colors(["A", "B", "C"], "A"), tmp_path / "a.png", lines=True)
    dice, hd95 = figure.axes
    assert (dice.get_ylabel(), hd95.get_ylabel()) == ("Dice", "HD95")
    assert [text.get_text() for text in hd95.get_xticklabels()] == ["liver", "spleen"]
    lines = {line.get_label(): line for line in dice.lines}
    assert list(lines["B"].get_ydata()) == [0.1, 0.3]
    assert lines["B"].get_linestyle() == "-"
    assert lines["B"].get_color() != lines["C"].get_color()
    segments = [one.get_segments() for one in dice.collections if hasattr(one, "get_segments")]
    assert [segment[:, 1].tolist() for segment in segments[0]] == [[0.05, 0.2], [0.2, 0.4]]
    points = [one.get_offsets()[:, 1].tolist() for one in dice.collections if len(one.get_offsets()) > 1]
    assert points == [[0.0, 0.2]]
    assert list({line.get_label(): line for line in hd95.lines}["C"].get_ydata()) == [-1.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["B", "C"]
    assert (tmp_path / "a.png").stat().st_size > 5000
    (axes,) = plot_estimates(estimates[2:3], {"B": "red"}, tmp_path / "b.png", differences=False).axes
    assert [(line.get_label(), line.get_linestyle()) for line in axes.lines] == [("B", "None")]  # and none at 0


def test_many_methods_have_colours_of_their_own():
    methods = [f"method {number}" for number in range(16)]
    assert len({tuple(np.ravel(color)) for color in method_colors(methods, "method 3").values()}) == 16


def test_a_table_in_text_and_markdown():
    table = Table("Dice", ["organ", "A"], [["liver", "0.5"], ["average", "0.75"]])
    assert table.text().splitlines() == ["organ       A", "-------------", "liver     0.5", "average  0.75"]
    assert table.markdown() == "### Dice\n\n| organ | A |\n| --- | ---: |\n| liver | 0.5 |\n| average | 0.75 |"
