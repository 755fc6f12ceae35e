"""Building blocks of models. All are shard-aware: with one rank a shard is the whole.

They are plain callables that hold loaded tensors: nothing is trained, moved or registered after it was built.
"""
