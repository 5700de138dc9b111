"""From `--data` to batches: sources, augmentation, order, loader. Knows no model and no run."""
