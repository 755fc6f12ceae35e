"""The attention registry and the reference backend."""
