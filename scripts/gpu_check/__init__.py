"""The check of VPipe on CUDA devices: `scripts/gpu-check` runs it, `--help` explains it.

`__main__` reads the command line, `runner` runs each check of the `catalogue` in processes of its own, `report` tells
what came out. What starts and judges imports no torch: it must outlive whatever torch does on a device.
"""
