"""An estimate in words and as JSON: what was assumed, what was found, what limits it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import host_ms
from vpipe.planner.cost.memory import each_bytes
from vpipe.planner.estimate.accuracy import COMPARED
from vpipe.planner.estimate.analytic import Machine, ModelWork
from vpipe.planner.estimate.estimate import SHARES, Estimate
from vpipe.planner.search.outcome_file import candidate_to_dict
from vpipe.words.table import format_table
from vpipe.words.units import format_bytes

__all__ = ["accuracy_line", "assumption_lines", "estimate_lines", "estimate_to_dict", "policy_lines"]

_ADVICE = {
    "products": "a faster device, or a smaller type, would help",
    "memory": "fused kernels, or larger microbatches where kernels are short, would help",
    "exchange": "fewer devices per rank and more ranks, or a faster link between them, would help",
    "recompute": "more memory, more ranks or smaller microbatches would help",
    "swap": "a faster link to the host, recomputing instead (--no-swap), or more memory would help",
    "step": "a larger batch would help",
    "waiting": "fewer microbatches would show for what",
    "warmup": "a larger --batch-size, smaller microbatches, fewer ranks, or --schedule auto would help",
    "imbalance": "stages of whole blocks differ: other numbers of ranks, or several stages per rank, may help",
    "communication": "a faster link, or larger microbatches, would help",
}


_FIRST, _LAST = 8, 4
"""Stages that are shown of a long pipeline."""


def estimate_lines(found: Estimate, *, all_stages: bool = False) -> list[str]:
    """Explain an estimate: assumptions, speed, where the time goes, the plan, and the smallest memory that would do.

    Of many stages, only some are shown without `all_stages`.
    """
    return [
        *assumption_lines(found),
        "",
        *_speed_lines(found),
        "",
        *_share_lines(found),
        "",
        *_stage_lines(found, all_stages=all_stages),
        *policy_lines(found),
        "",
        *_limit_lines(found),
        accuracy_line(found),
    ]


def assumption_lines(found: Estimate) -> list[str]:
    """Say what is counted, and what is taken for granted."""
    model, machine, setting = found.model, found.machine, found.plan.setting
    device, precision = machine.device, machine.precision
    tokens = f", {model.tokens_per_sample} tokens per sample" if model.tokens_per_sample else ""
    first = next(iter(model.sizes.values()))
    kind = precision.compute
    reached = f"{device.matmul_fraction[kind]:.0%} of {device.peak_tflops[kind]:g} TFLOP/s {kind}"
    lines = [
        f"Model: {model.name}, {model.num_parameters:,} parameters, {len(first)} blocks ({model.num_kinds} kinds)"
        f"{tokens}",
        f"Devices: {found.num_devices} x {device.name} ({_ranks(found)}): {reached}, {device.memory_fraction:.0%} of "
        f"{device.memory_gb_per_s:g} GB/s, at least {device.kernel_us:g} us per operation",
        f"Links between ranks: {machine.link.name}, {machine.link.latency_us:g} us, {machine.link.gb_per_s:g} GB/s; "
        f"to the host: {_host_words(machine)}",
        f"Bytes per parameter: {precision.total_bytes} (weights {precision.weight_bytes}, gradients "
        f"{precision.gradient_bytes}, optimizer {precision.optimizer_bytes}); activations in "
        f"{precision.activation_type}; memory per device: at most {format_bytes(found.outcome.request.rank_limits[0])} "
        f"of {format_bytes(device.memory_bytes)}",
        f"Batch: {setting.batch_size} samples; blocks may {' or '.join(found.outcome.request.policies)}",
        _model_words(model),
    ]
    if machine.devices_per_rank > 1:
        lines.append(_splitting(machine))
    return lines


def _host_words(machine: Machine) -> str:
    device = machine.device
    if not machine.swaps:
        return "not used"
    lost = f", which takes {device.host_share:.0%} of its time from computing" if device.host_share else ""
    return f"{device.host_gb_per_s:g} GB/s{lost}"


def _model_words(model: ModelWork) -> str:
    attention = "holds no scores" if model.attention == "flash" else "holds its scores"
    masked = "" if model.masked_share is None else f"; of the tokens {model.masked_share:.0%} are masked and predicted"
    return f"Attention: {model.attention}, {attention}{masked}"


def _ranks(found: Estimate) -> str:
    count, each = found.plan.setting.num_ranks, found.machine.devices_per_rank
    return f"{count} ranks" if each == 1 else f"{count} ranks of {each}"


def _splitting(machine: Machine) -> str:
    return (
        f"The {machine.devices_per_rank} devices of a rank split every block evenly and exchange what it gives over "
        f"{machine.device.link}; all bytes below are one device's"
    )


def _speed_lines(found: Estimate) -> list[str]:
    plan, tokens = found.plan, ""
    if found.tokens_per_s:
        tokens = f", {found.tokens_per_s:,.0f} tokens/s ({found.tokens_per_s / found.num_devices:,.1f} per device)"
    peak = max(memory.total for memory in plan.memory)
    return [
        f"{plan.step_ms / 1000:.4g} s per step, {found.samples_per_s:.4g} samples/s{tokens}",
        f"{found.model_tflops_per_device:.4g} TFLOP/s per device for the model, {found.utilisation:.1%} of the peak "
        f"(MFU); at most {format_bytes(peak)} per device",
    ]


def _share_lines(found: Estimate) -> list[str]:
    shares = sorted(found.shares.items(), key=lambda pair: -pair[1])
    lines = ["Where the time of all devices goes:"]
    lines += [f"  {share:6.1%}  {SHARES[kind]}" for kind, share in shares if share >= 0.0005]
    return [*lines, *_limiting(found)]


def _limiting(found: Estimate) -> Iterator[str]:
    """Say what most of the time goes into, and what most of the rest."""
    shares = found.shares
    waits = {"warmup": shares["warmup"] + shares["cooldown"]} | {
        kind: share for kind, share in shares.items() if kind not in ("warmup", "cooldown", "products")
    }
    names = SHARES | {"warmup": "waiting while the pipeline fills and drains"}
    ranked = sorted((waits | {"products": shares["products"]}).items(), key=lambda pair: -pair[1])
    first = ranked[0][0]
    yield f"Limited by {names[first]}: {_advice(found, first)}."
    second = max(waits, key=waits.__getitem__)
    if second != first and waits[second] >= 0.02:
        yield f"After that, {names[second]} ({waits[second]:.1%}): {_advice(found, second)}."


def _advice(found: Estimate, kind: str) -> str:
    """Say what would help, of what has not been done or ruled out."""
    if kind == "swap" and Policy.RECOMPUTE not in found.outcome.request.policies:
        return "a faster link to the host, recomputing instead (without --no-recompute), or more memory would help"
    if kind == "step" and not found.plan.setting.synchronous:
        return "a schedule with fewer updates, such as a synchronous one, would help"
    return _ADVICE[kind]


def _stage_lines(found: Estimate, *, all_stages: bool) -> list[str]:
    """List the stages: what each has, how long it takes, what its rank holds."""
    plan, blocks = found.plan, found.outcome.request.profile.at(found.plan.setting.microbatch_size).blocks
    placement, costs = plan.setting.build().placement, plan.costs
    rows = [["stage", "rank", "blocks", "", "forward", "backward", "busy", "memory", "activations"]]
    for stage, (start, stop) in enumerate(plan.partition.ranges):
        rank, forward, both = placement.rank_of(stage), costs.forward[stage], plan.stage_ms[stage]
        rows.append(
            [
                str(stage),
                str(rank),
                str(stop - start),
                blocks[start].name if stop == start + 1 else f"{blocks[start].name} to {blocks[stop - 1].name}",
                f"{forward:.4g} ms",
                f"{both - forward:.4g} ms",
                f"{plan.busy_ms[stage] * plan.setting.num_microbatches / plan.step_ms:.0%}",
                format_bytes(plan.memory[rank].total),
                _policy_words(plan.policies[start:stop]),
            ]
        )
    lines = format_table(rows, left={3, 8})
    hidden = len(plan.partition) - _FIRST - _LAST
    if hidden > 1 and not all_stages:
        lines[1 + _FIRST : -_LAST] = [f"  ... {hidden} more (--all-stages shows them)"]
    fullest = max(range(len(plan.memory)), key=lambda rank: plan.memory[rank].total)
    busy = plan.busy_ms
    busiest = max(range(len(busy)), key=busy.__getitem__)
    over = busy[busiest] / (sum(busy) / len(busy)) - 1
    return [
        f"Plan: {plan.setting.describe()}",
        *lines,
        f"Busiest: stage {busiest}, {over:.1%} more than the mean. Fullest: rank {fullest}, "
        f"{plan.memory[fullest].describe()}.",
    ]


def _policy_words(policies: Sequence[Policy]) -> str:
    named = {Policy.KEEP: "kept", Policy.RECOMPUTE: "recomputed", Policy.SWAP: "swapped"}
    counts = {word: policies.count(policy) for policy, word in named.items() if policy in policies}
    return f"all {next(iter(counts))}" if len(counts) == 1 else ", ".join(f"{n} {word}" for word, n in counts.items())


def policy_lines(found: Estimate) -> list[str]:
    """Say what each kind of block that recomputes or swaps saves of every microbatch in flight, and what that costs."""
    costs = policy_costs(found)
    if not costs:
        return []
    rows = [["", "", "saves", "costs for each microbatch"]]
    for item in costs:
        price = "more computing" if item["policy"] == Policy.RECOMPUTE else "on the link to the host"
        rows.append(
            [
                f"{item['num_blocks']} x {item['policy']}",
                f"like {item['block']}",
                format_bytes(item["saved_bytes"]),
                f"{item['ms']:.4g} ms {price}",
            ]
        )
    return ["Each of the blocks that do not keep their activations:", *format_table(rows, left={0, 1, 3})]


def policy_costs(found: Estimate) -> list[dict[str, Any]]:
    """Return, for each kind of block that recomputes or swaps, how many do, the first, and bytes and ms of each."""
    profile = found.outcome.request.profile
    first: dict[tuple[Policy, int, float], str] = {}
    kinds: Counter[tuple[Policy, int, float]] = Counter()
    for block, policy in zip(profile.at(found.plan.setting.microbatch_size).blocks, found.plan.policies, strict=True):
        if policy is Policy.KEEP:
            continue
        held, moved = each_bytes(block, policy)
        time = block.recompute_ms if policy is Policy.RECOMPUTE else host_ms(profile.host, moved)
        kind = policy, block.activation_bytes - held, time
        first.setdefault(kind, block.name)
        kinds[kind] += 1
    return [
        {"policy": kind[0].value, "num_blocks": count, "block": first[kind], "saved_bytes": kind[1], "ms": kind[2]}
        for kind, count in kinds.items()
    ]


def accuracy_line(found: Estimate) -> str:
    """Say how far estimates of published runs were off, and what this one has that none of those had."""
    setting, device = found.plan.setting, found.machine.device.name
    lacking = {
        f"on {device}": device not in COMPARED.devices,
        "with swapping": Policy.SWAP in found.plan.policies or bool(setting.moving),
        "with updates between microbatches": not setting.synchronous,
    }
    none = [words for words, is_lacking in lacking.items() if is_lacking]
    return (
        f"How far off: for {COMPARED.num_runs} published runs the time of a step was estimated {COMPARED.mean:.0%} off "
        f"on average, from {COMPARED.lowest:+.0%} to {COMPARED.highest:+.0%}"
        + (f"; none was {', or '.join(none)}" if none else "")
        + " (docs/estimate.md)."
    )


def _limit_lines(found: Estimate) -> list[str]:
    outcome, plan = found.outcome, found.plan
    lines = []
    if found.screened is not None:
        lines.append(
            f"Of {found.screened.num_settings} settings, those that promised most were planned: "
            f"{' and '.join(found.screened.planned)}. What follows is of these."
        )
    lines += [f"No plan of these settings needs less than {outcome.lower_bound_ms / 1000:.4g} s per step."]
    if found.unlimited_ms is not None:
        gain = plan.step_ms / found.unlimited_ms - 1
        lines.append(
            f"Without a limit of memory: {found.unlimited_ms / 1000:.4g} s per step; keeping to "
            f"{format_bytes(outcome.request.rank_limits[0])} "
            + (f"costs {gain:.1%}." if gain < 1 else f"takes {gain + 1:.3g} times as long.")
        )
    limit, smallest = outcome.smallest_limits[0], outcome.smallest
    fullest = max(smallest.memory, key=lambda memory: memory.total)
    lines.append(
        f"The smallest memory that would do: {format_bytes(limit)} per device, at {smallest.step_ms / 1000:.4g} s per "
        f"step ({smallest.setting.describe()}): {fullest.describe()}."
        + ("" if outcome.is_smallest_proven else " It was searched for; less may do.")
    )
    return lines


def estimate_to_dict(found: Estimate) -> dict[str, Any]:
    """Return an estimate for JSON: what a plan file has, and `estimate` beside it."""
    model, machine = found.model, found.machine
    device, link, precision = machine.device, machine.link, machine.precision
    content = candidate_to_dict(found.plan, found.outcome.request.profile, found.outcome.lower_bound_ms)
    content["estimate"] = {
        "model": model.name,
        "num_parameters": model.num_parameters,
        "tokens_per_sample": model.tokens_per_sample,
        "num_blocks": len(found.plan.policies),
        "device": device.name,
        "num_devices": found.num_devices,
        "devices_per_rank": machine.devices_per_rank,
        "assumed": {
            "compute": precision.compute,
            "peak_tflops": device.peak_tflops[precision.compute],
            "matmul_fraction": device.matmul_fraction[precision.compute],
            "memory_gb_per_s": device.memory_gb_per_s,
            "memory_fraction": device.memory_fraction,
            "kernel_us": device.kernel_us,
            "link": {"name": link.name, "latency_us": link.latency_us, "gb_per_s": link.gb_per_s},
            "host_gb_per_s": device.host_gb_per_s if machine.swaps else None,
            "weight_bytes": precision.weight_bytes,
            "gradient_bytes": precision.gradient_bytes,
            "optimizer_bytes": precision.optimizer_bytes,
            "memory_limit_bytes": int(found.outcome.request.rank_limits[0]),
            "attention": model.attention,
            "masked_share": model.masked_share,
        },
        "expected_error": {"mean_absolute": COMPARED.mean, "lowest": COMPARED.lowest, "highest": COMPARED.highest},
        "step_s": found.plan.step_ms / 1000,
        "samples_per_s": found.samples_per_s,
        "tokens_per_s": found.tokens_per_s,
        "model_tflops_per_device": found.model_tflops_per_device,
        "utilisation": found.utilisation,
        "time_shares": found.shares,
        "recomputed_blocks": found.plan.policies.count(Policy.RECOMPUTE),
        "swapped_blocks": found.plan.policies.count(Policy.SWAP),
        "policy_costs": policy_costs(found),
        "unlimited_step_s": None if found.unlimited_ms is None else found.unlimited_ms / 1000,
        "smallest_limit_bytes": found.outcome.smallest_limits[0],
    }
    return content
