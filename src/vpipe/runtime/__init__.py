"""Runs any schedule on torch.distributed."""
