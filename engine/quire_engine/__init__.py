"""Quire's engine: tokens in, tokens out. It imports neither Ray nor gRPC."""
