"""Guesses at what the sampler will draw next, and how many of them are worth a step's while."""
