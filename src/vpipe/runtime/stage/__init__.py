"""Forward and backward of the blocks of one stage, for one microbatch."""
