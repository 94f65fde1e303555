"""Devices: the mesh, sharding rules, several hosts, compiler options, FLOPs."""
