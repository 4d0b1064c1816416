"""`vpipe estimate`: what a model would reach on machines that one does not have."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vpipe.cli.output import validate_output
from vpipe.cli.shared import read_config_aloud, short
from vpipe.config import RunConfig
from vpipe.config.planning.estimated import RunWishes, run_wishes
from vpipe.config.planning.planned import name_schedules
from vpipe.errors import PlanError
from vpipe.plan.policy import Policy
from vpipe.plan.recipe import Recipe
from vpipe.planner.estimate.analytic import Machine, ModelWork, Precision
from vpipe.planner.estimate.devices import DEVICES, LINKS, find_device, find_link
from vpipe.planner.estimate.estimate import Estimate, estimate
from vpipe.planner.explain.analytic import estimate_lines, estimate_to_dict
from vpipe.words.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from vpipe.measure.count.count import Assumptions

__all__ = ["command"]

_USUAL_SIZES = (1, 2, 4, 8)
_USUAL_SAMPLES = 8
"""Per rank, in a batch, where nothing is said: enough to keep a pipeline busy for nine tenths of the time."""
_USABLE = 0.9
"""Share of a device's memory that a plan may fill: the rest is for the driver, messages and fragments."""


def _list_tables(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from vpipe.measure.count.models import PUBLISHED

    click.echo("Models (sequence length, batch size):")
    for model in PUBLISHED.values():
        click.echo(f"  {model.name:16}{model.sequence_length:>6}{model.batch_size:>7}")
    click.echo("\nDevices (peak TFLOP/s x share reached; memory; GB/s; share reached; link; host GB/s; source):")
    for device in DEVICES.values():
        peaks = ", ".join(
            f"{name} {peak:g} x {device.matmul_fraction[name]:g}" for name, peak in device.peak_tflops.items()
        )
        click.echo(
            f"  {device.name:16}{peaks}; {format_bytes(device.memory_bytes)}; "
            f"{device.memory_gb_per_s:g}; {device.memory_fraction:.2f}; {device.link}; {device.host_gb_per_s:g}; "
            f"{device.source}"
        )
    click.echo("\nLinks (latency us, GB/s; source):")
    for link in LINKS.values():
        click.echo(f"  {link.name:16}{link.latency_us:>5g}{link.gb_per_s:>7g}  {link.source}")
    ctx.exit()


@click.command(name="estimate")
@click.option("--model", required=True, metavar="NAME|FILE", help="A published model (see --list), or a run's YAML.")
@click.option("--ranks", type=click.IntRange(1), help="Ranks of the pipeline.  [default: the run's own, else 8]")
@click.option(
    "--device", default="a100-80gb", show_default=True, metavar="NAME|FILE", help="See --list; or a JSON file of yours."
)
@click.option(
    "--devices-per-rank",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Devices that split every block of a rank (tensor parallelism).",
)
@click.option(
    "--link",
    default="infiniband-hdr",
    show_default=True,
    metavar="NAME|LATENCY,BANDWIDTH",
    help="Between ranks: see --list, or e.g. 5us,25GB/s.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Samples per update.  [default: as published, at most 8 per rank; or the run's]",
)
@click.option(
    "--microbatch-size",
    metavar="N[,N...]",
    help="Those to choose from.  [default: the run's own, else 1,2,4,8 as far as useful]",
)
@click.option("--sequence-length", type=click.IntRange(2), help="Tokens per sample of a published model.")
@click.option(
    "--schedule",
    metavar="NAME[,NAME...]|auto",
    help="See `vpipe schedule --list`.  [default: the run's own, else 1f1b]",
)
@click.option("--stages-per-rank", type=click.IntRange(1), help="[default: the run's own, else the schedule's]")
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "tf32", "fp32"]),
    help="What is multiplied; activations have this type (tf32: fp32).  [default: bf16 where the device has it]",
)
@click.option("--weight-bytes", type=click.IntRange(1), help="Per parameter.  [default: the type's size]")
@click.option("--gradient-bytes", type=click.IntRange(1), help="Per parameter.  [default: as weights]")
@click.option(
    "--optimizer-bytes",
    type=click.IntRange(0),
    help="Per parameter.  [default: those of the run's optimizer, else Adam's 8, and 4 for a master copy]",
)
@click.option(
    "--attention", type=click.Choice(["flash", "plain"]), default="flash", show_default=True, help="plain holds scores."
)
@click.option(
    "--matmul-fraction", type=click.FloatRange(0, 1, min_open=True), help="Share of the peak that is reached."
)
@click.option(
    "--memory-limit", metavar="SIZE", help="Per device, e.g. 70GiB.  [default: the run's own, else 90 % of it]"
)
@click.option("--no-swap", is_flag=True, help="Never move activations to the host.")
@click.option("--no-recompute", is_flag=True, help="Never recompute activations.")
@click.option("--all-stages", is_flag=True, help="Show every stage of a long pipeline.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan, for plan.partition of a run.")
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list_tables, help="List models and devices."
)
def command(
    model: str, ranks: int | None, batch_size: int | None, form: str, output: Path | None, **options: Any
) -> None:
    """Estimate what a model would reach on machines that you need not have.

    Blocks are built without memory; their matrix products and bytes are counted, and the device's data sheet makes
    times of them: every operation takes what its products take at the share of the peak that is reached, or what its
    bytes take, or a kernel's start, whichever is longest. Then `vpipe plan`'s planner and simulator find cuts, what to
    recompute or swap, and microbatches. Data parallel replicas are not part of it: give one pipeline's share of the
    batch. docs/estimate.md has the method and how far published runs are from it.

    \b
    Examples:
      vpipe estimate --model gpt3-175b --ranks 64 --device a100-80gb
      vpipe estimate --model gpt3-175b --ranks 8 --devices-per-rank 8 --schedule interleaved
      vpipe estimate --model bert-large --ranks 4 --device v100-16gb --link ethernet-10g
      vpipe estimate --model configs/gpt_quickstart.yml --device rtx3090-24gb

    \b
    JSON is what `vpipe plan` prints and -o writes, with one more key, `estimate`:
      model, num_parameters, tokens_per_sample, num_blocks, device, num_devices, devices_per_rank
      assumed            shares, bandwidths, bytes per parameter, memory limit
      step_s, samples_per_s, tokens_per_s, model_tflops_per_device, utilisation
      time_shares        what all devices' time goes into; adds up to 1
      recomputed_blocks, swapped_blocks
      policy_costs       of each kind of block that does not keep: policy,
                         num_blocks, block, saved_bytes, ms, per microbatch
      expected_error     mean_absolute, lowest, highest, of published runs
      from_run           what a run's YAML decided, by its keys
      unlimited_step_s   if memory were no limit; null where nothing is recomputed or swapped
      smallest_limit_bytes  the least memory per device that a plan exists for
    """
    validate_output(output, "plan")
    # Collecting garbage would walk through millions of simulated actions again and again, and there is none.
    gc.disable()
    asked_batch = batch_size
    click.get_current_context().call_on_close(gc.enable)
    config = read_config_aloud(Path(model), ()) if model.endswith((".yml", ".yaml")) else None
    run = None if config is None else run_wishes(config)
    machine = _machine(options, 8 if run is None else run.state_bytes)  # before torch: mistakes are told at once
    schedules = _schedules(options["schedule"], run)
    limits = _limits(options["memory_limit"], run, machine)
    counted, num_ranks, batch_size = _counted(model, config, run, ranks, batch_size, machine, options)
    found = estimate(
        counted,
        machine,
        num_ranks,
        batch_size,
        schedules=schedules,
        memory_limit=limits,
        policies=_policies(options, run),
        stages_per_rank=_stages_per_rank(options, run),
        options=_schedule_options(run, num_ranks),
    )
    _show(model, found, _taken(run, ranks, asked_batch, options), form, output, all_stages=options["all_stages"])


def _show(
    name: str, found: Estimate, taken: Mapping[str, str], form: str, output: Path | None, *, all_stages: bool
) -> None:
    content = estimate_to_dict(found)
    if taken:
        content["estimate"]["from_run"] = taken
    if form == "json":
        click.echo(json.dumps(content))
    else:
        click.echo("\n".join([*_run_lines(name, taken), *estimate_lines(found, all_stages=all_stages)]))
    if output is not None:
        plan = {key: value for key, value in content.items() if key != "estimate"}
        output.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        if form == "text":
            click.echo(f"\nwritten to {short(output)}")


def _machine(options: dict[str, Any], state_bytes: int) -> Machine:
    device = find_device(options["device"])
    compute = options["dtype"] or next(iter(device.peak_tflops))
    if options["matmul_fraction"] is not None:
        device = dataclasses.replace(
            device, matmul_fraction=dict.fromkeys(device.peak_tflops, options["matmul_fraction"])
        )
    size = 2 if compute in ("bf16", "fp16") else 4
    weight = options["weight_bytes"] or size
    state = state_bytes if weight == 4 else state_bytes + 4
    precision = Precision(
        compute,
        weight,
        options["gradient_bytes"] or weight,
        state if options["optimizer_bytes"] is None else options["optimizer_bytes"],
    )
    return Machine(device, find_link(options["link"]), precision, options["devices_per_rank"], not options["no_swap"])


def _schedules(names: str | None, run: RunWishes | None) -> tuple[str, ...]:
    if names is None:
        return ("1f1b",) if run is None else run.schedules
    return tuple(found for name in names.split(",") for found in name_schedules(name.strip()))


def _limits(size: str | None, run: RunWishes | None, machine: Machine) -> Sequence[int]:
    if size is not None:
        return [parse_bytes(size)]
    if run is not None and run.limits is not None:
        return run.limits
    return [int(machine.device.memory_bytes * _USABLE)]


def _policies(options: dict[str, Any], run: RunWishes | None) -> tuple[Policy, ...]:
    left_out = {Policy.RECOMPUTE: options["no_recompute"], Policy.SWAP: options["no_swap"]}
    return tuple(policy for policy in (Policy if run is None else run.policies) if not left_out.get(policy))


def _stages_per_rank(options: dict[str, Any], run: RunWishes | None) -> int | None:
    """Return those asked for, else the run's; another schedule than the run's has its own."""
    if options["stages_per_rank"] or run is None or options["schedule"]:
        return int(options["stages_per_rank"]) if options["stages_per_rank"] else None
    return run.stages_per_rank


def _schedule_options(run: RunWishes | None, num_ranks: int) -> Recipe:
    """Return the run's options of schedules; those of each stage are for its own number of ranks."""
    if run is None:
        return Recipe()
    return run.options if num_ranks == run.num_ranks else run.options.for_any_stages()


def _taken(run: RunWishes | None, ranks: int | None, batch_size: int | None, options: dict[str, Any]) -> dict[str, str]:
    """Return what the run says and no option says otherwise, by the run's keys."""
    if run is None:
        return {}
    given = {
        "pipeline.num_ranks": ranks,
        "pipeline.schedule": options["schedule"],
        "pipeline.stages_per_rank": options["stages_per_rank"] or options["schedule"],
        "pipeline.num_microbatches": options["microbatch_size"],
        "pipeline.stage_to_depth_map": ranks is not None and ranks != run.num_ranks,
        "train.batch_size": batch_size,
        "optimizer.name": options["optimizer_bytes"],
        "plan.memory_limit": options["memory_limit"],
    }
    return {key: value for key, value in run.said.items() if given.get(key) in (None, False)}


def _run_lines(name: str, taken: Mapping[str, str]) -> list[str]:
    if not taken:
        return []
    said = ", ".join(f"{key} {value}" for key, value in taken.items())
    return [f"From {name}: {said}. The rest is by options and defaults; cuts and policies are planned anew."]


def _counted(
    name: str,
    config: RunConfig | None,
    run: RunWishes | None,
    ranks: int | None,
    batch_size: int | None,
    machine: Machine,
    options: dict[str, Any],
) -> tuple[ModelWork, int, int]:
    """Return the model, counted, the number of ranks and the batch size."""
    from vpipe.measure.count.models import count_published, count_run, find_published

    if config is not None and run is not None:
        if options["sequence_length"]:
            raise click.UsageError("--sequence-length is for published models; a run's data has its own")
        num_ranks, batch = ranks or run.num_ranks, batch_size or run.batch_size
        sizes = _sizes(options, batch, num_ranks, run.num_microbatches)
        return count_run(config, sizes, _assumptions(machine, options)), num_ranks, batch
    published = find_published(name)
    if options["sequence_length"]:
        published = dataclasses.replace(published, sequence_length=options["sequence_length"])
    num_ranks = ranks or 8
    batch = batch_size or min(published.batch_size, _USUAL_SAMPLES * num_ranks)
    work = count_published(published, _sizes(options, batch, num_ranks), _assumptions(machine, options))
    return work, num_ranks, batch


def _assumptions(machine: Machine, options: dict[str, Any]) -> Assumptions:
    from vpipe.measure.count.count import Assumptions
    from vpipe.measure.count.models import DTYPES

    return Assumptions(DTYPES[machine.precision.activation_type], options["attention"])


def _sizes(options: dict[str, Any], batch_size: int, num_ranks: int, own_count: int | None = None) -> list[int]:
    """Return the microbatch sizes to try: those given, the run's own, or small ones that keep every rank busy."""
    given = options["microbatch_size"]
    if given is None and own_count is not None:
        if batch_size % own_count:
            raise PlanError(
                f"a batch of {batch_size} samples cannot be cut into the run's {own_count} microbatches; give "
                "--microbatch-size, or a --batch-size that it divides"
            )
        return [batch_size // own_count]
    if given is None:
        fitting = [size for size in _USUAL_SIZES if batch_size % size == 0]
        return [size for size in fitting if size == 1 or batch_size // size >= 4 * num_ranks]
    if not all(part.strip().isdigit() and int(part) for part in given.split(",")):
        raise click.UsageError(f"--microbatch-size '{given}' is no list of whole numbers from 1 on, e.g. 1,2,4")
    sizes = [int(part) for part in given.split(",")]
    for size in sizes:
        if batch_size % size:
            raise PlanError(
                f"--microbatch-size {size} does not divide the batch of {batch_size} samples; use a divisor"
            )
    return sizes
