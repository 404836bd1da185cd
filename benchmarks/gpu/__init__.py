"""Benchmarks of a whole node: a daemon, engines and a trainer, each rank a process (`benchmarks.gpu.node`).

They need GPUs to tell anything of speed; with ``shm`` in place of ``cuda`` the same runs where there is none.
"""
