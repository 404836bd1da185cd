"""The trainers' side of the daemon: links, credits, bytes into extents, digests, sealing.

`trainers` keeps the links, `ingest` takes contributions to versions, `stream` is one rank's contribution on its way in,
`writer` copies and digests it in threads, `session` is one link with its credits and its landing ring. What is held
here already comes no second time: `repeats` compares it.
"""
