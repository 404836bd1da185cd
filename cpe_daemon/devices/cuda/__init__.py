"""NVIDIA GPUs, through the driver's own library.

`driver` binds it, `gpus` finds the GPUs and how they are linked, `lane` issues copies and awaits them, `device` is the
daemon's half, `slots` the worker's. The daemon's half needs neither torch nor a CUDA toolkit: only the driver that
every GPU host has.
"""
