"""Where slots live and who copies into them.

`device` is the protocol, `shm` the CPU host's device, `slots` the worker's half.

`memory` holds what all of them need of the kernel: shared, sealed, prefaulted memory; `capacity` asks how much of it
there is.
"""
