"""What the blocks of a model take, measured or counted, as a file."""
