"""Several processes that train one adapter: what they exchange, and how they end together."""
