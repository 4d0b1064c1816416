"""The picture of a sweep: well-formed, complete, and with nothing outside its frame."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from sweep_toys import resolved, row_of, write_config

from vpipe.report.sweep.chart import draw_chart
from vpipe.report.sweep.sweep import Row

SVG = "{http://www.w3.org/2000/svg}"


def texts(root: ET.Element) -> list[str]:
    return [item.text or "" for item in root.iter(f"{SVG}text")]


def dots(root: ET.Element) -> list[ET.Element]:
    return [item for item in root.iter(f"{SVG}rect") if item.find(f"{SVG}title") is not None]


def test_a_panel_for_each_number_and_a_series_for_each_other_choice(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "batch_size=4,8,12", "recompute_ratio=0,1")
    rows = [row_of(each, 10.0 + index, peak_memory_bytes=index << 20) for index, each in enumerate(combinations)]
    root = ET.fromstring(draw_chart(combinations[0].axes, rows))
    shown = texts(root)
    assert {"samples per second", "peak memory of the largest rank, MiB"} <= set(shown)
    assert "final loss" not in shown
    assert shown.count("batch_size") == 2
    assert {"recompute_ratio=0", "recompute_ratio=1", "4", "8", "12"} <= set(shown)
    assert len(dots(root)) == 12
    tips = [dot.findtext(f"{SVG}title") for dot in dots(root)]
    assert tips[0] == "batch_size=4  recompute_ratio=0: 10"
    assert not any("failed" in text for text in shown)


def test_higher_numbers_are_higher_up(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "batch_size=4,8,12")
    rows = [row_of(each, rate) for each, rate in zip(combinations, [10.0, 30.0, 20.0], strict=True)]
    heights = [float(dot.attrib["y"]) for dot in dots(ET.fromstring(draw_chart(combinations[0].axes, rows)))]
    assert heights[1] < heights[2] < heights[0]
    # The axis starts at 0, so distances from it are in proportion.
    base = heights[0] + (heights[0] - heights[1]) / 2
    assert base - heights[1] == pytest.approx(3 * (base - heights[0]))


def test_failed_combinations_are_crosses(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "plan.partition=uniform,parameters")
    rows = [row_of(combinations[0], 5.0), row_of(combinations[1], error="no")]
    text = draw_chart(combinations[0].axes, rows)
    root = ET.fromstring(text)
    assert "failed: the table says why" in texts(root)
    assert len(dots(root)) == 1
    assert len(list(root.iter(f"{SVG}path"))) == 4  # two crosses of two strokes, one of them in the legend
    assert "partition=parameters" in texts(root)


def test_equal_series_are_all_seen(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "batch_size=4,8", "plan.partition=uniform,[2,3,4],parameters")
    rates = {"4": 10.0, "8": 20.0}
    rows = [row_of(each, rates[each.values[0]]) for each in combinations]
    root = ET.fromstring(draw_chart(combinations[0].axes, rows))
    places = [(dot.attrib["x"], dot.attrib["y"]) for dot in dots(root)]
    assert len(set(places)) == 6
    named = {legend.attrib["stroke"] for legend in root.iter(f"{SVG}path")}
    pieces = [item.attrib["stroke"] for item in root.iter(f"{SVG}path")][:-3]  # the last three are the legend's
    assert {dot.attrib["fill"] for dot in dots(root)} == named == set(pieces)
    assert max(pieces.count(colour) for colour in named) - min(pieces.count(colour) for colour in named) <= 1


def test_one_series_is_named_too(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "batch_size=4,8", "plan.partition=uniform,parameters")
    rows = [row_of(each, 5.0, error="no" if each.values[1] == "uniform" else "") for each in combinations]
    root = ET.fromstring(draw_chart(combinations[0].axes, rows))
    assert "partition=parameters" in texts(root)
    assert "batch_size=4, 8  partition=uniform" in texts(root)


def test_no_line_passes_over_what_failed(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "batch_size=4,8,12,16")
    rows = [row_of(each, 5.0, error="no" if index == 1 else "") for index, each in enumerate(combinations)]
    root = ET.fromstring(draw_chart(combinations[0].axes, rows))
    lines = [item for item in root.iter(f"{SVG}path") if item.attrib["stroke"] != "#5d6b7c"]
    assert len(lines) == 1  # from the third value to the fourth


def test_names_are_not_joined_by_lines(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "plan.partition=uniform,parameters")
    text = draw_chart(combinations[0].axes, [row_of(each, 5.0) for each in combinations])
    assert "<path" not in text


@pytest.mark.parametrize("rates", [[0.0], [1e-9, 1e9], [5.0] * 30, []])
def test_everything_is_inside_the_frame(tmp_path: Path, rates: list[float]) -> None:
    values = ",".join(str(number) for number in range(max(1, len(rates))))
    combinations = resolved(write_config(tmp_path), f"seed={values}", "plan.partition=uniform,[2,3,4],parameters")
    rows: list[Row] = []
    for index, each in enumerate(combinations[: 3 * len(rates)]):
        rows.append(row_of(each, rates[index // 3], final_loss=7.25))
    root = ET.fromstring(draw_chart(combinations[0].axes, rows))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for item in root.iter():
        for name, limit in (("x", width), ("y", height)):
            if name in item.attrib:
                assert 0 <= float(item.attrib[name]) <= limit
        for pair in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", item.attrib.get("d", "")):
            assert 0 <= float(pair[0]) <= width
            assert 0 <= float(pair[1]) <= height


def test_words_of_the_user_are_escaped(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "data.data_dir=<a&b>,c", "seed=0,1")
    ET.fromstring(draw_chart(combinations[0].axes, [row_of(each, 5.0) for each in combinations]))
