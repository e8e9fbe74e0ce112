"""The embedded language model: what trained it, its card and its weights."""
