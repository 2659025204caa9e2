"""Servers that tests talk to over the network as they would to the real services."""
