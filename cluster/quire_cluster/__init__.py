"""Quire's cluster: Ray actors, gateways, routing, the command line."""
