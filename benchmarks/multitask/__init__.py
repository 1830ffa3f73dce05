"""Multi-task problems to measure pruning on: data, tasks with their losses and metrics, networks, methods, statistics."""
