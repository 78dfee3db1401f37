"""What policies look for in prompts and answers, piece by piece as text comes."""
