"""The pruning methods of ``torch.nn.utils.prune``: one file for each pattern, and the one-call forms."""
