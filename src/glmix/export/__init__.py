"""The network as a file for an inference engine, and such files in use."""
