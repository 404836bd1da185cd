"""What the daemon says of itself, and to whom: logs, metrics, pages over HTTP, the init system. Decides nothing."""
