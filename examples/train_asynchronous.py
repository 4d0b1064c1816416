"""Train with PipeDream: an update per microbatch, and no waiting for the pipeline to drain.

    torchrun --nproc-per-node 2 examples/train_asynchronous.py

Takes a few seconds. Stage 0 computes with weights that are up to one update old, of which it keeps two versions; the
last stage is always up to date. The result does not depend on luck: a second run gives the same losses. The held-out
loss ends at about 0.1, and the weights of all ranks are put together into one `state_dict`.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vpipe import Pipeline, Plan


def build_model():
    return nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))


def main():
    torch.manual_seed(0)  # every rank makes the same model and shuffles in the same order
    inputs = torch.randn(2000, 8)
    data = TensorDataset(inputs, inputs.relu().sum(1, keepdim=True) - 3.2)
    training, held_out = torch.utils.data.random_split(data, [1600, 400])
    loader = DataLoader(training, batch_size=32, shuffle=True)
    with Pipeline(
        build_model(),
        nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3),
        plan=Plan("pipedream", num_microbatches=4),
    ) as pipeline:
        for epoch in range(4):
            losses = [result.loss for result in pipeline.train(loader)]  # drains at the end of the epoch
            # Batches of an evaluation may have any size.
            evaluation = pipeline.evaluate(DataLoader(held_out, batch_size=64))
            if pipeline.rank == 0:
                mean = sum(losses) / len(losses)
                print(f"epoch {epoch + 1}: loss {mean:.4f}, held-out loss {evaluation['loss']:.4f}", flush=True)
        whole = gather(pipeline)
    model = build_model().eval()
    model.load_state_dict(whole)


def gather(pipeline):
    """Return the whole model's weights, on every rank."""
    parts = [None] * pipeline.num_ranks
    dist.all_gather_object(parts, pipeline.state_dict())
    return {name: tensor for part in parts for name, tensor in part.items()}


if __name__ == "__main__":
    main()
