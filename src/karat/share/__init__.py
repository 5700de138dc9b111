"""Models that leave: saved and shared, asked, exported, in transformers."""
