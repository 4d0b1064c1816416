"""Random numbers as a function of where they are used."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from vpipe.model.rng import derive_seed, derive_seeds, seed_everything, seeded, seeding_user_code


def test_seeds_are_the_same_in_every_process():
    # A written-down number: hash() of a string would differ from process to process.
    assert derive_seed(7, "weights", 3) == 5313868693975152363


def test_seeds_differ_with_every_part_and_its_type_and_place():
    seeds = {
        derive_seed(*parts) for parts in [(1,), (2,), ("1",), (1, 1), (1, 2), (2, 1), (12,), ("a", 1), ("a1",), ()]
    }
    assert len(seeds) == 10
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numbers_of_numpy_and_torch_give_the_seed_of_their_value():
    assert derive_seed(np.int64(5), "x") == derive_seed(torch.tensor(5), "x") == derive_seed(5, "x")


def test_seeds_derived_together_are_those_derived_one_by_one():
    for parts in [(3,), ("a", np.int64(2)), (1, "dropout", 4, 5)]:
        assert derive_seeds(*parts, last=range(12)) == [derive_seed(*parts, number) for number in range(12)]


def test_a_seeded_block_draws_what_its_seed_says_and_restores_the_state():
    seed_everything(1)
    expected = torch.rand(3)
    before = torch.get_rng_state()
    with seeded(1):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(KeyError), seeded(1):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_user_code_draws_what_its_seed_says_from_every_global_generator():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    with seeding_user_code(1, "entry"):
        first = draw()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with seeding_user_code(1, "entry"):
        assert draw() == first
    with seeding_user_code(1, "other"):
        assert all(mine != theirs for mine, theirs in zip(draw(), first, strict=True))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]


def test_the_chain_is_importable_without_transformers():
    code = "import sys, vpipe.model.chain; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
