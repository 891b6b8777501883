"""Where a model comes from and how it comes back: folders, hub ids, weights, heads, saving and reloading."""
