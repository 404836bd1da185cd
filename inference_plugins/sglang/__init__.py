"""SGLang as an engine: every published version goes live in a running server, in place.

Install cpe-daemon where SGLang is installed, and tell the server where the daemon is (``CPE_ENGINES_SOCKET``).
What runs where: `register` in all of the server's processes, `hooks`, `worker` and what they use in its schedulers, one
for each GPU, `driver` in the daemon's. Nothing is imported here, for each lacks what the others need.
"""
