"""The families made by hand, by name. Adding one costs its file, one line here and one golden picture.

A builder is called as ``builder(num_ranks, num_microbatches, **options)``; its keyword parameters are its options. One
that has the parameter `stages_per_rank` can put several stages on a rank (its default is the family's), any other runs
one. The registry adds what is no family: the searched schedule, which starts from these, and files.
"""

from __future__ import annotations

from vpipe.schedule.entry import Entry
from vpipe.schedule.families.dualpipe_v import build_dualpipe_v
from vpipe.schedule.families.gpipe import build_gpipe
from vpipe.schedule.families.interleaved import build_interleaved
from vpipe.schedule.families.looped_bfs import build_looped_bfs
from vpipe.schedule.families.naive import build_naive
from vpipe.schedule.families.one_f_one_b import build_1f1b
from vpipe.schedule.families.pipedream import build_pipedream, build_pipedream_2bw
from vpipe.schedule.families.v_memory import build_v_half, build_v_min
from vpipe.schedule.families.zb_v import build_zb_v
from vpipe.schedule.families.zero_bubble import build_zb_h1, build_zb_h2

__all__ = ["ASYNCHRONOUS", "SYNCHRONOUS"]

SYNCHRONOUS: dict[str, Entry] = {
    "naive": Entry(build_naive, True, "One microbatch at a time through all stages: one rank works, the rest wait."),
    "gpipe": Entry(build_gpipe, True, "All forwards, then all backwards, then one update: each rank holds them all."),
    "1f1b": Entry(build_1f1b, True, "After a warmup, a forward and a backward in turn: GPipe's time, less memory."),
    "interleaved": Entry(build_interleaved, True, "1F1B with several stages per rank: a smaller bubble, more traffic."),
    "looped-bfs": Entry(build_looped_bfs, True, "GPipe with several stages per rank: whole batches stage by stage."),
    "zb-h1": Entry(build_zb_h1, True, "Weight gradients fill idle time: a third of 1F1B's bubble in 1F1B's memory."),
    "zb-h2": Entry(build_zb_h2, True, "ZB-H1 further ahead: no idle time inside a rank's own, for twice the memory."),
    "zb-v": Entry(build_zb_v, True, "Zero bubble in 1F1B's memory: stages go down the ranks and up again."),
    "v-half": Entry(build_v_half, True, "The V with half of 1F1B's memory, and half of its bubble."),
    "v-min": Entry(build_v_min, True, "The V with a third of 1F1B's memory, and two thirds of its bubble."),
    "dualpipe-v": Entry(
        build_dualpipe_v, True, "The V in which each forward has a backward beside it to overlap with."
    ),
}

ASYNCHRONOUS: dict[str, Entry] = {
    "pipedream": Entry(build_pipedream, False, "1F1B without a flush: updates while it runs, old weights stashed."),
    "pipedream-2bw": Entry(build_pipedream_2bw, False, "PipeDream with several microbatches per update: two versions."),
}
