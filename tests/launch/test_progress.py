import io
import json

from rich.console import Console

from vpipe.launch.progress import MetricsTail, ProgressDisplay, format_metrics


def add(path, *records, end="\n"):
    with path.open("a") as file:
        file.write("\n".join(json.dumps(record) for record in records) + end)


def test_the_tail_reads_each_complete_record_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert list(tail.read()) == []
    add(path, {"iteration": 1})
    assert list(tail.read()) == [{"iteration": 1}]
    assert list(tail.read()) == []
    with path.open("a") as file:
        file.write('{"iterat')
    assert list(tail.read()) == []
    with path.open("a") as file:
        file.write('ion": 2}\nno json\n[3]\n{"iteration": 3}\n')
    assert list(tail.read()) == [{"iteration": 2}, {"iteration": 3}]


def test_a_record_reads_as_a_line_without_what_it_lacks():
    full = {
        "iteration": 100,
        "iterations": 2000000,
        "epoch": 1,
        "loss": 6.54321,
        "learning_rate": 0.00012345,
        "samples_per_second": 123.45,
        "elapsed_s": 12.3,
        "rank": 0,
    }
    assert format_metrics(full) == ("iteration 100/2000000  epoch 1  loss 6.5432  lr 0.000123  123.5 samples/s  12 s")
    assert format_metrics({"iteration": 3, "loss": None}) == "iteration 3"
    assert format_metrics({"other": 1}) == ""
    assert (
        format_metrics({"loss": 1.0, "metrics": {"accuracy": 0.51234, "none": None}}) == "loss 1.0000  accuracy 0.5123"
    )
    assert format_metrics({"eval_loss": 1.0, "eval_metrics": {"accuracy": 1}}) == "eval loss 1.0000  eval accuracy 1"


def show(tmp_path, records, *, terminal, print_frequency=1):
    path = tmp_path / "metrics.jsonl"
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, color_system=None)
    with ProgressDisplay(path, console, print_frequency=print_frequency) as display:
        display.poll()
        for record in records:
            add(path, record)
            display.poll()
    return output.getvalue()


def test_lines_come_every_print_frequency_iterations_and_at_the_end(tmp_path):
    records = [{"iteration": number, "iterations": 11} for number in range(1, 12)]
    lines = show(tmp_path, records, terminal=False, print_frequency=4).splitlines()
    assert lines == [f"iteration {number}/11" for number in (1, 4, 8, 11)]


def test_evaluations_are_always_shown_and_empty_records_never(tmp_path):
    records = [{"iteration": 1}, {"iteration": 1, "eval_loss": 2.0}, {"memory": 5}]
    assert show(tmp_path, records, terminal=False, print_frequency=100).splitlines() == [
        "iteration 1",
        "iteration 1  eval loss 2.0000",
    ]


def test_a_terminal_gets_a_bar_with_the_numbers(tmp_path):
    output = show(tmp_path, [{"iteration": 3, "iterations": 10, "loss": 1.5}], terminal=True)
    assert "starting" in output
    assert "3/10" in output
    assert "loss 1.5000" in output
    assert "\x1b[?25h" in output  # the cursor is visible again
