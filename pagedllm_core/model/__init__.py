"""Models: loading, the attention hook, the runner."""
