"""What the daemon says of itself: log events and metrics. Nothing here decides anything."""
