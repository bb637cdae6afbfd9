"""Key management infrastructure: where the keys are. Each kind has its folder."""
