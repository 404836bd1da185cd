"""The inference engines of this node: who is attached, what each one holds, and how it is commanded.

`worker` is one engine process's link, `engine` one serving instance with its workers and the state of its weights,
`registry` answers the workers' messages, `drivers` finds the daemon's half of each plugin.
"""
