"""The trainers' side of the daemon: links, credits, bytes into extents, digests, sealing.

`trainers` keeps the links, `session` is one of them with its credits and its landing ring. `ingest` takes contributions
to versions, `stream` is one rank's on its way in: `room` finds its place, and `writer` copies and digests it there in
threads. What was only copied `digesting` digests later. What is held here already comes no second time: `repeats`
compares it.
"""
