"""Multi-task problems to measure pruning on: data, tasks with losses and metrics, networks, methods, statistics."""
