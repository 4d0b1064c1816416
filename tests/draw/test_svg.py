from __future__ import annotations

from itertools import combinations
from math import dist
from xml.etree import ElementTree

import pytest

from vpipe.draw.palette import COLOURS, MOVE_COLOURS
from vpipe.draw.shapes import ink_on, lighten, text_width
from vpipe.draw.svg import _UPPER_STAGE, to_svg
from vpipe.schedule.action import Kind
from vpipe.schedule.passes.offload import insert_offloads
from vpipe.schedule.passes.version_moves import insert_version_moves
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import Simulation, simulate

SVG = "{http://www.w3.org/2000/svg}"


def _draw(*names: str, p: int = 4, m: int = 8) -> ElementTree.Element:
    return ElementTree.fromstring(
        to_svg([simulate(build_schedule(name, p, m)) for name in names], ["It."] * len(names))
    )


def _cells(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Return the cells by what their tip begins with: ``2F0, 3 to 4``."""
    found = {}
    for rect in root.iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None and title.text:
            found[title.text.replace(",", " ").split()[0]] = rect
    return found


def _texts(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_has_a_cell_in_the_colour_of_its_kind(name: str) -> None:
    schedule = build_schedule(name, 4, 8)
    cells = _cells(_draw(name))
    assert set(cells) == {str(action) for order in schedule.orders for action in order}
    for order in schedule.orders:
        for action in order:
            if action.stage < 4:  # the first stage of its rank; later ones are paler
                assert cells[str(action)].get("fill") == COLOURS[action.kind]


def test_cells_are_where_and_as_long_as_their_actions() -> None:
    cells = _cells(_draw("1f1b"))
    left, width = (float(cells["0F0"].get(key, "")) for key in ("x", "width"))
    later = float(cells["0F2"].get("x", ""))
    assert later - left == pytest.approx(2 * (width + 1), abs=0.1)  # a gap of 1 between neighbours
    assert float(cells["0B0"].get("width", "")) == pytest.approx(2 * (width + 1) - 1, abs=0.1)
    assert float(cells["3F0"].get("y", "")) > float(cells["2F0"].get("y", ""))


def test_the_title_has_the_numbers_and_phases_and_legend_are_there() -> None:
    texts = _texts(_draw("1f1b"))
    assert texts[0] == "1f1bIt."
    assert texts[1] == "4 ranks  ·  8 microbatches  ·  makespan 33  ·  bubble 27.3%  ·  at most 4 microbatches held"
    for word in ("warmup", "steady", "cooldown", "forward", "backward", "update", "idle", "4 held", "1 held"):
        assert word in texts
    assert "input gradient" not in texts
    assert "paler: later stage of the rank" in _texts(_draw("zb-v"))


def test_asynchronous_schedules_show_their_weight_versions() -> None:
    texts = _texts(_draw("pipedream"))
    assert "4 held, 4 kept" in texts
    assert "microbatches held, weight versions kept (dashed)" in texts
    assert not any("kept" in text for text in _texts(_draw("1f1b")))


def test_options_that_change_the_picture_are_named() -> None:
    vertical = simulate(build_schedule("pipedream", 4, 8, vertical_sync=True))
    assert _texts(ElementTree.fromstring(to_svg([vertical])))[0] == "pipedream, vertical sync"
    schedule = build_schedule("naive", 4, 8)
    costs = Costs.from_rank_shares(schedule.placement, latency=0.5, bandwidth=4.0, message_bytes=1.0)
    line = _texts(ElementTree.fromstring(to_svg([simulate(schedule, costs)])))[1]
    assert line.endswith("at most 1 microbatch held  ·  messages take 0.75")


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_legend_stays_on_the_page_and_names_only_what_occurs(name: str) -> None:
    root = _draw(name)
    width = float(root.get("width", ""))
    for element in root.iter(f"{SVG}text"):
        words = "".join(element.itertext())
        assert float(element.get("x", "")) + text_width(words, 12) < width or element.get("text-anchor"), words
    assert ("warmup" in _texts(root)) == (name != "naive")


def test_long_schedules_get_narrower_cells_before_they_get_wider_pages() -> None:
    widths = {name: float(_draw(name).get("width", "")) for name in ("1f1b", "zb-v", "naive")}
    assert widths["1f1b"] < widths["zb-v"] < widths["naive"] < 1200
    numbers = [element for element in _draw("naive").iter(f"{SVG}text") if element.text == "7"]
    assert len(numbers) == 8  # every cell still has its number
    assert {element.get("font-size") for element in numbers} == {"12"}


def test_several_schedules_share_one_scale() -> None:
    root = ElementTree.fromstring(to_svg([simulate(build_schedule(name, 4, 8)) for name in ("1f1b", "zb-v")]))
    widths = [float(rect.get("width", "")) for rect in root.iter(f"{SVG}rect") if rect.get("fill") == "url(#idle)"]
    assert widths[0] / widths[4] == pytest.approx(33 / 25.5, rel=1e-3)


def _simulate_slow_updates() -> Simulation:
    schedule = build_schedule("1f1b", 2, 2)
    return simulate(schedule, Costs.from_rank_shares(schedule.placement, step=2.0))


def test_an_update_that_takes_time_is_a_cell() -> None:
    root = ElementTree.fromstring(to_svg([_simulate_slow_updates()]))
    cells = _cells(root)
    assert float(cells["0STEP1"].get("width", "")) == pytest.approx(float(cells["0B0"].get("width", "")))
    assert _texts(root).count("U") == 2


def test_many_microbatches_make_smaller_labels_or_none() -> None:
    root = _draw("1f1b", p=2, m=60)
    assert float(root.get("width", "")) < 2100
    sizes = [float(text.get("font-size", "")) for text in root.iter(f"{SVG}text") if text.text == "59"]
    assert len(sizes) == 4
    assert 5 < max(sizes) < 8
    assert "119" not in _texts(_draw("1f1b", p=2, m=120))


# How dichromats see, applied to linear RGB: Vienot, Brettel and Mollon, "Digital video colourmaps for checking the
# legibility of displays by dichromats", 1999; the last one is in the same manner.
VISION = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.1124, 0.8876, 0), (0.1124, 0.8876, 0), (0.004, -0.004, 1)),
    "deuteranopia": ((0.2928, 0.7072, 0), (0.2928, 0.7072, 0), (-0.0223, 0.0223, 1)),
    "tritanopia": ((1, 0.1461, -0.1461), (0, 0.8594, 0.1406), (0, 0.8594, 0.1406)),
}


def _seen(colour: str, vision: str) -> list[float]:
    parts = [(int(colour[place : place + 2], 16) / 255) ** 2.2 for place in (1, 3, 5)]
    mixed = [sum(weight * part for weight, part in zip(row, parts, strict=True)) for row in VISION[vision]]
    return [255 * max(part, 0.0) ** (1 / 2.2) for part in mixed]


@pytest.mark.parametrize("vision", VISION)
def test_kinds_are_told_apart_with_any_colour_vision(vision: str) -> None:
    """Also the paler ones of a rank's later stages; an update has none, and no family recomputes yet."""
    paler = {kind: lighten(colour, _UPPER_STAGE) for kind, colour in COLOURS.items() if kind not in (Kind.R, Kind.STEP)}
    shades = [*COLOURS.items(), *paler.items()]
    for (first, colour), (second, other) in combinations(shades, 2):
        if first is not second and Kind.R not in (first, second):
            assert dist(_seen(colour, vision), _seen(other, vision)) > 35, (first, second, colour, other)


@pytest.mark.parametrize("vision", VISION)
def test_moves_are_told_apart_with_any_colour_vision(vision: str) -> None:
    shades = [*MOVE_COLOURS.items(), *((kind, lighten(colour, _UPPER_STAGE)) for kind, colour in MOVE_COLOURS.items())]
    for (first, colour), (second, other) in combinations(shades, 2):
        if first is not second:
            assert dist(_seen(colour, vision), _seen(other, vision)) > 35, (first, second, colour, other)


def test_ink_reads_on_its_ground() -> None:
    assert lighten("#000000", 0.5) == "#808080"
    assert (ink_on("#ffffff"), ink_on("#000000")) == ("#1b2430", "#ffffff")


def test_what_is_moved_has_a_row_under_its_rank() -> None:
    plain = build_schedule("pipedream", 4, 8)
    schedule = insert_offloads(insert_version_moves(plain, range(4)), range(4))
    costs = Costs.from_rank_shares(schedule.placement, move=0.5, move_versions=0.75)
    simulation = simulate(schedule, costs)
    root = ElementTree.fromstring(to_svg([simulation]))
    cells = _cells(root)
    assert set(cells) == {str(action) for order in schedule.orders for action in order}
    scale = float(cells["0F0"].get("width", 0)) + 1
    for rank, moves in enumerate(simulation.moves):
        for action, start, end in moves:
            cell = cells[str(action)]
            assert cell.get("fill") == MOVE_COLOURS[action.kind]
            assert float(cell.get("width", 0)) == pytest.approx((end - start) * scale - 1, abs=0.02)
            assert float(cell.get("x", 0)) == pytest.approx(float(cells["0F0"].get("x", 0)) + start * scale, abs=0.2)
            assert float(cells[f"{rank}F0"].get("y", 0)) < float(cell.get("y", 0)) < float(cells["3F0"].get("y", 0))
    texts = _texts(root)
    assert texts.count("host") == 2  # two ranks hold too little to move anything
    assert {"out to host memory", "back", "weight version out"} <= set(texts)
    assert "microbatches held on the device, weight versions kept (dashed)" in texts
    assert texts.count("2 held, 2 kept") == 3
    assert not {"host", "back"} & set(_texts(_draw("pipedream")))
