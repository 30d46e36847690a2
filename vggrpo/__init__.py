"""Policies and how they learn: flow samplers, GRPO, and the trainer that puts them together."""
