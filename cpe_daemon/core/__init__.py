"""Pure decisions: no torch, no sockets, no clocks, no threads, no files. Everything here is tested without I/O."""
