"""Train a classifier, see how many answers are right, and ask it about new samples.

    torchrun --nproc-per-node 2 examples/predict.py

A metric is computed beside the loss on the last stage, and told on every rank. `predict` yields what the last layer
returns for each batch: on the rank of the last stage, or with `everywhere=True` on all. It needs no targets.

A few seconds on two CPU cores; the loss over 3 classes falls from about 1.1 to about 0.1.
"""

import torch
from torch import nn

from vpipe import Pipeline, Plan

NUM_CLASSES = 3


def accuracy(output, target):
    return (output.argmax(1) == target).double().mean()


def make_samples(num_samples, generator):
    centres = 2 * torch.eye(NUM_CLASSES, 8)
    target = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    return centres[target] + 0.7 * torch.randn(num_samples, 8, generator=generator), target


def main():
    torch.manual_seed(0)  # every rank makes the same model and the same batches
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))
    with Pipeline(
        model,
        nn.functional.cross_entropy,
        metrics={"accuracy": accuracy},
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        plan=Plan("1f1b", num_microbatches=4),
    ) as pipeline:
        for result in pipeline.train([make_samples(64, generator) for _ in range(60)]):
            if pipeline.rank == 0 and (result.iteration == 0 or (result.iteration + 1) % 20 == 0):
                told = f"loss {result.loss:.4f}, accuracy {result.metrics['accuracy']:.2f}"
                print(f"iteration {result.iteration + 1}: {told}", flush=True)
        held_out = [make_samples(50, generator) for _ in range(2)]
        found = pipeline.evaluate(held_out)
        right = 0
        for (_, target), output in zip(held_out, pipeline.predict(x for x, _ in held_out), strict=True):
            if output is not None:  # the rank of the last stage
                right += int((output.argmax(1) == target).sum())
        if pipeline.rank == pipeline.num_ranks - 1:
            print(f"held out: accuracy {found['accuracy']:.2f}, right answers {right} of 100", flush=True)


if __name__ == "__main__":
    main()
