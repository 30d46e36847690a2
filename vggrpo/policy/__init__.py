"""Policies: what samples, and says how likely its samples were. The trainer sees `types.Policy` and none of these."""
