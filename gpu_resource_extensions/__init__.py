"""What only some labs need, each in a module of its own that is imported where it is used.

These modules use the public names of ``gpu_resource_manager_v01`` only.
"""
