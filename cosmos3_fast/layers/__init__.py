"""Layers that shard themselves: each says, as `slots()`, which part of which checkpoint tensor it
holds.
"""
