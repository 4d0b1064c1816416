"""VPipe: pipeline-parallel training of PyTorch models."""
