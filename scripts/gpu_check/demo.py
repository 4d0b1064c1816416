"""The demo's run, as checks change it: random tokens of a few samples, which it learns by heart, and its devices."""

from __future__ import annotations

from gpu_check.notes import Notes

__all__ = ["demo", "small"]


def demo(notes: Notes, num_ranks: int, *devices: int) -> dict[str, object]:
    """Return the settings that train the demo's model on `devices`, one per rank; none: all ranks on the first.

    On a CPU the model is smaller: there it is only tried whether the check itself works.
    """
    size: dict[str, object] = {"data.synthetic_samples": 64, "train.iterations": 16}
    if not notes.on_gpu:
        size = {
            "data.synthetic_samples": 16, "train.iterations": 12, "train.batch_size": 16,
            "data.sequence_length": 32, "model.num_layers": 2,
        }  # fmt: skip
    return {
        "data.synthetic_data": True,
        "data.data_dir": None,
        "model.vocab_size": 1024,
        "pipeline.num_ranks": num_ranks,
        "plan.partition": "uniform",
        "optimizer.learning_rate_policy": "constant",
        "optimizer.warmup_iterations": 2,
        "train.eval_batches": 0,
        "train.save_model": False,
        **size,
        **_places(notes, num_ranks, devices),
    }


def small(notes: Notes, num_ranks: int, *devices: int) -> dict[str, object]:
    """Return the settings of a model of nine blocks and few batches, with the demo's dropout and clipping."""
    width = {"model.hidden_size": 256, "model.num_heads": 4} if notes.on_gpu else {}
    settings = demo(notes, num_ranks, *devices) | {"model.num_layers": 4, "train.batch_size": 16, **width}
    del settings["train.iterations"]
    return settings


def _places(notes: Notes, num_ranks: int, devices: tuple[int, ...]) -> dict[str, object]:
    if not notes.on_gpu:
        return {"launch.device": "cpu"}
    places = devices or (0,) * num_ranks
    return {"launch.device": "cuda", "launch.machines": [f"localhost:{device}" for device in places]}
