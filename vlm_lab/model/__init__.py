"""The network: encoders, connectors, LLMs and the VLM that joins them. Knows nothing of files or configs."""
