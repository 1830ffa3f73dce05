"""What a problem is: tasks, metrics, and how far from dense."""
