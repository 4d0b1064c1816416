from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from vpipe.cli.schedule import command
from vpipe.errors import ScheduleError
from vpipe.schedule.registry import SCHEDULES

KEYS = [
    "schedule",
    "num_ranks",
    "num_stages",
    "num_microbatches",
    "makespan",
    "bubble_fraction",
    "span_bubble_fraction",
    "peak_activations",
    "weight_versions",
    "staleness",
    "traffic",
    "idle",
    "actions",
]
SEARCH_KEYS = [
    "max_in_flight",
    "lower_bound",
    "gap",
    "best_family",
    "best_family_makespan",
    "one_more_microbatch",
]


def _run(line: str) -> Result:
    return CliRunner().invoke(command, line.split())


def _json(line: str) -> dict[str, object]:
    result = _run(f"{line} --format json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    assert isinstance(data, dict)
    return data


def _vpipe(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vpipe", *line.split()], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", SCHEDULES)
def test_json_keys(name: str) -> None:
    data = _json(f"{name} --ranks 4 --microbatches 8")
    assert list(data) == KEYS + (SEARCH_KEYS if name == "searched" else [])
    assert data["schedule"] == name
    for key in ("peak_activations", "weight_versions", "staleness", "actions"):
        assert len(data[key]) == 4  # type: ignore[arg-type]


def test_the_defaults_give_the_reference_numbers() -> None:
    data = _json("1f1b --ranks 4 --microbatches 8")
    assert (data["makespan"], data["bubble_fraction"]) == (33, 3 / 11)
    assert data["peak_activations"] == [4, 3, 2, 1]
    assert _json("1f1b") == data


def test_times_are_a_rank_s_share() -> None:
    assert _json("1f1b --weight-grad 0")["makespan"] == 22
    assert _json("1f1b --step 2")["makespan"] == 35
    one, two = _json("naive --ranks 2"), _json("naive --ranks 2 --stages-per-rank 2")
    assert (one["makespan"], one["num_stages"]) == (48, 2)
    assert (two["makespan"], two["num_stages"]) == (48, 4)


def test_links_cost_time() -> None:
    assert _json("gpipe --latency 0.5")["makespan"] == 33 + 3
    assert _json("gpipe --bandwidth 10 --bytes 5")["makespan"] == 33 + 3
    assert _json("gpipe --bytes 5")["makespan"] == 33


def test_a_depth_counts_the_forwards_of_the_warmup_and_not_that_of_the_first_pair() -> None:
    orders = _json("1f1b --depths 6,4,2,0")["actions"]
    assert [order.index(f"{stage}B0") for stage, order in enumerate(orders)] == [7, 5, 3, 1]


def test_options_reach_the_builder() -> None:
    assert _json("pipedream --microbatches 16 --depths 6,4,2,0")["staleness"] == [6, 4, 2, 0]
    assert _json("pipedream --microbatches 16 --microbatches-per-update 4")["weight_versions"] == [2, 2, 2, 2]
    assert _json("pipedream --microbatches 16 --vertical-sync")["staleness"] == [3, 3, 3, 3]


def test_a_search_is_told_the_costs_and_the_memory() -> None:
    line = "searched --ranks 4 --microbatches 8 --stages-per-rank 1 --forward 1,2,1,1"
    tight, loose = _json(f"{line} --max-in-flight 3"), _json(f"{line} --max-in-flight 4,4,4,4")
    assert (tight["max_in_flight"], loose["max_in_flight"]) == ([3] * 4, [4] * 4)
    assert max(tight["peak_activations"]) <= 3  # type: ignore[type-var]
    assert tight["lower_bound"] <= tight["makespan"] < tight["best_family_makespan"]  # type: ignore[operator]
    more = tight["one_more_microbatch"]
    assert isinstance(more, dict)
    assert more["makespan"] == loose["makespan"] == 33
    assert more["saved"] == pytest.approx(1 - 33 / tight["makespan"])  # type: ignore[operator]
    assert loose["one_more_microbatch"] is None
    longer = _json(f"{line} --max-in-flight 4 --latency 0.5")
    assert longer["makespan"] > loose["makespan"]  # type: ignore[operator]
    output = _run(f"{line} --max-in-flight 3").output
    assert "max in flight     3 on every rank, in microbatches" in output
    assert "lower bound       33, gap 3.03 %" in output
    assert "best family       naive with 104, 205.88 % longer" in output
    assert "memory is the limit: one more on every rank would make it 33, 2.94 % shorter" in output
    assert "memory is not the limit" in _run(f"{line} --max-in-flight 4").output


def test_a_search_says_the_smallest_limit() -> None:
    error = str(_run("searched --max-in-flight 0.5").exception)
    assert "max_in_flight 0.5 is below one microbatch" in error
    assert "the smallest limit that an order fits is 1" in error
    assert "has no option 'max_in_flight'" in str(_run("1f1b --max-in-flight 2").exception)
    assert "are the same option; keep --max-in-flight" in _run("searched --max-in-flight 2 --memory-limit 3").output
    assert "max_in_flight has 2 numbers for 4 ranks" in str(_run("searched --max-in-flight 2,3").exception)


def test_text_is_the_picture_and_a_summary() -> None:
    output = _run("1f1b --ranks 2 --microbatches 3").output
    assert output.splitlines()[1] == "rank 0 F0 F1       B0--- F2 B1---    B2---*"
    assert "F forward  B backward  * or U update  (blank: idle)" in output
    assert "1f1b: After a warmup" in output
    assert "makespan          12\n" in output
    assert "\x1b" not in output  # no colour codes into files


def test_colour_where_it_can_be_seen() -> None:
    assert "\x1b[34mF0" in CliRunner().invoke(command, ["gpipe"], color=True).output


def test_huge_schedules_are_summed_up_without_a_picture() -> None:
    output = _run("1f1b --ranks 64 --microbatches 256").output
    assert "no picture of 32832 actions" in output
    assert "makespan          957\n" in output


def test_list_shows_every_schedule() -> None:
    lines = _run("--list").output.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(SCHEDULES)]] == list(SCHEDULES)
    rows = json.loads(_run("--list --ranks 8 --microbatches 16 --format json").output)
    assert [row["schedule"] for row in rows] == list(SCHEDULES)
    assert {row["schedule"]: row["weight_versions"] for row in rows}["pipedream"] == 8


def test_times_may_differ_by_rank() -> None:
    assert _json("1f1b --forward 1,1,2,1 --step 1,0,0,0")["makespan"] > _json("1f1b")["makespan"]  # type: ignore[operator]
    assert _json("gpipe --ranks 1 --microbatches 2 --dispatch 0.5")["makespan"] == 2 * (1.5 + 2.5) + 0.5
    assert "write one, or one per rank, e.g. 1,1,2,1" in _run("1f1b --forward 1,x").output
    assert "forward has 3 numbers for 4 ranks" in str(_run("1f1b --forward 1,1,1").exception)


def test_csv_goes_round(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(_run("zb-v --ranks 3 --microbatches 5 --format csv").output)
    assert file.read_text().splitlines()[1].startswith("0F0,0F1,")
    shown, named = _json(f"--csv {file}"), _json("zb-v --ranks 3 --microbatches 5")
    assert shown == named
    assert "zb-v: read from mine.csv." in _run(f"--csv {file}").output
    assert _run(f"--csv {file} --format csv").output == file.read_text()


def test_what_is_not_in_the_schedule_of_a_csv_is_told(tmp_path: Path) -> None:
    file = tmp_path / "torch.csv"
    file.write_text("0UNSHARD,0F0,0F1,0B1,0B0\n1UNSHARD,1F0,1F1,1B1,1B0\n")
    first, second = _run(f"--csv {file} --format csv").stderr.splitlines()
    assert first.startswith("warning: torch.csv: 2 cells of UNSHARD left out")
    assert second.startswith("warning: torch.csv: backwards were put into microbatch order")


def test_a_csv_without_a_name_is_called_like_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("0F0,,0B0\n")
    assert _json(f"--csv {file}")["schedule"] == "mine"
    file.write_text("0F0,0X0\n")
    assert "rank 0, cell 1: '0X0' is not an action" in str(_run(f"--csv {file}").exception)
    assert "does not exist" in _run("--csv nowhere.csv").output


def test_svg_and_trace_are_whole_documents() -> None:
    svg = _run("v-half --format svg").output
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "The V with half of" in svg
    trace = json.loads(_run("v-half --format trace").output)
    assert {row["ph"] for row in trace["traceEvents"]} == {"M", "X", "C"}
    assert "no picture of 32832 actions" in _run("1f1b --ranks 64 --microbatches 256 --format svg").output


def test_compare_shows_several_on_one_scale() -> None:
    output = _run("--compare 1f1b,zb-v,pipedream --ranks 2 --microbatches 3").output
    lines = output.splitlines()
    assert [line for line in lines if line in ("1f1b", "zb-v", "pipedream")] == ["1f1b", "zb-v", "pipedream"]
    assert "B backward  I input gradient  W weight gradient" in output
    assert next(line for line in lines if line.startswith("zb-v  ")).split()[1] == "9.5"
    data = json.loads(_run("--compare 1f1b,zb-v --format json").output)
    assert [each["makespan"] for each in data] == [33, 25.5]
    assert _run("--compare gpipe,zb-v --format svg").output.count("url(#idle)") == 8 + 1


def test_the_readme_s_picture_is_what_its_command_draws() -> None:
    command_line = "--compare 1f1b,pipedream --ranks 4 --microbatches 8 --format svg"
    picture = Path(__file__).parents[2] / "docs" / "images" / "schedules.svg"
    assert picture.read_text() == _run(command_line).output, f"draw it anew: vpipe schedule {command_line} > {picture}"


def test_compare_gives_each_schedule_the_options_it_has() -> None:
    line = "--compare 1f1b,interleaved,pipedream --stages-per-rank 3 --vertical-sync --format json"
    plain, looped, stale = json.loads(_run(line).output)
    assert (plain["num_stages"], looped["num_stages"], stale["num_stages"]) == (4, 12, 4)
    assert stale["staleness"] == [3, 3, 3, 3]
    assert isinstance(_run("zb-h1 --vertical-sync").exception, ScheduleError)  # named alone, it must have it


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1f1b --list", "one of them"),
        ("1f1b --compare gpipe,zb-v", "one of them"),
        ("--compare gpipe,zb-v --format csv", "a CSV holds one schedule"),
        ("--list --format svg", "--list has no --format svg"),
    ],
)
def test_calls_that_do_not_fit_together(line: str, words: str) -> None:
    result = _run(line)
    assert result.exit_code == 2
    assert words in result.output


def test_the_garbage_collector_is_left_as_it_was() -> None:
    _run("gpipe")
    assert gc.isenabled()


def test_unknown_names_and_options_raise_the_room_s_errors() -> None:
    for line, words in (
        ("1fb1", "did you mean '1f1b'"),
        ("gpipe --depths 3,2,1,0", "schedule 'gpipe' has no option 'depths'"),
        ("1f1b --ranks 0", "num_ranks must be a whole number from 1 on, got 0"),
        ("1f1b --forward -1", "forward must be a finite number from 0 on"),
    ):
        error = _run(line).exception
        assert isinstance(error, ScheduleError)
        assert words in str(error)


def test_usage_errors_say_what_to_write() -> None:
    assert "write one per stage, e.g. 6,4,2,0" in _run("1f1b --depths 6,x").output
    assert f"name a schedule ({', '.join(SCHEDULES)}), or ask for --list" in _run("").output


def test_a_wrong_call_ends_with_one_message_and_exit_code_1() -> None:
    result = _vpipe("schedule gpip")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown schedule 'gpip'; did you mean 'gpipe'?")
    assert "Traceback" not in result.stderr


def test_the_answer_needs_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "sys.argv = 'vpipe schedule 1f1b --ranks 4 --microbatches 8'.split()\n"
        "from vpipe.cli import main\n"
        "main()\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'rich', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "makespan          33" in result.stdout


def test_the_schedule_room_is_standard_library_only() -> None:
    room = Path(__file__).parents[2] / "src" / "vpipe" / "schedule"
    modules = ", ".join(f"vpipe.schedule.{path.stem}" for path in room.glob("*.py") if path.stem != "__init__")
    code = (
        f"import sys, {modules}\n"
        "outside = {name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "from importlib.util import find_spec\n"
        "print(*sorted(outside & {'torch', 'numpy', 'click', 'pydantic', 'yaml'}))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


def test_the_old_name_of_the_limit_works_with_a_warning() -> None:
    result = _run("searched --ranks 2 --microbatches 4 --memory-limit 2 --search-steps 100")
    assert "max in flight     2 on every rank" in result.output
    assert "warning: --memory-limit is called --max-in-flight now; memory limits are bytes" in result.output


def test_moves_to_host_memory_are_shown_where_asked() -> None:
    output = _run("gpipe --ranks 2 --microbatches 4 --move 1").output
    assert output.count("  host ") == 2
    assert "> out to host memory  < back" in output
    actions = _json("gpipe --ranks 2 --microbatches 4 --move 1")["actions"]
    assert "0OFFLOAD0" in actions[0]  # type: ignore[index]
    assert "OFFLOAD" not in _run("gpipe --format csv").output
    assert _run("searched --ranks 2 --microbatches 4 --move 1").exit_code == 0
    assert _run("gpipe --move 1 --format svg").exit_code == 0
