"""Training of any task: options, the Lightning module, the run around it, and what keeps it safe."""
