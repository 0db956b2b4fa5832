"""Losses as pure functions: tensors in, tensors out, each with the equation of its paper on its line."""
