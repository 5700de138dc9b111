"""Training: recipes, data, engine, checkpoints. Import the module that is needed; this one stays light."""
