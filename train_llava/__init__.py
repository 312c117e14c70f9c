"""Build, train and use one's own LLaVA."""
