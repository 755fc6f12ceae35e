"""``octavo bench``: a client that measures any OpenAI-compatible server, and offline throughput and latency."""
