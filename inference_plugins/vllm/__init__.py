"""vLLM as an engine: every published version goes live in a running server, in place.

Install cpe-daemon where vLLM is installed, and start the server with ``--weight-transfer-config '{"backend": "cpe"}'``.
What runs where: `transfer` and what it uses in the workers' processes, `endpoints` in the server's, `driver` in the
daemon's. Nothing is imported here, for each of the three lacks what the others need.
"""
