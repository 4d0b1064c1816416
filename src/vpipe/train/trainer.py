"""The training loop of one rank: stretches of iterations between evaluations, and what is written about them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vpipe.config import RunConfig, dump_config
from vpipe.errors import PeerLostError
from vpipe.plan.prediction import Prediction
from vpipe.report.metrics import MetricsWriter
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Hooks, StepResult
from vpipe.runtime.status import StatusFile, status_path
from vpipe.runtime.trace import TraceRecorder
from vpipe.schedule.action import Action
from vpipe.train.describe import describe_plan
from vpipe.train.metrics import ThroughputMeter, peak_memory_bytes
from vpipe.train.outcome import HeldOut, RankOutcome, count_filling, summarize_run
from vpipe.train.save import save_model
from vpipe.train.stretches import cut_into_stretches
from vpipe.workload.same_data import agree_on_data
from vpipe.workload.setup import build_setup, build_training_pipeline
from vpipe.workload.slow_links import slow_down

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer:
    """Trains as the configuration says; one per rank."""

    def __init__(
        self, config: RunConfig, run_directory: Path, world: World, prediction: Prediction | None = None
    ) -> None:
        """Set up the run; `prediction` is what the planner expects of it, where it was asked."""
        self.config = config
        self._prediction = prediction
        self.run_directory = run_directory
        self.world = world
        self.setup = build_setup(config)
        agree_on_data(self.setup, world)
        self._recorder = TraceRecorder(world.rank, config.num_microbatches, lambda: self.pipeline.iteration)
        self._status = StatusFile(status_path(run_directory, world.rank))
        self._doing = "training"
        hooks = Hooks(record=self._record, announce=self._status.write, waited=self._recorder.waited)
        self.pipeline = build_training_pipeline(self.setup, world, hooks)
        slow_down(self.pipeline, config.launch)
        self._metrics = MetricsWriter(run_directory / "metrics.jsonl") if world.rank == 0 else None
        self._meter = ThroughputMeter(num_draining=count_filling(self.pipeline))
        self._start = time.perf_counter()

    def run(self, began: Callable[[Path], None] | None = None) -> dict[str, Any]:
        """Train to the end; return the summary, the same on every rank.

        `began` is called on rank 0 with the run's directory, when that says what the run is.
        """
        try:
            self._describe()
            if began is not None and self.world.rank == 0:
                began(self.run_directory)
            # A rank that is quick to fail ends the others: none may before the run says what it is.
            self.world.meet("rank 0 to describe the run")
            return self._run()
        except PeerLostError as error:
            if not self._status.text.startswith("waiting"):
                self._status.write(f"stopping: {error}")
            raise

    def _record(self, action: Action, start_ns: int, end_ns: int) -> None:
        self._recorder(action, start_ns, end_ns)
        self._status.write(f"{self._doing}, last done {action}")

    def _run(self) -> dict[str, Any]:
        train, total = self.config.train, self.setup.total_iterations
        loss, held_out, num_skipped = float("nan"), None, 0
        metrics: Mapping[str, float] = {}
        stretches = list(cut_into_stretches(total, train.eval_frequency if self.setup.evaluates else 0))
        for stretch in stretches:
            batches = self.setup.batches(self.pipeline.fields, stretch.start, stretch.num_iterations)
            self._meter.begin()
            for result in self.pipeline.train(batches, stretch.num_iterations):
                size = self.setup.batch_size(result.iteration)
                self._meter.update(size, is_whole=size == train.batch_size)
                self._report(result)
                loss, num_skipped, metrics = result.loss, num_skipped + result.num_skipped, result.metrics
            due = stretch.stop == total or (train.eval_frequency and stretch.stop % train.eval_frequency == 0)
            if self.setup.evaluates and due:
                held_out = self._evaluate(stretch.stop)
        if train.save_model:
            self._status.write("saving the model")
            save_model(self.pipeline, self.setup, self.run_directory / "model", self.world)
        outcome = RankOutcome(
            loss, num_skipped, held_out, metrics, self._meter.iteration_ms, self._recorder.events(), stretches
        )
        summary = summarize_run(self.pipeline, self.setup, self.world, outcome, self.run_directory, self._prediction)
        if self._metrics is not None:
            self._metrics.close()
        self._status.remove()
        return summary

    def _describe(self) -> None:
        for stage in self.pipeline.held:
            held = self.pipeline.plan.cut.range_of(stage)
            blocks = [self.setup.chain.blocks[index] for index in held]
            logger.info(
                "Stage: %d, rank in stage: 0, blocks %d to %d (%s to %s)",
                stage, held[0], held[-1], blocks[0].name, blocks[-1].name,
            )  # fmt: skip
        if self.world.rank == 0:
            logger.info("Everything about this run is in %s", self.run_directory)
            plan = describe_plan(self.pipeline.plan, self.setup, self._prediction)
            (self.run_directory / "config.yml").write_text(dump_config(self.config), encoding="utf-8")
            (self.run_directory / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")

    def _report(self, result: StepResult) -> None:
        train, setup = self.config.train, self.setup
        done, total = result.iteration + 1, setup.total_iterations
        epoch, step = divmod(result.iteration, setup.iterations_per_epoch)
        rate = self._meter.samples_per_second
        if self._metrics is not None:
            self._metrics.write(
                {
                    "iteration": done,
                    "iterations": total,
                    "epoch": epoch,
                    "loss": result.loss,
                    **{f"{name}_loss": part for name, part in result.parts.items() if len(result.parts) > 1},
                    **({"metrics": result.metrics} if result.metrics else {}),
                    "gradient_norm": result.gradient_norm,
                    "skipped_updates": result.num_skipped,
                    "learning_rate": setup.learning_rate(result.iteration),
                    "samples_per_second": rate,
                    "elapsed_s": time.perf_counter() - self._start,
                }
            )
        if done == 1 or done % train.print_frequency == 0 or done == total:
            logger.info(
                "Epoch: [%d][%d/%d]  Iteration: %d/%d  Loss: %.4f%s  Samples/s: %.1f",
                epoch, step + 1, setup.iterations_per_epoch, done, total, result.loss, _shown(result.metrics), rate,
            )  # fmt: skip
        if result.num_skipped:
            logger.warning(
                "Iteration %d: %d updates were left out, because the loss (%.4g) or a gradient is not finite",
                done, result.num_skipped, result.loss,
            )  # fmt: skip
        if train.verbose_frequency and done % train.verbose_frequency == 0:
            self._report_rank(done)

    def _report_rank(self, iteration: int) -> None:
        transport = self.pipeline.transport
        logger.info(
            "Iteration %d: sent %d bytes, received %d bytes, peak memory %d bytes, weight versions %s",
            iteration, transport.bytes_sent, transport.bytes_received, peak_memory_bytes(self.world),
            {stage: held.weights.num_sets for stage, held in self.pipeline.held.items()},
        )  # fmt: skip

    def _evaluate(self, iteration: int) -> HeldOut:
        self._recorder.enabled, self._doing = False, "evaluating"
        with self._meter.paused():
            held_out = self.setup.evaluation_batches(self.pipeline.fields)
            losses = self.pipeline.evaluate(held_out, self.config.microbatch_size)
        self._recorder.enabled, self._doing = True, "training"
        loss, metrics = losses["loss"], {name: losses[name] for name in self.setup.chain.metric_names}
        parts = {f"eval_{name}_loss": losses[name] for name in self.setup.chain.loss.parts if name != "loss"}
        told = {"eval_metrics": metrics} if metrics else {}
        logger.info("Iteration: %d  Held-out loss: %.4f%s", iteration, loss, _shown(metrics))
        if self._metrics is not None:
            total = self.setup.total_iterations
            self._metrics.write({"iteration": iteration, "iterations": total, "eval_loss": loss, **parts, **told})
        return HeldOut(loss, metrics)


def _shown(metrics: Mapping[str, float]) -> str:
    return "".join(f"  {name}: {value:.4g}" for name, value in metrics.items())
