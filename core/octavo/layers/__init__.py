"""Building blocks of models. All are shard-aware: with one rank a shard is the whole."""
