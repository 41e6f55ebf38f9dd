"""The guard of models: it normalises, decodes, searches and scores texts before they reach a model or leave it."""
