"""From stored runs to tables, curves and verdicts."""
