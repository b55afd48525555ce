"""From where weights are to the devices and back: checkpoints, loading, saving, sources."""
