"""What the callbacks of Lightning and of the Hugging Face Trainer are tested with."""

EXCLUDED = ["net.unused"]  # no task reaches it
MODES = {
    "static": {"num_batches": 3},
    "pretrained": {"num_batches": 2, "start_at": 3},
    "gradual": {"update_every": 2, "stop_at": 10},
    "dynamic": {"update_every": 2, "stop_at": 12},
}
