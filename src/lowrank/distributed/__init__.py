"""Several processes: groups and their collectives, workers, shards of tensors, and checkpoints in parts."""
