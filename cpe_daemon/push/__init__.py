"""From a staged version to live engines.

`pusher` decides which round comes next, `round` takes the engines of a node through one push of one version,
`participant` is one engine in it, `planner` plans it, `pipeline` moves the bytes through the slots.
"""
