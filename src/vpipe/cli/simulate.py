"""`vpipe simulate --from-run RUN_DIR`: how well the simulator knows what a run took."""

from __future__ import annotations

import json
from pathlib import Path

import click

__all__ = ["command"]


@click.command(name="simulate")
@click.option(
    "--from-run",
    "run_directory",
    required=True,
    type=click.Path(path_type=Path),
    metavar="RUN_DIR",
    help="Directory of a finished run, e.g. runs/latest.",
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(run_directory: Path, form: str) -> None:
    """Predict a finished run from the costs that it measured, and show the error.

    The means of each stage's forwards, backwards and updates, of messages and of what lies between actions are taken
    from the run's timeline (up to 8 iterations); the run's schedule is simulated with them. To simulate with times of
    your own, use `vpipe schedule`.

    \b
    JSON keys (times in ms; fractions and shares of all ranks' time):
      schedule, num_ranks, num_microbatches
      step_ms          predicted, measured, error (predicted / measured - 1)
      bubble_fraction  predicted, measured
      simulated_batches  batches that `idle` and `critical_path` are of
      idle             share by cause: warmup, cooldown, imbalance,
                       communication, host, step
      critical_path    action, start_ms, end_ms of each link of the chain
      stages           stage, rank, and F_ms, B_ms, I_ms, W_ms, STEP_ms
      links            source, target, latency_ms, bandwidth_bytes_per_ms
                       (null: no message waited for another)
      overheads        gap_ms, send_ms, receive_ms, turn_ms between batches,
                       tell_ms until all know the loss, meet_ms of an update
                       in which ranks wait for each other (null: they do not)
    """
    from vpipe.report.prediction_of_run import predict_run

    found = predict_run(run_directory)
    click.echo(json.dumps(found.to_dict()) if form == "json" else "\n".join(found.lines()))
