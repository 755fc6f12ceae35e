"""IBM's Granite models for Octavo."""
