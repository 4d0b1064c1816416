"""The training loop of one rank: stretches of iterations between evaluations, and what is written about them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vpipe.config import RunConfig, dump_config
from vpipe.errors import ConfigError
from vpipe.report.summary import summarize_trace
from vpipe.report.trace import write_timeline
from vpipe.runtime.pipeline import Hooks, Pipeline, StepResult
from vpipe.runtime.process_group import ProcessGroup, process_group
from vpipe.runtime.status import StatusFile, status_path
from vpipe.runtime.trace import TraceEvent, TraceRecorder
from vpipe.train.metrics import MetricsWriter, ThroughputMeter, peak_memory_bytes
from vpipe.train.save import save_model
from vpipe.train.setup import Setup, build_setup, build_training_pipeline

__all__ = ["Trainer", "train_rank"]

logger = logging.getLogger(__name__)

_LONGEST_STRETCH = 1000
"""Iterations after which an asynchronous pipeline drains even if nothing asks for it: schedules stay of bounded length."""

_TRACED_ITERATIONS = 8
"""Iterations in the timeline: the last ones, but for the very last, in which an asynchronous pipeline drains."""


class Trainer:
    """Trains as the configuration says; one per rank."""

    def __init__(self, config: RunConfig, run_directory: Path, group: ProcessGroup) -> None:
        self.config = config
        self.run_directory = run_directory
        self.group = group
        self.setup = build_setup(config)
        self._recorder = TraceRecorder(group.rank, config.pipeline.num_microbatches, lambda: self.pipeline.iteration)
        self._status = StatusFile(status_path(run_directory, group.rank))
        hooks = Hooks(record=self._recorder, announce=self._status.write)
        self.pipeline = build_training_pipeline(self.setup, group.device, hooks)
        self._metrics = MetricsWriter(run_directory / "metrics.jsonl") if group.rank == 0 else None
        self._meter = ThroughputMeter()
        self._start = time.perf_counter()

    def run(self) -> dict[str, Any]:
        """Train to the end; return the summary, the same on every rank."""
        self._describe()
        loss, held_out = float("nan"), None
        for start, count in self._stretches():
            for result in self.pipeline.train(self.setup.batches(self.pipeline.fields, start, count), count):
                self._meter.update(self.config.train.batch_size)
                self._report(result)
                loss = result.loss
            if self.setup.evaluates and self._evaluation_due(start + count):
                held_out = self._evaluate(start + count)
        if self.config.train.save_model:
            save_model(self.pipeline, self.setup, self.run_directory / "model", self.group)
        summary = self._summarize(loss, held_out)
        if self._metrics is not None:
            self._metrics.close()
        self._status.remove()
        return summary

    def _stretches(self) -> Iterator[tuple[int, int]]:
        """Yield (first iteration, iterations) between two moments at which the pipeline is empty."""
        total, frequency = self.setup.total_iterations, self.config.train.eval_frequency
        start = 0
        while start < total:
            stop = min(total, start + _LONGEST_STRETCH)
            if frequency and self.setup.evaluates:
                stop = min(stop, (start // frequency + 1) * frequency)
            yield start, stop - start
            start = stop

    def _evaluation_due(self, iteration: int) -> bool:
        frequency = self.config.train.eval_frequency
        return iteration == self.setup.total_iterations or bool(frequency) and iteration % frequency == 0

    def _describe(self) -> None:
        pipeline = self.pipeline
        starts = [sum(pipeline.partition[:stage]) for stage in range(len(pipeline.partition) + 1)]
        for stage in pipeline.held:
            blocks = self.setup.chain.blocks[starts[stage] : starts[stage + 1]]
            logger.info(
                "Stage: %d, rank in stage: 0, blocks %d to %d (%s to %s)",
                stage, starts[stage], starts[stage + 1] - 1, blocks[0].name, blocks[-1].name,
            )  # fmt: skip
        if self.group.rank == 0:
            (self.run_directory / "config.yml").write_text(dump_config(self.config))
            (self.run_directory / "plan.json").write_text(json.dumps(_plan(pipeline, self.config), indent=2) + "\n")

    def _report(self, result: StepResult) -> None:
        done, total = result.iteration + 1, self.setup.total_iterations
        epoch, step = divmod(result.iteration, self.setup.iterations_per_epoch)
        if self._metrics is not None:
            self._metrics.write(
                {
                    "iteration": done,
                    "iterations": total,
                    "epoch": epoch,
                    "loss": result.loss,
                    **{f"{name}_loss": part for name, part in result.parts.items() if len(result.parts) > 1},
                    "gradient_norm": result.gradient_norm,
                    "learning_rate": self.setup.learning_rate(result.iteration),
                    "samples_per_second": self._meter.samples_per_second,
                    "elapsed_s": time.perf_counter() - self._start,
                }
            )
        if done % self.config.train.print_frequency == 0 or done == total:
            logger.info(
                "Epoch: [%d][%d/%d]  Iteration: %d/%d  Loss: %.4f  Samples/s: %.1f",
                epoch, step + 1, self.setup.iterations_per_epoch, done, total, result.loss, self._meter.samples_per_second,
            )  # fmt: skip
        if self.config.train.verbose_frequency and done % self.config.train.verbose_frequency == 0:
            self._report_rank(done)

    def _report_rank(self, iteration: int) -> None:
        transport = self.pipeline.transport
        logger.info(
            "Iteration %d: sent %d bytes, received %d bytes, peak memory %d bytes, weight versions %s",
            iteration, transport.bytes_sent, transport.bytes_received, peak_memory_bytes(self.group.device),
            {stage: held.weights.num_sets for stage, held in self.pipeline.held.items()},
        )  # fmt: skip

    def _evaluate(self, iteration: int) -> float:
        self._recorder.enabled = False
        with self._meter.paused():
            losses = self.pipeline.evaluate(self.setup.evaluation_batches(self.pipeline.fields))
        self._recorder.enabled = True
        loss = losses["loss"]
        parts = {f"eval_{name}_loss": value for name, value in losses.items() if name != "loss"}
        logger.info("Iteration: %d  Held-out loss: %.4f", iteration, loss)
        if self._metrics is not None:
            total = self.setup.total_iterations
            self._metrics.write({"iteration": iteration, "iterations": total, "eval_loss": loss, **parts})
        return loss

    def _summarize(self, loss: float, held_out: float | None) -> dict[str, Any]:
        transport = self.pipeline.transport
        mine = {
            "bytes_sent": transport.bytes_sent,
            "bytes_received": transport.bytes_received,
            "peak_memory_bytes": peak_memory_bytes(self.group.device),
            "weight_versions": sum(held.weights.num_sets for held in self.pipeline.held.values()),
            "events": _last_iterations(self._recorder.events(), self.setup.total_iterations),
        }
        everyone: list[dict[str, Any]] = [{} for _ in range(self.group.num_ranks)]
        dist.all_gather_object(everyone, mine, group=self.group.control)
        events = [event for rank in everyone for event in rank.pop("events")]
        summary: dict[str, Any] = {
            "schedule": self.config.pipeline.schedule,
            "iterations": self.setup.total_iterations,
            "num_samples": self.setup.total_iterations * self.config.train.batch_size,
            "final_loss": loss,
            "eval_loss": held_out,
            "samples_per_second": self._meter.overall_samples_per_second,
            "iteration_ms": self._meter.iteration_ms,
            **{key: [rank[key] for rank in everyone] for key in everyone[0]},
            **summarize_trace(events),
        }
        starts = [sum(self.pipeline.partition[:stage]) for stage in range(len(self.pipeline.partition) + 1)]
        for row in summary["ranks"]:
            row["blocks"] = [block for stage in row["stages"] for block in range(starts[stage], starts[stage + 1])]
        if self.group.rank == 0:
            write_timeline(self.run_directory / "timeline.json", events)
            (self.run_directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary


def _plan(pipeline: Pipeline, config: RunConfig) -> dict[str, Any]:
    """Return the plan in the original's keys, with more beside them."""
    return {
        "partition": list(pipeline.partition),
        "recompute_ratio": config.recompute_ratios,
        "schedule": config.pipeline.schedule,
        "num_microbatches": config.pipeline.num_microbatches,
        "stage_to_rank": [pipeline.programs.sample.rank_of(stage) for stage in range(len(pipeline.partition))],
        "fingerprint": pipeline.programs.sample.fingerprint(),
    }


def _last_iterations(events: Sequence[TraceEvent], total: int) -> list[TraceEvent]:
    first, stop = max(0, total - 1 - _TRACED_ITERATIONS), max(1, total - 1)
    return [event for event in events if first <= event.iteration < stop]


def default_device() -> str:
    """Return `cuda` where torch finds a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def train_rank(config: RunConfig, find_directory: Callable[[Path, ProcessGroup], Path]) -> dict[str, Any]:
    """Be one rank of a training run: join the others, train, leave; return the summary.

    `find_directory` gives the run's directory, the same on all ranks, from the log directory.

    Raises:
        ConfigError: another number of ranks was started than the configuration says.
    """
    launch = config.launch
    device = default_device() if launch.device == "auto" else launch.device
    with process_group(launch.distributed_backend, launch.timeout_seconds, device=device) as group:
        if group.num_ranks != config.num_ranks:
            raise ConfigError(
                f"pipeline.num_ranks is {config.num_ranks} but {group.num_ranks} ranks were started; start as many, or "
                f"change it with --set pipeline.num_ranks={group.num_ranks}"
            )
        return Trainer(config, find_directory(config.log_directory, group), group).run()
