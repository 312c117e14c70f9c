"""What lessons do behind the scenes: they run commands, load models, prepare faults, start ranks."""
