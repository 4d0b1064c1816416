"""The weights of a stage: their versions, and the updates that make them."""
